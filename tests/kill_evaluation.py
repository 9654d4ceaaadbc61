"""Start `hgpo-trl evaluate` again and again, end it at a file that it writes, and let the last start finish.

    python tests/kill_evaluation.py [2x]FILE:COUNT,[2x]FILE:COUNT,...[,2x] FIELDS ...

Every start is a fork of this process, which has the imports done. It is killed when it opens, for the COUNT-th time, a
file for writing whose path contains FILE. With 2x it is two processes, the second of which is killed, and with
FILE:full finds no space left on the device; there is no launcher, so the first has to notice. What they print is shown
when all have ended, each line behind the number of its process.
"""

import errno
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hgpo_trl.common.errors import run_stage
from hgpo_trl.scripts.evaluate import main as evaluate


def die_at_write(name: str, number: str) -> None:
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and name in str(args[0]) and isinstance(args[1], str) and "w" in args[1]:
            count += 1
            if number == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if count == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def start(argv: list[str], death: str) -> list[int]:
    """The exit statuses of forks that evaluate, the last of which dies."""
    count, death = (2, death.removeprefix("2x")) if death.startswith("2x") else (1, death)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pids = []
    logs = [TemporaryFile("w+", encoding="utf-8") for _ in range(count)]  # noqa: SIM115 (closed below)
    for rank, log in enumerate(logs):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ.update(address | {name: str(value) for name, value in ranks.items()})
                if death and rank == count - 1:
                    die_at_write(*death.rsplit(":", 1))
                run_stage(evaluate, "evaluate", argv)
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for rank, log in enumerate(logs):
        log.seek(0)
        print("".join(f"{rank}: {line}" for line in log.read().splitlines(keepends=True)), flush=True)
        log.close()
    return statuses


def main() -> None:
    deaths, *argv = sys.argv[1:]
    folder = Path(argv[argv.index("--output_dir") + 1])
    *killed, last = deaths.split(",")
    if ":" in last:
        killed, last = [*killed, last], ""
    for death in killed:
        *others, status = start(argv, death)
        if status != (1 if death.endswith("full") else -signal.SIGKILL) or any(other != 2 for other in others):
            sys.exit(f"the start that was to end at {death} ended with status {[*others, status]}")
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("[!.]*.*"))
        print(f"killed at {death}: {files}", flush=True)
    sys.exit(max(start(argv, last)))


if __name__ == "__main__":
    main()
