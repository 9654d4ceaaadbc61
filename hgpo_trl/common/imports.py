"""Loading a user's own code by name: a task, a reward function."""

import importlib
import importlib.util
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from hgpo_trl.common.errors import UserError


def load_module(name: str) -> ModuleType:
    """Import a module by dotted name ("package.module") or by path ("path/to/file.py").

    A file is run once, under whichever path it is named; files of the same name are modules of their own.

    Raises:
        UserError: there is no such module or file. An error inside the module is raised as it is.
    """
    if name.endswith(".py"):
        return _load_file(Path(name))
    try:
        found = None if name.startswith(".") else importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # of a package that the user's own package imports
        found = None
    except ValueError:  # a module that was put into sys.modules by hand
        found = None
    if found is None:
        raise UserError(f"There is no module {name!r}. Give a dotted module name, or a path that ends in .py.")
    return importlib.import_module(name)


def load_function(field: str, name: str) -> Any:
    """Find a user's function by "package.module.function" or "path/to/file.py:function".

    Args:
        field: the setting that names the function, for the messages.

    Raises:
        UserError: the file, the module or the function does not exist, or a file is named without a function.
    """
    if name.endswith(".py"):
        raise UserError(f"{field}: {name!r} names a file but no function in it: write {name}:function.")
    source, _, function = name.rpartition(":" if ".py:" in name else ".")
    found = getattr(load_module(source), function, None)
    if not callable(found):
        raise UserError(f"{field}: {name!r}: {source} has no function {function!r}.")
    return found


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    path = path.resolve()
    name = f"_hgpo_trl_{path.stem}_{sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file has one, and a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the module they stand in
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
