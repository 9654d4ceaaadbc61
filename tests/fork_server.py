"""Processes that have the imports done and run one script after another, each in forks of their own.

Importing the package takes most of the time of a short training; here one start pays it for many. A fork begins like
a new process: nothing of the scripts before it is left.

    accelerate launch ... tests/fork_server.py FOLDER PID        for a `ForkServer` in process PID
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ("hgpo_trl.scripts.hft", "hgpo_trl.scripts.hgpo")


def _write(path: Path, text: str) -> None:
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").rename(path)


class ForkServer:
    """Started processes that wait for scripts; ended by `close`.

    Args:
        launcher: the command that starts a Python script in `processes` processes.
        environment: more environment variables for all scripts.
        folder: an empty folder for what the processes tell each other.
    """

    def __init__(self, launcher: list[str], processes: int, environment: dict[str, str], folder: Path) -> None:
        self.folder, self.processes, self.number = folder, processes, 0
        self.log = (folder / "server.log").open("w+", encoding="utf-8")
        self.launcher = subprocess.Popen(
            [*launcher, __file__, str(folder), str(os.getpid())],
            cwd=ROOT, env=os.environ | environment, stdout=self.log, stderr=self.log, start_new_session=True,
        )  # fmt: skip

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a script with its arguments in every process; `stdout` is all that they printed, errors too."""
        stem = f"{self.number:03d}"
        self.number += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        _write(self.folder / f"{stem}.job", json.dumps({"words": [str(word) for word in words], "port": port}))
        ends = [self.folder / f"{stem}-{rank}.end" for rank in range(self.processes)]
        while not all(end.exists() for end in ends):
            if self.launcher.poll() is not None:
                raise RuntimeError("the processes ended: " + (self.folder / "server.log").read_text()[-4000:])
            time.sleep(0.05)
        printed = "".join(end.with_suffix(".out").read_text(encoding="utf-8") for end in ends)
        status = next((status for end in ends if (status := int(end.read_text())) != 0), 0)
        return subprocess.CompletedProcess(list(map(str, words)), status, printed, "")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGTERM)
        self.launcher.wait()
        self.log.close()


def _run(words: list[str], port: int, output: Path) -> int:
    """Run a script in this fork; its exit status."""
    # Every script's processes meet at a port of their own: the launcher's store remembers those of the script before.
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    with output.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _serve(folder: Path, asker: int, rank: int) -> None:
    """Run the scripts that process `asker` asks for, as long as it lives."""
    number = 0
    while True:
        stem = f"{number:03d}"
        job = folder / f"{stem}.job"
        while not job.exists():
            time.sleep(0.05)
            if not _lives(asker):
                return
        end = folder / f"{stem}-{rank}.end"
        pid = os.fork()
        if pid == 0:
            status = _run(**json.loads(job.read_text(encoding="utf-8")), output=end.with_suffix(".out"))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        done, status = 0, 0
        while not done:
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and any(int(other.read_text()) for other in folder.glob(f"{stem}-*.end")):
                os.kill(pid, signal.SIGKILL)  # as a launcher does where another process has failed
                done, status = os.waitpid(pid, 0)
            time.sleep(0.05)
        _write(end, str(os.waitstatus_to_exitcode(status)))
        number += 1


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    _serve(Path(sys.argv[1]), int(sys.argv[2]), int(os.environ.get("RANK", "0")))
