"""`hgpo-trl evaluate`: two processes against one, and memory against the number of prompts.

    OMP_NUM_THREADS=1 taskset -c 0,1 python benchmarks/evaluation.py processes [--prompts 128 1024] [--turns 2]
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py memory --prompts 2000 20000 76000

`processes` evaluates the same untrained model of the chain-sum task by turns in one process and in two, each with one
thread, and checks that the figures are the same. Of two processes the one that takes longer counts. Seconds are CPU
seconds, after the imports: on a CPU they are the wall time of a machine that does nothing else. Wall time and load are
shown, too.

`memory` evaluates prompts with a made-up backend that gives responses of 8,000 characters at once, and measures the
most memory of its own that the process has had above what it began with. Every run is a fork, and prints one line of
JSON.
"""

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from hgpo_trl.modes import MODES
from hgpo_trl.scripts import evaluate
from hgpo_trl.tasks import chain_sum
from hgpo_trl.tasks.embedded import build_model, build_tokenizer, draw, prompt_dataset

SHOWN = ("hybrid_accuracy", "thinking_ratio", "accuracy", "mean_tokens", "intervals")
PROMPTS, SAMPLES, BATCH, TOKENS = 128, 4, 32, 200  # different prompts; the others are of `processes`
TEXT = 8_000  # characters of a response of `memory`


def words(folder: Path, output_dir: Path, **fields: Any) -> list[str]:
    fields = {"model": folder / "model", "data": folder / "data.parquet", "output_dir": output_dir} | fields
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def build(folder: Path, num_prompts: int) -> None:
    """A model, and as many prompts."""
    tokenizer = build_tokenizer(chain_sum)
    build_model(tokenizer, max_length=2 * TOKENS).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    few = list(draw(chain_sum, PROMPTS, held_out=False, fraction=0.2, seed=0))
    data = prompt_dataset(iter([few[number % PROMPTS] for number in range(num_prompts)]))
    data.to_parquet(folder / "data.parquet")


def in_forks(count: int, run: Callable[[], object]) -> tuple[list[float], float]:
    """Run in as many processes of one launch; the CPU seconds of each, and the seconds until the last has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun, pids = time.perf_counter(), []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update({name: str(value) for name, value in ranks.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            status = 1
            try:
                run()
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        pids.append(pid)
    seconds = []
    for pid in pids:
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise SystemExit(f"an evaluation ended with status {os.waitstatus_to_exitcode(status)}")
        seconds.append(usage.ru_utime + usage.ru_stime)
    return seconds, time.perf_counter() - begun


def processes(num_prompts: int, turns: int, folder: Path) -> None:
    build(folder, num_prompts)
    for turn in range(turns):
        seconds, wall, figures = {}, {}, []
        for count in (1, 2):
            output_dir = folder / f"{turn}-{count}"
            fields = {"samples_per_mode": SAMPLES, "batch_size": BATCH, "max_new_tokens": TOKENS, "temperature": 1.0}
            argv = words(folder, output_dir, **fields)
            with redirect_stdout(sys.stderr):
                seconds[count], wall[count] = in_forks(count, lambda argv=argv: evaluate.main(argv))
            report = json.loads((output_dir / "report.json").read_text(encoding="utf-8"))
            figures.append({name: report[name] for name in SHOWN})
        result = {
            "responses": num_prompts * SAMPLES * len(MODES),
            "one": seconds[1][0],
            "two": seconds[2],
            "one / longer of two": seconds[1][0] / max(seconds[2]),
            "wall, one / two": wall[1] / wall[2],
            "load": os.getloadavg()[0],
            "same figures": figures[0] == figures[1],
        }
        print(json.dumps(result), flush=True)


# --- memory -----------------------------------------------------------------------------------------------------


@contextmanager
def made_up_sampler(*args: Any, **settings: Any) -> Iterator[Callable[..., pd.DataFrame]]:
    """In place of `loaded_sampler`."""

    def sample(
        prompts: Sequence[Any], *, numbers: Sequence[int], samples_per_mode: int, progress: tqdm, **settings: Any
    ) -> pd.DataFrame:
        rows = [
            {
                "prompt_id": place, "mode": mode.value, "sample": sample,
                "completion": f"<{mode}>{f' {number}, {sample}: so':{TEXT}}</{mode}> 4", "num_tokens": TEXT,
                "truncated": False, "faults": [], "prob_think": 0.5, "prob_no_think": 0.5, "picked": number % 2,
            }
            for place, number in enumerate(numbers) for mode in MODES for sample in range(samples_per_mode)
        ]  # fmt: skip
        progress.update(len(rows))
        return pd.DataFrame(rows)

    yield sample


def one_half(completions: list, **kwargs: Any) -> list[float]:
    """A reward function that takes no time."""
    return [0.5] * len(completions)


def own_memory() -> int:
    """Bytes of this process that no file holds."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def most_memory(run: Callable[[], object]) -> int:
    """The most bytes that `own_memory` has shown while something ran, above what it showed before."""
    before, most, ended = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        ended.set()
        watcher.join()
    return most - before


def memory(num_prompts: int, samples_per_mode: int, folder: Path) -> None:
    build(folder, num_prompts)
    evaluate.loaded_sampler = made_up_sampler
    fields = {"samples_per_mode": samples_per_mode, "batch_size": 64, "max_new_tokens": TOKENS}
    argv = words(folder, folder / "out", **fields, reward_funcs=f"{__file__}:one_half")

    def run() -> None:
        with redirect_stdout(sys.stderr), redirect_stderr(Path(os.devnull).open("w")):
            most = most_memory(lambda: evaluate.main(argv))
        result = {
            "prompts": num_prompts,
            "text MB": num_prompts * samples_per_mode * len(MODES) * TEXT / 1e6,
            "most MB": most / 1e6,
        }
        print(json.dumps(result), flush=True)

    in_forks(1, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("processes", "memory"))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--prompts", type=int, nargs="+", help="processes: 128; memory: 2000 20000")
    parser.add_argument("--samples_per_mode", type=int, default=2)
    args = parser.parse_args()
    with TemporaryDirectory() as name:
        if args.what == "processes":
            for count in args.prompts or [PROMPTS]:
                processes(count, args.turns, Path(name) / str(count))
        else:
            for count in args.prompts or [2_000, 20_000]:
                memory(count, args.samples_per_mode, Path(name) / str(count))


if __name__ == "__main__":
    main()
