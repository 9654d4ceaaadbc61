"""README and docs name things that exist: every field with its type and default, modules, functions, files, links."""

import dataclasses
import importlib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_layout import ROOMS
from trl import ModelConfig, SFTConfig

from hgpo_trl.cli import STAGES
from hgpo_trl.evaluation.difficulty import DifficultyArguments
from hgpo_trl.scripts.baselines import BaselineArguments
from hgpo_trl.scripts.building import BuilderArguments
from hgpo_trl.scripts.card import CardArguments
from hgpo_trl.scripts.chat import ChatArguments
from hgpo_trl.scripts.compare import CompareArguments
from hgpo_trl.scripts.data_classifier import DataClassifierArguments
from hgpo_trl.scripts.data_hft import HFTDataArguments
from hgpo_trl.scripts.data_hgpo import HGPODataArguments
from hgpo_trl.scripts.data_task import DataArguments
from hgpo_trl.scripts.evaluate import EvaluateArguments
from hgpo_trl.scripts.export import ExportArguments
from hgpo_trl.scripts.hft import HFTArguments
from hgpo_trl.scripts.hgpo import HGPOArguments
from hgpo_trl.scripts.merge import MergeArguments
from hgpo_trl.scripts.model import ModelArguments
from hgpo_trl.scripts.report import ReportArguments
from hgpo_trl.scripts.rewards import RewardArguments
from hgpo_trl.training.config import HGPOConfig

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/*.md")
    for path in sorted(ROOT.glob(pattern))
}
TEXT = PAGES["docs/configuration.md"]
OURS = (
    ModelArguments,
    DataArguments,
    BuilderArguments,
    HFTDataArguments,
    DifficultyArguments,
    DataClassifierArguments,
    HFTArguments,
    HGPOArguments,
    RewardArguments,
    HGPOConfig,
    BaselineArguments,
    MergeArguments,
    EvaluateArguments,
    CompareArguments,
    ExportArguments,
    ReportArguments,
    CardArguments,
    ChatArguments,
)
OF_THE_MACHINE = {"num_processes": "all cores"}  # defaults that the code does not fix
INHERITED = "Inherited fields that matter most"

Row = dict[str, str]


def tables(heading: str) -> list[list[Row]]:
    """The tables below a heading, up to the next one: rows as {column: cell}."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    found: list[list[Row]] = []
    header: list[str] = []
    for line in section.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            header = []
        elif not header:
            header = cells
            found.append([])
        elif not set(cells[0]) <= {"-"}:
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


def unquote(cell: str) -> str:
    assert re.fullmatch(r"`[^`]+`", cell), f"{cell} should be one piece of code"
    return cell[1:-1]


def default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required" if field.default is dataclasses.MISSING else field.default


def documented_default(cell: str) -> Any:
    """A default as YAML, in which 1e-6 needs no dot here."""
    if cell == "required":
        return cell
    value = yaml.safe_load(unquote(cell))
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+e-\d+", value) else value


def type_name(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        arguments = typing.get_args(annotation)
        if types.NoneType in arguments:
            inner = [argument for argument in arguments if argument is not types.NoneType]
            return f"{' or '.join(map(type_name, inner))} or null"
        assert str in arguments
        return "float or str" if float in arguments else "str"  # an enumeration, or its value
    if typing.get_origin(annotation) is list:
        return f"list of {typing.get_args(annotation)[0].__name__}"
    return annotation.__name__


def own_fields(dataclass_type: type) -> dict[str, dataclasses.Field]:
    """What a dataclass itself declares: new fields and those whose default it changes."""
    own = inspect.get_annotations(dataclass_type)
    return {field.name: field for field in dataclasses.fields(dataclass_type) if field.name in own}


@pytest.mark.parametrize("dataclass_type", OURS, ids=lambda dataclass_type: dataclass_type.__name__)
def test_every_field_is_documented_with_its_type_and_default(dataclass_type: type) -> None:
    (rows,) = tables(dataclass_type.__name__)
    documented = {unquote(row["field"]): row for row in rows}
    assert len(documented) == len(rows)
    fields, hints = own_fields(dataclass_type), typing.get_type_hints(dataclass_type)
    assert documented.keys() == fields.keys()
    for name, row in documented.items():
        if name in OF_THE_MACHINE:
            assert row["default"] == OF_THE_MACHINE[name]
        else:
            assert documented_default(row["default"]) == default_of(fields[name]), name
        assert row["type"] == type_name(hints[name]), name
        assert row["meaning"], name


def test_the_prompt_builder_has_the_fields_of_its_two_tables_alone() -> None:
    assert HGPODataArguments.__bases__ == (DifficultyArguments, BuilderArguments)
    assert not own_fields(HGPODataArguments)


def test_inherited_defaults() -> None:
    training, model = tables(INHERITED)
    configs = {
        config: {f.name: f for f in dataclasses.fields(config)} for config in (SFTConfig, HGPOConfig, ModelConfig)
    }
    for row in training:
        name, value = unquote(row["field"]), documented_default(row["default"])
        assert default_of(configs[HGPOConfig][name]) == value, name
        if not row["meaning"].startswith("HGPO"):
            assert default_of(configs[SFTConfig][name]) == value, name
    for row in model:
        assert default_of(configs[ModelConfig][unquote(row["field"])]) == documented_default(row["default"])


@pytest.mark.parametrize("row", tables("Refused")[0], ids=lambda row: row["field"])
def test_what_is_said_to_be_refused_is(row: Row) -> None:
    name, value = unquote(row["field"]), yaml.safe_load(unquote(row["for example"]))
    with pytest.raises(ValueError, match=name):
        HGPOConfig("out", bf16=False, **{name: value})


def test_fields_named_in_the_text_exist() -> None:
    """Every `name: value` in code is a field of some stage."""
    known = {field.name for config in (*OURS, SFTConfig, ModelConfig) for field in dataclasses.fields(config)}
    named = re.findall(r"`(\w+): [^`]+`", TEXT)
    assert named
    assert set(named) <= known


def anchors(text: str) -> set[str]:
    """What a link into a Markdown page can name."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_code_exist(page: str) -> None:
    files = re.findall(
        r"(?<![\w/.-])((?:recipes|examples|benchmarks|tests|hgpo_trl)/[\w./-]+\.(?:py|md|txt|mk|yaml|jsonl|sh|slurm))\b",
        PAGES[page],
    )
    missing = [file for file in files if not (ROOT / file).is_file()]
    assert not missing


def resolve(dotted: str) -> object:
    """The module or attribute of a dotted name; raises if there is none."""
    module, _, attribute = dotted.rpartition(".")
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        return getattr(resolve(module), attribute)


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_exist(page: str) -> None:
    """Dotted names, and functions that are listed behind their module: `room/module.py`: `function`, `function`."""
    names = set(re.findall(r"\bhgpo_trl(?:\.[A-Za-z_]+)+(?![\w/*])", PAGES[page])) - {"hgpo_trl.scripts.STAGE"}
    for path, functions in re.findall(r"`((?:\w+/)+\w+)\.py`((?:[:,] `\w+`)*)", PAGES[page]):
        if (room := path.removeprefix("hgpo_trl/")).split("/")[0] in ROOMS:
            module = f"hgpo_trl.{room.replace('/', '.')}"
            names |= {module} | {f"{module}.{function}" for function in re.findall(r"`(\w+)`", functions)}
    names |= {f"hgpo_trl.{name}" for name in re.findall(r"\bHGPOTrainer\.\w+", PAGES[page])}
    for name in names:
        resolve(name)


def test_the_rooms_are_listed_in_their_order() -> None:
    (layout,) = re.findall(r"^    hgpo_trl/\n(.*?)^    recipes/", PAGES["README.md"], re.MULTILINE | re.DOTALL)
    assert re.findall(r"^ +(\w+)/ ", layout, re.MULTILINE) == list(ROOMS)
    assert re.findall(r"^\| `(\w+)/` \|", PAGES["docs/architecture.md"], re.MULTILINE) == list(ROOMS)
    assert ", ".join(ROOMS) in PAGES["CONTRIBUTING.md"].replace("\n", " ")


def test_every_command_is_listed() -> None:
    listed = set(re.findall(r"`hgpo-trl (\w+)", PAGES["docs/commands.md"]))
    assert set(STAGES) <= listed


def test_the_tables_of_the_readme_are_those_of_the_demos() -> None:
    """Seed 0 of the embedded task, then the pretrained model; the README leaves the intervals and some columns out."""
    expected = []
    for model, cells in re.findall(r"^\| 0 \| (HFT|HGPO) \| (.*) \|$", PAGES["docs/demo.md"], re.MULTILINE):
        hybrid_accuracy, accuracy, *_, tokens, think, _ = cells.split(" | ")
        expected.append([model, hybrid_accuracy, accuracy, tokens, think])
    for model, cells in re.findall(r"^\| (HFT|HGPO) \| (.*) \|$", PAGES["docs/smollm2.md"], re.MULTILINE):
        hybrid_accuracy, balanced, _, accuracy, _, always, never, tokens, _, _ = cells.split(" | ")
        expected.append([model, hybrid_accuracy, balanced, accuracy, always, never, tokens.rpartition("= ")[2]])
    short = re.findall(r"^\| ((?:HFT|HGPO) \| .*) \|$", PAGES["README.md"], re.MULTILINE)
    assert len(expected) == 4
    assert [row.split(" | ") for row in short] == [[re.sub(r" \[.*\]", "", cell) for cell in row] for row in expected]
