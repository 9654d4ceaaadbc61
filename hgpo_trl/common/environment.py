"""Environment variables of a recipe: set before anything reads them, or refused by name.

Libraries read many variables while they are imported: HF_HOME and HF_HUB_OFFLINE, OMP_NUM_THREADS. So the commands take
a recipe's `env` before they import the stage, and for `python -m` and `accelerate launch -m` the package
`hgpo_trl.scripts` does so while it is imported itself. Values are the recipe's text, unchanged: 1e-4, yes
and 010 are not converted.
"""

import os
import re
import sys
from collections.abc import Sequence

import yaml

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import expand_path
from hgpo_trl.common.recipe_files import find_recipe, named_recipe

# Python and the dynamic linker read these before the first line of a program.
_READ_BEFORE_START = re.compile(r"PYTHON\w+|(LD|DYLD|MALLOC|GLIBC)_\w+")
# Variables that libraries read while they are imported, or when they first use a device.
_READ_AT_IMPORT = re.compile(
    r"(ACCELERATE|CUDA|DS|GOMP|HF|HUGGINGFACE|KMP|MKL|NCCL|NUMEXPR|OMP|ONEDNN|OPENBLAS|PYTORCH|TOKENIZERS|TORCH|TRANSFORMERS"
    r"|VLLM|XDG)_\w+"
)

# Variables that have been set, by name and value in the recipe. The entry point sets them and the stage's parser asks
# again, when a value like /opt/bin:$PATH would be expanded to another text.
_applied: dict[tuple[str, str], str] = {}


def apply_env(argv: Sequence[str]) -> None:
    """Set the variables of the recipe that a command line names.

    A recipe that cannot be read is left to the stage's parser, which reports the error.

    Raises:
        UserError: as `set_env`.
    """
    name = named_recipe(argv)
    path = None if name is None else find_recipe(name)
    try:
        recipe = None if path is None else yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    if isinstance(recipe, dict) and isinstance(recipe.get("env"), dict):
        set_env(str(path), recipe["env"])


def set_env(where: str, env: dict[str, object]) -> None:
    """Set environment variables that a recipe gives.

    Args:
        where: the recipe, for messages.
        env: name -> text, as YAML's BaseLoader reads it.

    Raises:
        UserError: a value is not text, or Python or an imported library has already read the variable.
    """
    for name, value in env.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: env: {name}={value!r} must be a single value.")
        text = expand_path(f"env: {name}", value)
        if name in os.environ and os.environ[name] in (text, _applied.get((name, value))):
            continue
        if _READ_BEFORE_START.fullmatch(name):
            raise UserError(
                f"{where}: env: {name} is read before a recipe is. Take it out of the recipe, and set it in the shell "
                f"that starts the command: {name}={value} hgpo-trl ..."
            )
        if "torch" in sys.modules and _READ_AT_IMPORT.fullmatch(name):
            raise UserError(
                f"{where}: env: {name} is read when libraries are imported, and they are already. Start the stage as "
                f"`hgpo-trl` or `python -m hgpo_trl.scripts.STAGE`, or set {name} beforehand."
            )
        os.environ[name] = _applied[name, value] = text
