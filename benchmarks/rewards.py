r"""`hgpo_trl.verification.check_answers` against `trl.rewards.accuracy_reward`, side by side, on the same answers.

    python benchmarks/rewards.py [--data DIR] [--queries 100] [--repeats 3] [--output_dir runs/benchmarks/rewards]

DIR holds JSON files of rows with "answer" and, if they like, "solution" (prose for the long answers); without it both
are made up. Half the answers are right, the others state another query's reference answer. Kinds, in equal parts:

    short       $X$                                      bare        X, no delimiters
    prose       a sentence or two, then \\boxed{X}       statement   a sentence or two, then "The answer is $X$."
    long        200 to 600 words, then \\boxed{X}        malformed   prose, broken off inside \\boxed{X}

Every repeat has queries of its own; the two take turns. Writes results.json, differences.json and table.md.
"""

import argparse
import ast
import collections
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from trl.rewards import accuracy_reward

from hgpo_trl.verification import check_answers
from hgpo_trl.verification.exact import settle

KINDS = ("short", "bare", "prose", "statement", "long", "malformed")
SENTENCES = (
    "We first write the condition as an equation in ${a}$ unknowns, $x + {a}y = {b}$.",
    "Substituting $y = \\frac{{{a}}}{{{b}}}$ gives a value that we can simplify.",
    "Since the triangle is isosceles, its two base angles are equal to ${b}^\\circ$.",
    "There are \\({a} \\cdot {b}\\) ways to do so, each of them counted once.",
    "It remains to check the cases in which $n$ leaves the remainder {a}.",
    "Both sides are positive, so that squaring them changes nothing.",
)


def words(entry: Any) -> str:
    """A reference answer as a model would write it: of a list as text, its entries."""
    text = str(entry)
    return ", ".join(ast.literal_eval(text)).replace("$", "") if text[:2] in ("['", '["') else text


def made_up(rng: random.Random, rows: int) -> list[dict[str, str]]:
    forms = ("{a}", "{a}.{b}", "\\frac{{{a}}}{{{b}}}", "{a}\\sqrt{{{b}}}", "({a}, {b})", "x^2 + {a}x - {b}", "{a}\\%")
    return [{"answer": rng.choice(forms).format(a=rng.randint(2, 99), b=rng.randint(2, 99))} for _ in range(rows)]


def load(directory: Path) -> list[dict[str, str]]:
    rows = [row for path in sorted(directory.glob("*.json")) for row in json.loads(path.read_text(encoding="utf-8"))]
    return [row for row in rows if row.get("answer") not in (None, "")]


def prose(rng: random.Random, count: int, solutions: list[str]) -> str:
    """About so many words."""
    text: list[str] = []
    while len(text) < count:
        if solutions and rng.random() < 0.5:
            text += rng.choice(solutions).replace("\\boxed", "").split()
        else:
            text += rng.choice(SENTENCES).format(a=rng.randint(2, 9), b=rng.randint(10, 99)).split()
    return " ".join(text[:count]) + "."


def answer(rng: random.Random, kind: str, result: str, solutions: list[str]) -> str:
    if kind == "short":
        return f"${result}$"
    if kind == "bare":
        return result
    text = prose(
        rng, rng.randint(200, 600) if kind == "long" else rng.randint(10, 30), [] if kind != "long" else solutions
    )
    if kind == "statement":
        return f"{text}\n\nThe answer is ${result}$."
    boxed = f"{text}\n\nSo the answer is $\\boxed{{{result}}}$."
    return boxed[: -rng.randint(4, 4 + len(result))] if kind == "malformed" else boxed


