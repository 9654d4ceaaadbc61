"""Loading a user's own code by name: a task, a reward function."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_module(name: str) -> ModuleType:
    """Import a module by dotted name ("package.module") or by path ("path/to/file.py").

    Raises:
        ValueError: there is no such module or file. An error inside the module is raised as it is.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"There is no file {name}.")
        spec = importlib.util.spec_from_file_location(f"_hgpo_trl_{path.stem}", path)
        assert spec is not None  # a .py file has one, and a loader
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for the module they stand in
        spec.loader.exec_module(module)
        return module
    try:
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None:
        raise ValueError(f"There is no module {name!r}. Give a dotted module name, or a path that ends in .py.")
    return importlib.import_module(name)
