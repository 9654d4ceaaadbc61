"""Recipes: a flat YAML file of the fields of a stage's dataclasses; the command line overrides it."""

import argparse
import difflib
import json
import os
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from trl import TrlParser


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does; PyYAML asks for 1.0e-4. A key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[str] = []
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


class RecipeParser(TrlParser):
    """TrlParser that explains what is wrong with a recipe instead of passing it on.

    Every error ends the program with status 2 and one message: a file that does not exist or is not a mapping, an
    unknown key (with the nearest valid one), a value of the wrong type, a combination that a dataclass refuses.
    """

    def __init__(self, dataclass_types: Any, prog: str) -> None:
        description = "--config RECIPE.yaml, a flat YAML file, sets any of these fields; the command line overrides it."
        super().__init__(dataclass_types, prog=prog, description=description, allow_abbrev=False)
        for action in self._actions:
            if getattr(action.type, "__name__", None) == "dict":  # perhaps within a function that takes None, too
                action.type = _mapping

    def error(self, message: str) -> NoReturn:
        """One message, without argparse's usage, which for a trainer's fields is hundreds of lines."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_recipe(self, args: Sequence[str]) -> tuple[Any, ...]:
        """Parse `--config recipe.yaml` and overrides into one instance per dataclass."""
        config_parser = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        config_parser.add_argument("--config")
        known, rest = config_parser.parse_known_args(args)
        if known.config is not None:
            self.set_defaults_with_config(**self._read(known.config))
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(rest, return_remaining_strings=True)
        except (ValueError, TypeError) as error:
            self.error(str(error))
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}{_nearest(unknown[0].partition('=')[0], options)}")
        return tuple(parsed)

    def _read(self, path: str) -> dict[str, Any]:
        """The recipe's fields, each of its dataclass's type; `env` is put into the environment."""
        if not Path(path).is_file():
            recipes = map(str, Path("recipes").glob("*/*.yaml"))
            self.error(f"--config {path}: there is no such recipe{_nearest(path, recipes)}")
        try:
            recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{path} is not valid YAML: {error}")
        if not isinstance(recipe, dict):
            self.error(f"{path} must be a mapping of keys to values; it is {type(recipe).__name__}")
        env = recipe.pop("env", {})
        if not isinstance(env, dict):
            self.error(f"{path}: env={env!r} must be a mapping of environment variables to values")
        os.environ.update({str(name): str(value) for name, value in env.items()})

        types: dict[str, Any] = {}
        for dataclass_type in self.dataclass_types:
            types |= typing.get_type_hints(dataclass_type)
        fields = {action.dest for action in self._actions} - {"help"}
        for key, value in recipe.items():
            if key not in fields:
                self.error(f"{path}: unknown key {key!r}{_nearest(str(key), fields)}")
            try:
                recipe[key] = _of_type(value, types[key])
            except ValueError as error:
                self.error(f"{path}: {key}={value!r} has the wrong type: {error}")
        return recipe


def _mapping(text: str) -> dict[str, Any] | None:
    """A mapping on the command line, or null."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if not isinstance(value, dict | None):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping in JSON")
    return value


def _nearest(name: str, candidates: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _of_type(value: Any, annotation: Any) -> Any:
    """A YAML value as a field's type: text that reads as a number becomes one, 4.0 becomes 4 where that is asked for.

    Raises:
        ValueError: the value is of another type; the message says which one is wanted.
    """
    try:
        converted = TypeAdapter(annotation, config={"arbitrary_types_allowed": True}).validate_python(value)
    except PydanticSchemaGenerationError:
        return value  # a type that pydantic cannot describe: left to argparse
    except ValidationError as error:
        problem = "; ".join(sorted({detail["msg"] for detail in error.errors()}))
    else:
        if not isinstance(value, bool) or isinstance(converted, bool):
            return converted
        problem = "Input should be a number"  # for Python, and for pydantic, True is 1
    hint = " (YAML reads yes, no, on and off as booleans; text needs quotes)" if isinstance(value, bool) else ""
    raise ValueError(problem + hint)
