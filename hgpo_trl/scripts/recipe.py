"""Recipes: a flat YAML file of the fields of a stage's dataclasses; the command line overrides it."""

import argparse
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, NoReturn

import yaml
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from trl import TrlParser

from hgpo_trl.common.environment import set_env
from hgpo_trl.common.errors import did_you_mean, refuse
from hgpo_trl.common.files import expand_paths
from hgpo_trl.common.recipe_files import find_recipe, nearest_recipe

# Names, current or former, that TRL, Transformers or TRL's scripts use for our fields; for hints.
_RENAMED = {
    "dataset_name": "train_data",
    "dataset_test_split": "eval_split",
    "dataset_train_split": "train_split",
    "epsilon_low": "epsilon",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy",
    "max_new_tokens": "max_completion_length",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "model_name_or_path": "model",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation",
    "use_lora": "use_peft",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "warmup_ratio": "warmup_steps",
}

AUTO = "auto"
Resolve = Callable[[argparse.Namespace], Any]


class _Switch(str):
    """A plain yes, no, on or off: a boolean where the field takes one, else the word itself."""

    __slots__ = ()

    @property
    def on(self) -> bool:
        return self.lower() in ("yes", "on")


class _Loader(yaml.SafeLoader):
    """Read plain values as YAML 1.2 does, and as people do; refuse a key that is there twice.

    PyYAML follows YAML 1.1: 010 is 8 and 1:30 is 90, 1e-4 is text, 2026-11-25 is a date, and the words yes, no, on and
    off are booleans. Beyond YAML 1.2, 1_000 is a number and None is null, as in Python.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[str] = []
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = node.value
    if re.match("[-+]?0[xob]", text):
        return int(text, 0)
    try:
        return int(text)
    except ValueError:
        return float(re.sub(r"\.(?=[in])", "", text.lower()))  # .inf and .nan


_DIGITS = r"\d+(?:_\d+)*"
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("!switch", r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", list("yYnNoO")),
    ("!number", rf"[-+]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?\d+)?", list("-+.0123456789")),
    ("!number", r"[-+]?0(?:x[0-9a-fA-F]+|o[0-7]+|b[01]+)|[-+]?\.(?:inf|Inf|INF)|\.nan|\.NaN|\.NAN", list("-+.0")),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("!number", _number)
_Loader.add_constructor("!switch", lambda loader, node: _Switch(node.value))


class RecipeParser(TrlParser):
    """A TrlParser that explains every fault of a recipe.

    Every error ends the program with status 2 and one message: a file that does not exist or is not a mapping, an
    unknown key (with the nearest valid one), a value of the wrong type, a combination that a dataclass refuses.
    In every value, of the recipe and of the command line, `~` and `$NAME` in a path are replaced (`expand_path`).

    Args:
        automatic: fields that may be `auto`, each with a function of all fields (a Namespace) that finds its value.
    """

    def __init__(self, dataclass_types: Any, prog: str, automatic: Mapping[str, Resolve] | None = None) -> None:
        self.automatic = automatic or {}
        description = "--config RECIPE.yaml, a flat YAML file, sets any of these fields; the command line overrides it."
        super().__init__(dataclass_types, prog=prog, description=description, allow_abbrev=False)
        types = self._types()
        for action in self._actions:
            annotation = types.get(action.dest)
            if action.dest in self.automatic:
                action.type = _or_auto(action.type)
            elif annotation == float | str:
                action.type = _number_or_text  # HfArgumentParser takes numbers alone
            elif getattr(action.type, "__name__", None) == "dict":  # perhaps within a function that takes None, too
                action.type = _mapping
            elif _takes_mapping(annotation):
                action.type = _mapping_or_text
            elif action.type is str and _takes_null(annotation, action.default):
                action.type = _text_or_null

    def error(self, message: str) -> NoReturn:
        """One message, without argparse's usage, which for a trainer's fields is hundreds of lines."""
        refuse(self.prog, message)

    def parse_recipe(self, args: Sequence[str]) -> tuple[Any, ...]:
        """Parse `--config recipe.yaml` and overrides into one instance per dataclass."""
        config_parser = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        config_parser.add_argument("--config")
        known, rest = config_parser.parse_known_args(args)
        try:
            if known.config is not None:
                self.set_defaults_with_config(**self._read(known.config))
            *parsed, unknown = self.parse_args_into_dataclasses(rest, return_remaining_strings=True)
        except ValueError as error:  # of ours, or of TRL's and Transformers' own checks of their fields
            self.error(str(error))
        if unknown:
            name, dashes = unknown[0].partition("=")[0], "--"
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}{_did_you_mean(name, options, dashes)}")
        return tuple(parsed)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """argparse's, with paths expanded before a dataclass looks at them, whether recipe or command line has them."""
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            setattr(namespace, name, None if value == [None] else expand_paths(name, value))
        for name, resolve in self.automatic.items():
            if getattr(namespace, name) == AUTO:
                setattr(namespace, name, resolve(namespace))
        return namespace, rest

    def _types(self) -> dict[str, Any]:
        """The type of every field."""
        types: dict[str, Any] = {}
        for dataclass_type in self.dataclass_types:
            types |= typing.get_type_hints(dataclass_type)
        return types

    def _read(self, name: str) -> dict[str, Any]:
        """Read a recipe's fields, each of its dataclass's type, and set the environment variables of its `env`."""
        file = find_recipe(name)
        if file is None:
            nearest = nearest_recipe(name)
            hint = f"; did you mean {nearest!r}?" if nearest else ""
            self.error(f"--config {name}: there is no such recipe{hint} (`hgpo-trl recipes` lists them)")
        path = str(file)
        try:
            text = file.read_text(encoding="utf-8")
            recipe = yaml.load(text, _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{path} is not valid YAML: {error}")
        if not isinstance(recipe, dict):
            self.error(f"{path} must be a mapping of keys to values; it is {type(recipe).__name__}")
        env = recipe.pop("env", {})
        if not isinstance(env, dict):
            self.error(f"{path}: env={env!r} must be a mapping of environment variables to values")
        if env:
            set_env(path, yaml.load(text, yaml.BaseLoader)["env"])

        types = self._types()
        actions = {action.dest: action for action in reversed(self._actions) if action.dest != "help"}
        for key, value in recipe.items():
            if key not in actions:
                self.error(f"{path}: unknown key {key!r}{_did_you_mean(str(key), actions)}")
            default, choices = actions[key].default, actions[key].choices
            if value is None and default == "none":
                value = default
            elif isinstance(value, str) and _is_null(value) and _takes_null(types[key], default):
                value = None
            try:
                if not (value == AUTO and key in self.automatic):
                    recipe[key] = value = _of_type(value, types[key])
            except ValueError as error:
                self.error(f"{path}: {key}={value!r} has the wrong type: {error}")
            if choices and value is not None and value not in choices:
                self.error(f"{path}: {key} must be one of {', '.join(map(str, choices))}; got {value!r}")
        return recipe


# --- the command line -----------------------------------------------------------------------------------------


def _mapping(text: str) -> dict[str, Any] | None:
    """A mapping on the command line, as in a recipe (YAML, of which JSON is a part), or null."""
    try:
        value = None if _is_null(text) else _as_booleans(yaml.load(text, _Loader))
    except yaml.YAMLError:
        value = text
    if not isinstance(value, dict | None):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping; write it as in a recipe: '{{key: value}}'")
    if unspaced := [key for key, item in (value or {}).items() if item is None and ":" in str(key)]:
        raise argparse.ArgumentTypeError(f"{text!r}: write a space behind the colon of {unspaced[0]!r}")
    return value


def _mapping_or_text(text: str) -> dict[str, Any] | str | None:
    """A mapping in braces, or other text, such as a file's name."""
    return _mapping(text) if text.lstrip().startswith("{") else _text_or_null(text)


def _or_auto(convert: Any) -> Callable[[str], Any]:
    """A field's own conversion, which `auto` passes by."""
    return lambda word: word if word == AUTO else convert(word)


def _number_or_text(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _text_or_null(word: str) -> str | None:
    return None if _is_null(word) else word


# --- values ---------------------------------------------------------------------------------------------------


def _did_you_mean(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """A hint at the candidate that was meant: by its former name, else by its spelling."""
    candidates = list(candidates)
    renamed = f"{prefix}{_RENAMED.get(name.removeprefix(prefix))}"
    if renamed in candidates:
        return f"; did you mean {renamed!r}?"
    return did_you_mean(name, candidates, otherwise="", cutoff=0.5)


def _is_null(word: str) -> bool:
    """Whether a word means null."""
    return word.lower() in ("none", "null")


def _takes_mapping(annotation: Any) -> bool:
    """Whether a field may be a mapping."""
    return any(dict in (kind, typing.get_origin(kind)) for kind in (annotation, *typing.get_args(annotation)))


def _takes_null(annotation: Any, default: Any) -> bool:
    """Whether a field may be null. Where its default is the text none, as of `report_to`, that is another value."""
    return NoneType in typing.get_args(annotation) and default != "none"


def _of_type(value: Any, annotation: Any) -> Any:
    """Convert a YAML value to a field's type: numeric text becomes a number, 4.0 becomes 4 for an integer field.

    A single value where the field takes a list of them becomes a list of one.

    Raises:
        ValueError: the value is of another type; the message says which one is wanted.
    """
    try:
        adapter = TypeAdapter(annotation, config={"arbitrary_types_allowed": True})
    except PydanticSchemaGenerationError:
        return value  # pydantic cannot describe the type: argparse checks it
    for reading in (_as_booleans(value), value):
        try:
            return _converted(adapter, reading)
        except ValueError as error:
            problem = str(error)
    try:
        list_of_one = _converted(adapter, [value])
    except ValueError:
        raise ValueError(f"{problem}{_advice(value)}") from None
    if isinstance(value, str) and "," in value:
        raise ValueError(f"{problem} (several values are written [{', '.join(map(str.strip, value.split(',')))}])")
    return list_of_one


def _as_booleans(value: Any) -> Any:
    """The value with booleans for yes, no, on and off."""
    match value:
        case _Switch():
            return value.on
        case list():
            return [_as_booleans(item) for item in value]
        case dict():
            return {key: _as_booleans(item) for key, item in value.items()}
    return value


def _converted(adapter: TypeAdapter, value: Any) -> Any:
    """The value as pydantic reads it; ValueError if it has another type, or if pydantic reads it too freely."""
    try:
        converted = adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError("; ".join(sorted({detail["msg"] for detail in error.errors()}))) from None
    for before, after in _leaves(value, converted):
        if isinstance(before, bool) and not isinstance(after, bool):  # for Python, and for pydantic, True is 1
            raise ValueError("Input should be a number")
        if isinstance(before, str) and isinstance(after, int | float) and not isinstance(after, bool):
            try:
                float(before)  # pydantic drops every underscore: 5e_6 would be 5,000,000
            except ValueError:
                raise ValueError("Input should be a valid number, unable to parse string as a number") from None
    return converted


def _leaves(before: Any, after: Any) -> Iterator[tuple[Any, Any]]:
    """The single values of nested lists and mappings, before and after the conversion."""
    if isinstance(before, list) and isinstance(after, list):
        for pair in zip(before, after, strict=True):
            yield from _leaves(*pair)
    elif isinstance(before, dict) and isinstance(after, dict):
        for pair in zip(before.values(), after.values(), strict=True):
            yield from _leaves(*pair)
    else:
        yield before, after


def _advice(value: Any) -> str:
    """Suggest a correction of a value of the wrong type, if there is an obvious one."""
    match value:
        case bool() | int() | float():
            return " (text needs quotes)"
        case None:
            return " (YAML reads ~ and nothing at all as null)"
        case str() if percent := re.fullmatch(r"\s*(\d+\.?\d*)\s*%", value):
            return f" (write {value.strip()} as {float(percent[1]) / 100:g})"
        case str() if number := re.fullmatch(r"([-+]?\d+\.?\d*)[eE]_(\d+)", value):
            return f" (is {number[1]}e-{number[2]} meant?)"
        case str() if re.fullmatch(r"\d{1,3}(,\d{3})+", value):
            return f" (write {value} as {value.replace(',', '_')})"
    return ""
