"""`hgpo-trl recipes`: list the recipes that `--config` finds by name."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hgpo_trl.common.errors import run_stage
from hgpo_trl.common.recipe_files import package_recipes, recipe_names, summary


def main(argv: Sequence[str]) -> None:
    """Print the recipes in `./recipes`, then those of the package, by name and first sentence."""
    argparse.ArgumentParser("hgpo-trl recipes", allow_abbrev=False, description=__doc__).parse_args(argv)
    folders = {folder.resolve(): recipe_names(folder) for folder in (Path("recipes"), package_recipes())}
    for folder, names in folders.items():
        if not names:
            continue
        width = max(map(len, names))
        print(f"{folder}:", *(f"  {name:<{width}}  {summary(path)}" for name, path in names.items()), "", sep="\n")
    print("Use one as `hgpo-trl STAGE --config FOLDER/STAGE`; copy its file to change it. Files for several processes")
    print(f"(`accelerate launch --config_file`) and for Slurm are in {package_recipes()}.")


if __name__ == "__main__":
    run_stage(main, "recipes", sys.argv[1:])
