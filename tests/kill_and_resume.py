"""Start a stage again and again, kill it each time, and let the last start finish.

    python tests/kill_and_resume.py STAGE NUMBER_OF_KILLS [FIELDS ...]

Every start is a fork of this process, which has the imports done. One half dies at a random moment after its first
checkpoint was begun, the other when a random one of a checkpoint's files is opened for writing.
"""

import contextlib
import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any


def die_at_write(number: int) -> None:
    """Have this process killed when it opens its `number`-th file below a checkpoint for writing."""
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and "checkpoint-" in str(args[0]) and isinstance(args[1], str) and "w" in args[1]:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def start(stage: str, argv: list[str], dies_at: int | None) -> int:
    """The process number of a fork that runs the stage."""
    if pid := os.fork():
        return pid
    if dies_at is not None:
        die_at_write(dies_at)
    code = 1
    try:
        importlib.import_module(f"hgpo_trl.scripts.{stage}").main(argv)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for_new_checkpoint(output_dir: Path) -> None:
    """Until a folder of a checkpoint changes; a minute at most."""
    before = {path: path.stat().st_mtime_ns for path in output_dir.glob("checkpoint-*")}
    for _ in range(6_000):
        time.sleep(0.01)
        with contextlib.suppress(FileNotFoundError):  # just removed
            if any(before.get(path) != path.stat().st_mtime_ns for path in output_dir.glob("checkpoint-*")):
                return
    sys.exit("no checkpoint within a minute")


def main() -> None:
    stage, kills, *argv = sys.argv[1:]
    output_dir = Path(argv[argv.index("--output_dir") + 1])
    importlib.import_module(f"hgpo_trl.scripts.{stage}")
    rng = random.Random(0)
    killed = 0
    while killed < int(kills):
        by_write = killed % 2 == 0
        pid = start(stage, argv, rng.randint(1, 20) if by_write else None)
        if not by_write:
            wait_for_new_checkpoint(output_dir)
            time.sleep(rng.uniform(0.0, 0.3))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"start {killed + 1} was to be killed, but ended by itself with status {status}")
        killed += 1
        folders = {path.name: (path / "complete.json").exists() for path in sorted(output_dir.glob("checkpoint-*"))}
        print(f"kill {killed}: whole {folders}", flush=True)
    _, status = os.waitpid(start(stage, argv, None), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
