"""Build data: `hgpo-trl data KIND --config RECIPE`. The default kind is `task`, an embedded task."""

import importlib
import sys
from collections.abc import Sequence

from hgpo_trl.common.errors import run_stage

KINDS = {
    "task": "data sets and untrained model of an embedded task (the default)",
    "hft": "Stage I: hybrid SFT examples from any list of sources",
    "hgpo": "Stage II: prompts from any list of sources",
    "classifier": "train the classifier that finds reasoning queries",
}

_USAGE = "usage: hgpo-trl data [KIND] --config RECIPE.yaml [--FIELD VALUE ...]\n\nkinds:\n" + "\n".join(
    f"  {kind:<12}{summary}" for kind, summary in KINDS.items()
)


def main(argv: Sequence[str]) -> None:
    """Run one builder in this process."""
    kind, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("task", argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{_USAGE}\n\n`hgpo-trl data KIND --help` lists a kind's fields.")
        return
    if kind not in KINDS:
        print(f"{_USAGE}\n\nhgpo-trl data: error: unknown kind {kind!r}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"hgpo_trl.scripts.data_{kind}").main(rest)


if __name__ == "__main__":
    run_stage(main, "data", sys.argv[1:])