def compare(rows: list[dict[str, str]], per_query: int, queries: int, repeats: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    solutions = [row["solution"] for row in rows if isinstance(row.get("solution"), str)]
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    rungs: collections.Counter[str] = collections.Counter()
    wrong = {"ours": 0, "trl": 0, "samples": 0}
    differences = []
    for repeat in range(-1, repeats):  # the first to warm up
        cases = []
        for row in rng.choices(rows, k=queries if repeat >= 0 else 4):
            for _ in range(per_query):
                kind, right = rng.choice(KINDS), rng.random() < 0.5
                other = row if right else rng.choice(rows)
                right = right or str(other["answer"]) == str(row["answer"])
                text = answer(rng, kind, words(other["answer"]), solutions)
                cases.append((str(row["answer"]), text, kind, right and kind != "malformed"))
        if repeat < 0:
            floors = [f"\\lfloor x+{i} \\rfloor" for i in range(8)]
            check_answers(floors, floors[::-1])  # starts the workers
        start = time.perf_counter()
        ours = check_answers([case[0] for case in cases], [case[1] for case in cases])
        middle = time.perf_counter()
        theirs = accuracy_reward([[{"content": case[1]}] for case in cases], [f"${words(case[0])}$" for case in cases])
        end = time.perf_counter()
        if repeat < 0:
            continue
        seconds["ours"].append((middle - start) / len(cases))
        seconds["trl"].append((end - middle) / len(cases))
        rungs.update(settle(case[0], case[1])[1] for case in cases)
        for case, mine, stock in zip(cases, ours, theirs, strict=True):
            stock_verdict = None if stock is None else bool(stock)
            wrong["samples"] += 1
            wrong["ours"] += mine != case[3]
            wrong["trl"] += stock_verdict != case[3]
            if mine != stock_verdict:
                differences.append(
                    {
                        "reference": case[0],
                        "answer": case[1],
                        "kind": case[2],
                        "made": case[3],
                        "ours": mine,
                        "trl": stock_verdict,
                    }
                )
    median = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return {
        "per_query": per_query,
        "samples": wrong["samples"],
        "trl_ms": median["trl"],
        "ours_ms": median["ours"],
        "ratio": median["trl"] / median["ours"],
        "wrong_trl": wrong["trl"],
        "wrong_ours": wrong["ours"],
        "rungs": {rung: count / wrong["samples"] for rung, count in rungs.most_common()},
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of JSON files with real reference answers")
    parser.add_argument("--queries", type=int, default=100, help="queries of a batch")
    parser.add_argument("--per_query", type=int, nargs="+", default=[4, 16], help="answers per query")
    parser.add_argument("--repeats", type=int, default=3, help="timed batches")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/rewards"))
    args = parser.parse_args()
    rows = load(args.data) if args.data else made_up(random.Random(0), 1000)

    results = []
    differences = {}
    for per_query in tqdm(args.per_query, desc="answers per query"):
        result = compare(rows, per_query, args.queries, args.repeats, seed=per_query)
        differences[per_query] = result.pop("differences")
        results.append(result)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.output_dir / "differences.json").write_text(json.dumps(differences, indent=1, ensure_ascii=False) + "\n")
    header = [
        "answers per query",
        "samples",
        "TRL, ms",
        "ours, ms",
        "TRL / ours",
        "wrong, TRL",
        "wrong, ours",
        "settled by",
    ]
    lines = ["| " + " | ".join(header) + " |", "| --: " * (len(header) - 1) + "| :-- |"]
    lines += [
        f"| {r['per_query']} | {r['samples']:,} | {r['trl_ms']:.2f} | {r['ours_ms']:.2f} | {r['ratio']:.1f} | "
        f"{r['wrong_trl']:,} | {r['wrong_ours']:,} | "
        + ", ".join(f"{rung} {100 * share:.0f} %" for rung, share in r["rungs"].items())
        + " |"
        for r in results
    ]
    (args.output_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for per_query, found in differences.items():
        counts = collections.Counter(
            (d["kind"], f"as made {d['made']}", f"ours {d['ours']}, TRL {d['trl']}") for d in found
        )
        print(f"Differences at {per_query} per query:")
        for key, count in counts.most_common():
            print(f"{count:6}  " + ", ".join(key))


if __name__ == "__main__":
    main()
