"""Recipe files by name: `chain-sum/hgpo` is a recipe in `./recipes`, or one that comes with the package."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from hgpo_trl.common.files import expand_path

_PACKAGE = Path(__file__).parents[1]


def package_recipes() -> Path:
    """The folder of the recipes that come with the package; in a checkout, which has none inside, the one beside it."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def find_recipe(name: str) -> Path | None:
    """Find a recipe by path or name; None if there is none.

    Args:
        name: path of a file, or `FOLDER/STAGE` in `./recipes` or in `package_recipes`. The first that exists wins.

    Raises:
        UserError: the path names an environment variable that is not set.
    """
    name = expand_path("--config", name)
    named = (folder / f"{name.removesuffix('.yaml')}.yaml" for folder in (Path("recipes"), package_recipes()))
    return next((path for path in (Path(name), *named) if path.is_file()), None)


def named_recipe(argv: Sequence[str]) -> str | None:
    """The last recipe that a command line names; None if it names none."""
    name = None
    for place, word in enumerate(argv):
        if word == "--config" and place + 1 < len(argv):
            name = argv[place + 1]
        elif word.startswith("--config="):
            name = word.removeprefix("--config=")
    return name


def recipe_names(folder: Path) -> dict[str, Path]:
    """Name -> path of every stage's recipe in a folder of recipes. (`accelerate/` holds launch configurations.)"""
    paths = sorted(path for path in folder.glob("*/*.yaml") if path.parent.name != "accelerate")
    return {f"{path.parent.name}/{path.stem}": path for path in paths}


def nearest_recipe(name: str) -> str | None:
    """The recipe whose name or path is spelled most like `name`."""
    return next(iter(get_close_matches(name, list(_spellings()), n=1, cutoff=0.5)), None)


def _spellings() -> Iterator[str]:
    for folder in (Path("recipes"), package_recipes()):
        yield from recipe_names(folder)
    yield from map(str, Path("recipes").glob("*/*.yaml"))


def summary(path: Path) -> str:
    """The first sentence of a recipe's first line, which is a comment."""
    first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    sentence, *_ = re.split(r"\.\s+(?=[A-Z])", first.lstrip("# "))
    return sentence.rstrip(".:")
