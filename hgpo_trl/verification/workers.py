"""The last rung in processes that are killed at a time limit."""

import atexit
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from hgpo_trl.common.cores import available_cores
from hgpo_trl.verification.symbolic import symbolically_equal

_CHUNK_TIMEOUT_S = 2.0  # for a chunk of samples of a few milliseconds each; when it is up they are tried one by one
_CHUNK = 8  # samples
_WORKER_MEMORY = 4 << 30  # bytes of address space

_REHEARSAL = (  # the grammar's parser is slow on the first sight of a construct
    ("\\sin^2 y + \\cos(2x)", "\\frac{16}{5}"),
    ("\\begin{pmatrix} -1/3 \\\\ 2 \\end{pmatrix}", "\\left( \\frac{1}{4}, -\\frac{3}{4} \\right)"),
    ("(-\\infty,-8]\\cup [8,\\infty)", "(0,5) \\cup (5,\\infty)"),
    ("26x^2+30x - 1", "x(30+26x) - y"),
    ("7\\text{ hours}", "\\frac{1}{7}\\triangle ABC"),
    ("\\log\\left(\\frac{2007}{2006}\\right)", "\\ln 2 + \\lfloor\\sqrt{n-1}\\rfloor"),
    ("12x - 4y + 3z - 169 = 0", "y = 2x + 3"),
    ("\\{1, \\sqrt[3]{2}\\}", "1 \\pm \\sqrt{19}"),
    ("x \\in [-2,7]", "-2 \\le x < 7"),
    ("\\binom{2n}{n}", "\\frac{(2n)!}{n! \\cdot n!}"),
    ("2^{1009} + |x|", "3 \\times e^{i \\pi}"),
    ("1:4", "10\\%"),
    ("A, B", "\\text{Evelyn}"),
)


def _prepare_worker() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY, _WORKER_MEMORY))


def _check_chunk(compare: Callable[[str, str], bool], pairs: list[tuple[str, str]]) -> list[bool]:
    return [compare(reference, answer) for reference, answer in pairs]


def _run(
    pool: Any, compare: Callable[[str, str], bool], chunks: list[list[tuple[str, str]]], limit: float
) -> list[bool | None]:
    """The verdicts on all pairs, in order; None for all of a chunk that did not end well within the limit."""
    futures = [pool.schedule(_check_chunk, args=(compare, chunk), timeout=limit) for chunk in chunks]
    verdicts: list[bool | None] = []
    for chunk, future in zip(chunks, futures, strict=True):
        try:
            verdicts += future.result()
        except Exception:  # the time was up, the worker died (pebble's ProcessExpired), or the rung itself raised
            verdicts += [None] * len(chunk)
    return verdicts


def _serve(channel: Connection, workers: int) -> None:
    """Answer batches of pairs until the other end is closed. Runs in a process that imports nothing heavy."""
    from pebble import ProcessPool

    logging.disable(logging.WARNING)  # math-verify warns of having no time limit, and of what it cannot take
    for reference, answer in _REHEARSAL:  # what is imported and learnt before the workers are forked they share
        symbolically_equal(reference, f"${answer}$")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel.send("ready")
    with ProcessPool(workers, initializer=_prepare_worker, context=multiprocessing.get_context("fork")) as pool:
        while True:
            try:
                pairs, compare, timeout = channel.recv()
            except EOFError:
                pool.stop()
                return
            size = max(1, min(_CHUNK, len(pairs) // (2 * workers)))
            chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
            verdicts = _run(pool, compare, chunks, min(timeout, _CHUNK_TIMEOUT_S))
            failed = [i for i, verdict in enumerate(verdicts) if verdict is None]
            for i, verdict in zip(failed, _run(pool, compare, [[pairs[i]] for i in failed], timeout), strict=True):
                verdicts[i] = verdict
            channel.send(verdicts)


class _Server:
    """The process that holds the pool of workers.

    It is a plain subprocess: it may be started from any thread and from a daemonic process, shares nothing with CUDA in
    this one, does not import this one's script again, and ends when this process does, however that ends.
    """

    def __init__(self) -> None:
        self.channel, other = Pipe()
        workers = available_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if multiprocessing.parent_process() is not None:
            workers = 1  # a sibling of this process has its own
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from multiprocessing.connection import Connection\n"
            "from hgpo_trl.verification.workers import _serve\n"
            f"_serve(Connection({other.fileno()}), {max(1, workers)})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[other.fileno()], stdin=subprocess.DEVNULL
        )
        other.close()
        try:
            self.channel.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise RuntimeError("The process that verifies answers did not start; its own error is above.") from error

    def ask(self, pairs: list[tuple[str, str]], compare: Callable, timeout: float) -> list[bool | None]:
        self.channel.send((pairs, compare, timeout))
        return self.channel.recv()

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()


_server: _Server | None = None
_lock = threading.Lock()


def _close() -> None:
    global _server
    if _server is not None:
        _server.close()
        _server = None


def _forget() -> None:
    """A forked child starts a server of its own."""
    global _server, _lock
    _lock = threading.Lock()
    if _server is not None:
        _server.channel.close()
        _server = None


atexit.register(_close)
os.register_at_fork(after_in_child=_forget)


def ask_server(pairs: list[tuple[str, str]], compare: Callable, timeout: float) -> list[bool | None]:
    global _server
    with _lock:
        for _ in range(2):  # a server that was killed, for want of memory or by a user, is replaced once
            if _server is None or _server.process.poll() is not None:
                _close()
                _server = _Server()
            try:
                return _server.ask(pairs, compare, timeout)
            except (EOFError, OSError):
                _close()
            except BaseException:  # an interrupt: what is still to come would be taken for the next batch's verdicts
                _close()
                raise
    return [None] * len(pairs)
