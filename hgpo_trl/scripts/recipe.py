"""Recipes: a flat YAML file of the fields of a stage's dataclasses; the command line overrides it."""

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from trl import TrlParser


class RecipeParser(TrlParser):
    """TrlParser that explains what is wrong with a recipe instead of passing it on.

    Every error ends the program with status 2 and one message: a file that does not exist or is not a mapping, an unknown
    key (with the nearest valid one), a value of the wrong type, a combination that a dataclass refuses.
    """

    def parse_recipe(self, args: Sequence[str]) -> tuple[Any, ...]:
        """Parse `--config recipe.yaml` and overrides into one instance per dataclass."""
        args = list(args)
        for path in self._config_paths(args):
            self._check_file(path)
        try:
            return self.parse_args_and_config(args)
        except (ValueError, TypeError) as error:
            self.error(str(error))

    def _config_paths(self, args: list[str]) -> list[str]:
        """The value of --config, also where it is written --config=PATH, which TrlParser does not read."""
        for index, arg in enumerate(args):
            if arg.startswith("--config="):
                args[index : index + 1] = ["--config", arg.removeprefix("--config=")]
        if "--config" not in args:
            return []
        index = args.index("--config")
        if index + 1 == len(args):
            self.error("--config needs a path to a recipe")
        return [args[index + 1]]

    def _check_file(self, path: str) -> None:
        if not Path(path).is_file():
            self.error(f"--config {path}: there is no such recipe{_nearest(path, map(str, Path('recipes').glob('*/*.yaml')))}")
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            self.error(f"{path} is not valid YAML: {error}")
        if not isinstance(recipe, dict):
            self.error(f"{path} must be a mapping of keys to values; it is {type(recipe).__name__}")
        types: dict[str, Any] = {}
        for dataclass_type in self.dataclass_types:
            types |= typing.get_type_hints(dataclass_type)
        fields = {action.dest for action in self._actions}
        for key, value in recipe.items():
            if key == "env":  # environment variables, which TrlParser sets
                continue
            if key not in fields:
                self.error(f"{path}: unknown key {key!r}{_nearest(key, fields)}")
            if problem := _type_problem(value, types.get(key, Any)):
                self.error(f"{path}: {key}={value!r} has the wrong type: {problem}")


def _nearest(name: str, candidates: Any) -> str:
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _type_problem(value: Any, annotation: Any) -> str | None:
    """What is wrong with a YAML value for a field of this type; None if nothing is. Text that reads as a number is one."""
    try:
        TypeAdapter(annotation, config={"arbitrary_types_allowed": True}).validate_python(value)
    except PydanticSchemaGenerationError:
        return None  # a type that pydantic cannot describe: left to argparse
    except ValidationError as error:
        return "; ".join(sorted({detail["msg"] for detail in error.errors()}))
    return None
