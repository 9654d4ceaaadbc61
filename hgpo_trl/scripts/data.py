"""Build data: `hgpo-trl data KIND --config RECIPE`.

Without a kind the recipe's name tells it: `data_hft.yaml` is for `hft`, and `data_eval.yaml` for `hgpo`, since an
evaluation needs prompts as Stage II does. Any other name stands for `task`, an embedded task.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from hgpo_trl.common.errors import run_stage
from hgpo_trl.common.recipe_files import named_recipe

KINDS = {
    "task": "data sets and untrained model of an embedded task",
    "hft": "Stage I: hybrid SFT examples from any list of sources",
    "hgpo": "Stage II: prompts from any list of sources",
    "classifier": "train the classifier that finds reasoning queries",
}

_USAGE = "usage: hgpo-trl data [KIND] --config RECIPE.yaml [--FIELD VALUE ...]\n\nkinds:\n" + "\n".join(
    f"  {kind:<12}{summary}" for kind, summary in KINDS.items()
)


def kind_of(recipe: str) -> str:
    """The kind of data that a recipe of this name, or path, is for."""
    stage, _, kind = Path(recipe).stem.partition("_")
    kind = "hgpo" if kind == "eval" else kind
    return kind if stage == "data" and kind in KINDS else "task"


def main(argv: Sequence[str]) -> None:
    """Run one builder in this process."""
    kind, rest = (
        (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (kind_of(named_recipe(argv) or ""), argv)
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"{_USAGE}\n\nWithout KIND, the recipe's name tells it: data_hft.yaml is for hft, data_eval.yaml for hgpo."
        )
        print("`hgpo-trl data KIND --help` lists a kind's fields.")
        return
    if kind not in KINDS:
        print(f"{_USAGE}\n\nhgpo-trl data: error: unknown kind {kind!r}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"hgpo_trl.scripts.data_{kind}").main(rest)


if __name__ == "__main__":
    run_stage(main, "data", sys.argv[1:])
