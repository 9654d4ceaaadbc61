"""How much thinking does a target accuracy cost? The decision bias that reaches it with the fewest tokens.

hgpo-trl evaluate --config recipes/chain-sum/evaluate.yaml --decision_bias sweep
python examples/decision_bias_sweep.py runs/chain-sum/eval/hgpo --accuracy 0.95
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="output_dir of `hgpo-trl evaluate --decision_bias sweep`")
    parser.add_argument("--accuracy", type=float, default=0.95, help="accuracy that is enough")
    arguments = parser.parse_args()
    report = json.loads((arguments.evaluation / "report.json").read_text(encoding="utf-8"))
    if "decision_bias_curve" not in report:
        parser.error(f"{arguments.evaluation} has no curve: evaluate with --decision_bias sweep")

    print(" bias  thinks  accuracy  tokens")
    for point in report["decision_bias_curve"][::4]:
        print(_line(point))
    enough = [p for p in report["decision_bias_curve"] if (p["accuracy"]["auto"] or 0) >= arguments.accuracy]
    if not enough:
        parser.error(f"no bias reaches an accuracy of {arguments.accuracy}")
    print(f"\ncheapest with an accuracy of {arguments.accuracy}:")
    print(_line(min(enough, key=lambda point: point["mean_tokens"]["auto"])))


def _line(point: dict) -> str:
    thinks, accuracy, tokens = (point[key]["auto"] for key in ("thinking_ratio", "accuracy", "mean_tokens"))
    return f"{point['bias']:+5.1f}  {thinks:6.1%}  {accuracy or 0:8.1%}  {tokens:6.1f}"


if __name__ == "__main__":
    main()
