"""`hgpo-trl data hft` on synthetic rows: rows per second and peak memory, by number of rows and of processes.

    python benchmarks/data_builder.py [--rows 10000 100000 1000000] [--processes 1 2] [--output_dir FOLDER]

Each build is a process of its own, with the default steps (quality, length, reasoning queries, verification) and near
deduplication. 60 % of the rows think, with traces of 200 words on average, 40 % are short chat answers; one row in a
hundred repeats an earlier query, and one in a hundred repeats it but for a word. Memory is that of the process and all
its children, looked at ten times a second: `peak` is resident memory as the system counts it, `own` leaves out pages of
files, which the system takes back when it needs them, and those that processes share.

Appends to results.jsonl and writes table.md and data_builder.png from all that is in it. Ratios say how cost grows: 1.0
per row is linear time.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from matplotlib.figure import Figure
from tqdm.auto import tqdm

WORDS = 20_000
INTERVAL = 0.1  # seconds between two looks at memory
REPEATED = 0.01  # share of queries, exactly; the same again but for a word


def write_rows(path: Path, count: int) -> None:
    """JSON lines with the columns question and reply."""
    rng, draw = random.Random(0), np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = np.array(["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(WORDS)])
    recent: list[tuple[list[str], bool]] = []

    def text(mean: int) -> list[str]:
        return vocabulary[draw.integers(WORDS, size=max(10, int(draw.gamma(4, mean / 4))))].tolist()

    with path.open("w", encoding="utf-8") as file:
        for _ in tqdm(range(count), desc=str(path)):
            question, thinks, chance = text(50), rng.random() < 0.6, rng.random()
            if recent and chance < 2 * REPEATED:
                question, thinks = rng.choice(recent)
                if chance < REPEATED:
                    changed = rng.randrange(len(question))
                    question = [*question[:changed], "otherwise", *question[changed + 1 :]]
            elif rng.random() < 0.1:
                recent = [*recent[-9_999:], (question, thinks)]
            answer = f"{' '.join(text(40))}."
            reply = f"<think>{' '.join(text(200))}</think>{answer}" if thinks else f"<no_think>{answer}</no_think>"
            file.write(json.dumps({"question": " ".join(question), "reply": reply}) + "\n")


def build(data: Path, rows: int, processes: int, folder: Path) -> dict[str, Any]:
    """One build in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    recipe = {
        "sources": [{"path": str(data), "name": "synthetic", "fields": {"prompt": "question", "response": "reply"}}],
        "output_dir": str(folder),
        "num_processes": processes,
    }
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    peak = own = most = 0
    start = time.perf_counter()
    with folder.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "hgpo_trl.cli", "data", "hft", "--config", str(config)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            memory = [info for each in family(parent) if (info := memory_of(each)) is not None]
            peak = max(peak, sum(info.rss for info in memory))
            own = max(own, sum(info.rss - info.shared for info in memory))
            most = max(most, len(memory))
            time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"The build failed; see {folder.with_suffix('.log')}.")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    kept = manifest["sources"]["synthetic"]["kept"]
    shutil.rmtree(folder)
    return {
        "rows": rows,
        "processes": processes,
        "seconds": seconds,
        "peak_mib": peak / 2**20,
        "own_mib": own / 2**20,
        "read_mib": data.stat().st_size / 2**20,
        "written_mib": written / 2**20,
        "kept": kept,
        "duplicates": manifest["duplicates"],
    }


def family(parent: psutil.Process) -> list[psutil.Process]:
    try:
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(process: psutil.Process) -> Any:
    try:
        return process.memory_info()
    except psutil.NoSuchProcess:  # it ended meanwhile
        return None


def table(results: list[dict[str, Any]]) -> str:
    """Seconds and memory; ratios to the run with the same processes and the next fewer rows."""
    header = [
        "rows", "processes", "read", "seconds", "rows / s", "seconds per row, ratio", "peak memory", "own memory",
        "own memory, ratio",
    ]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "| --: " * len(header) + "|"]
    before: dict[int, dict[str, Any]] = {}
    for r in results:
        last = before.get(r["processes"])
        ratios = ["", ""]
        if last is not None:
            time_ratio = (r["seconds"] / r["rows"]) / (last["seconds"] / last["rows"])
            ratios = [f"{time_ratio:.2f}", f"{r['own_mib'] / last['own_mib']:.2f}"]
        before[r["processes"]] = r
        cells = [
            f"{r['rows']:,}", r["processes"], f"{r['read_mib']:,.0f} MiB", f"{r['seconds']:,.0f}",
            f"{r['rows'] / r['seconds']:,.0f}", ratios[0], f"{r['peak_mib']:,.0f} MiB", f"{r['own_mib']:,.0f} MiB",
            ratios[1],
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, field, label in zip(
        figure.subplots(1, 2), ("seconds", "own_mib"), ("seconds", "own memory, MiB"), strict=True
    ):
        for processes, marker in zip(sorted({r["processes"] for r in results}), "os^vD", strict=False):
            mine = [r for r in results if r["processes"] == processes]
            axes.plot(
                [r["rows"] for r in mine],
                [r[field] for r in mine],
                marker=marker,
                label=f"{processes} process{'es' * (processes > 1)}",
            )
        axes.set(xscale="log", xlabel="rows")
        if field == "seconds":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
        axes.set_title(label, loc="left", fontsize=10.5)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="rows of a build")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="processes of a build")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/data"))
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = args.output_dir / "results.jsonl"
    for rows in args.rows:
        data = args.output_dir / f"rows-{rows}.jsonl"
        if not data.is_file():
            write_rows(data.with_suffix(".part"), rows)
            data.with_suffix(".part").replace(data)
        for processes in args.processes:
            result = build(data, rows, processes, args.output_dir / f"build-{rows}-{processes}")
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)

    latest = {}  # of several runs of the same size the last one
    for line in log.read_text().splitlines():
        result = json.loads(line)
        latest[result["processes"], result["rows"]] = result
    results = [latest[key] for key in sorted(latest)]
    (args.output_dir / "table.md").write_text(table(results) + "\n")
    print(table(results))
    draw(results, args.output_dir / "data_builder.png")


if __name__ == "__main__":
    main()
