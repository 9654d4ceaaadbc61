"""Start a stage again and again, kill it each time, and let the last start finish.

    python tests/kill_and_resume.py STAGE NUMBER_OF_KILLS [FIELDS ...]

Every start is a fork of this process, which has the imports done. It kills itself: every other one at a random change
to the files of its checkpoints (one is opened for writing, moved or removed), the rest in the middle of a random step.
What triggers a kill comes within a few steps of every start, so that all kills happen, however busy the machine is.
"""

import importlib
import os
import random
import signal
import sys
from typing import Any

from transformers import Trainer

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_change(number: int) -> None:
    """Have this process killed at its `number`-th change to the files of checkpoints."""
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or "checkpoint-" not in f"{args[:2]}":
            return
        if event == "open" and not (isinstance(args[1], str) and "w" in args[1]):
            return
        count += 1
        if count == number:
            die()

    sys.addaudithook(watch)


def die_at_step(number: int) -> None:
    """Have this process killed in the `number`-th step that it takes, between backward pass and update."""
    count, original = 0, Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        loss = original(self, *args, **kwargs)
        count += 1
        if count == number:
            die()
        return loss

    Trainer.training_step = training_step


def start(stage: str, argv: list[str], kill: tuple[str, int] | None) -> int:
    """The wait status of a fork that runs the stage."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if kill is not None:
                {"change": die_at_change, "step": die_at_step}[kill[0]](kill[1])
            importlib.import_module(f"hgpo_trl.scripts.{stage}").main(argv)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    stage, kills, *argv = sys.argv[1:]
    importlib.import_module(f"hgpo_trl.scripts.{stage}")
    rng = random.Random(0)
    for number in range(int(kills)):
        kill = ("change", rng.randint(1, 30)) if number % 2 == 0 else ("step", rng.randint(2, 6))
        status = start(stage, argv, kill)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"start {number + 1} was to be killed at {kill}, but ended with status {status}")
        print(f"kill {number + 1}: {kill}", flush=True)
    sys.exit(os.waitstatus_to_exitcode(start(stage, argv, None)))


if __name__ == "__main__":
    main()
