"""Start `hgpo-trl evaluate` again and again, kill it at a file that it writes, and let the last start finish.

    python tests/kill_evaluation.py FILE:COUNT,FILE:COUNT,... FIELDS ...

Every start is a fork of this process, which has the imports done. It is killed when it opens, for the COUNT-th time, a
file for writing whose path contains FILE.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from hgpo_trl.scripts.evaluate import main as evaluate


def die_at_write(name: str, number: int) -> None:
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and name in str(args[0]) and isinstance(args[1], str) and "w" in args[1]:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def start(argv: list[str], death: str | None) -> int:
    """The wait status of a fork that evaluates."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if death is not None:
                name, _, count = death.rpartition(":")
                die_at_write(name, int(count))
            evaluate(argv)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    deaths, *argv = sys.argv[1:]
    folder = Path(argv[argv.index("--output_dir") + 1])
    for death in deaths.split(","):
        status = start(argv, death)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"the start that was to die at {death} ended with status {status}")
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("[!.]*.*"))
        print(f"killed at {death}: {files}", flush=True)
    sys.exit(os.waitstatus_to_exitcode(start(argv, None)))


if __name__ == "__main__":
    main()
