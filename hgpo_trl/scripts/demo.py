"""`hgpo-trl demo`: run the whole method on one folder of recipes, in the current folder.

The model (if the folder has `model.yaml`), the data, Stage I, Stage II, the evaluation of both models and the report,
each in a process of its own, on the CPU or on one GPU. What they write is in `runs/RECIPE`. The same command goes on
after an interruption: finished commands are not repeated, and `runs/RECIPE/demo.json` has the wall time of each.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from hgpo_trl.common.cores import available_cores
from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.common.files import write_json
from hgpo_trl.common.recipe_files import find_recipe, package_recipes, recipe_names

_RECORD = "demo.json"
_REPORT = ("report",)  # it writes its folder anew
_BASELINES = {"sample hft", "train-rft", "train-dpo"}  # only with --baselines
_NEEDED = ("hft", "hgpo", "evaluate", "report")
_PRETRAINED_DATA = ("data_hft", "data_hgpo", "data_eval")  # questions of the former are kept out of the evaluation's


@dataclass(frozen=True)
class Command:
    """One command of the demo.

    Args:
        name: what the heading and the table of times call it.
        stage: words after `hgpo-trl`: a stage, and its kind.
        recipe: path of its recipe.
        overrides: fields that the command line gives.
    """

    name: str
    stage: tuple[str, ...]
    recipe: Path
    overrides: dict[str, str | list[str]] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The words after `hgpo-trl`."""
        words = [*self.stage, "--config", str(self.recipe)]
        for name, value in self.overrides.items():
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
        return words

    @property
    def fields(self) -> dict[str, Any]:
        """The recipe's fields, those of the command line included."""
        return _fields(self.recipe) | self.overrides

    @property
    def output_dir(self) -> str:
        return str(self.fields.get("output_dir", ""))

    def reads(self, other: "Command") -> bool:
        """Whether a field names something in the folder that another command writes."""
        folder = f"{other.output_dir}/"
        return folder != "/" and any(f"{text}/".startswith(folder) for text in _paths(self.fields))


def _fields(recipe: Path) -> dict[str, Any]:
    """A recipe's fields; none if it cannot be read, which its stage reports."""
    try:
        fields = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _paths(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings; the folder of NAME=FOLDER."""
    match value:
        case str():
            yield value.rpartition("=")[2]
        case list():
            for item in value:
                yield from _paths(item)
        case dict():
            for item in value.values():
                yield from _paths(item)


def commands(recipe: str, baselines: bool = False) -> list[Command]:
    """The commands of the demo, in order.

    With a `model.yaml`, every field that names its `hub_id` gets the folder that it writes: Stage I's
    `model_name_or_path`, the data's `tokenizer`.

    Args:
        recipe: folder of recipes, such as `chain-sum`.
        baselines: also train and evaluate HFT-RFT and HFT-DPO.

    Raises:
        UserError: a command has no recipe there.
    """
    found = list(_commands(recipe, baselines))
    if found[0].stage != ("model",):
        return found
    model, *others = found
    return [model, *(_from_folder(command, str(model.fields.get("hub_id")), model.output_dir) for command in others)]


def _from_folder(command: Command, hub_id: str, folder: str) -> Command:
    """The command with a folder in every field that names the hub's model."""
    named = {name: folder for name, value in command.fields.items() if value == hub_id}
    return replace(command, overrides={**command.overrides, **named})


def _commands(recipe: str, baselines: bool) -> Iterator[Command]:
    run = Path("runs") / recipe
    if (path := find_recipe(f"{recipe}/model")) is not None:
        yield Command("model", ("model",), path)
    for stem in _data_recipes(recipe):
        yield Command(stem.replace("_", " "), ("data",), _recipe(recipe, stem))
    paths = {stage: _recipe(recipe, stage) for stage in _NEEDED}
    yield Command("train-hft", ("hft",), paths["hft"])
    yield Command("train-hgpo", ("hgpo",), paths["hgpo"])

    def evaluate(name: str, model: Path) -> Command:
        folders: dict[str, str | list[str]] = {"model": str(model), "output_dir": str(run / "eval" / name)}
        return Command(f"evaluate {name}", ("evaluate",), paths["evaluate"], folders)

    evaluations = [evaluate(name, run / name) for name in ("hft", "hgpo")]
    yield from evaluations
    report = Command("report", _REPORT, paths["report"])
    if baselines:
        yield Command("sample hft", ("evaluate",), _recipe(recipe, "evaluate_baselines"))
        for kind in ("rft", "dpo"):
            yield Command(f"train-{kind}", ("baselines", kind), _recipe(recipe, f"baselines_{kind}"))
            yield evaluate(kind, run / "baselines" / kind)
        further = [f"{kind}={run / 'eval' / kind}" for kind in ("rft", "dpo")]
        report = replace(report, overrides={"evaluations": [*report.fields.get("evaluations", []), *further]})
    yield report


def _data_recipes(recipe: str) -> list[str]:
    """The names of a folder's data recipes: `data` alone for an embedded task, else `data_KIND`, in order."""
    if find_recipe(f"{recipe}/data") is not None:
        return ["data"]
    return list(_PRETRAINED_DATA)


def _recipe(recipe: str, stem: str) -> Path:
    path = find_recipe(f"{recipe}/{stem}")
    if path is None:
        names = recipe_names(package_recipes())
        whole = sorted(
            folder
            for folder in {name.partition("/")[0] for name in names}
            if all(f"{folder}/{stage}" in names for stage in _NEEDED)
            and (f"{folder}/data" in names or all(f"{folder}/{part}" in names for part in _PRETRAINED_DATA))
        )
        raise UserError(f"--recipe {recipe}: there is no recipe {recipe}/{stem}. Name one of {', '.join(whole)}.")
    return path


# --- running --------------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    """What `demo.json` has about a command."""

    digest: str  # of the command and its recipe
    seconds: float = 0.0
    starts: int = 0
    finished: bool = False


def _digest(command: Command) -> str:
    """A digest that changes with the command and its recipe's fields."""
    text = json.dumps([command.stage, command.fields], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def dependents(demo: list[Command], command: Command) -> list[Command]:
    """The later commands that read what a command writes, or what another of them does."""
    found = [command]
    place = [one.name for one in demo].index(command.name)
    for later in demo[place + 1 :]:
        if any(later.reads(one) for one in found):
            found.append(later)
    return found[1:]


def _outdated(command: Command, entry: _Entry) -> bool:
    """Whether a command has to run afresh: its recipe has changed, or what it has written is gone."""
    removed = entry.finished and not Path(command.output_dir).is_dir()
    return removed or entry.digest != _digest(command)


def _check_results(demo: list[Command], entries: dict[str, _Entry]) -> None:
    """Refuse results of what an outdated command wrote before: their own commands would take them for finished.

    An outdated command sees for itself whether it can go on in its own folder.

    Raises:
        UserError: it names the folders.
    """
    outdated = [command for command in demo if command.name in entries and _outdated(command, entries[command.name])]
    for command in outdated:
        later = [one for one in dependents(demo, command) if one.name in entries and one.stage != _REPORT]
        if folders := [one.output_dir for one in later if Path(one.output_dir).is_dir()]:
            raise UserError(
                f"{command.recipe} has changed, or {command.output_dir} is gone, since these folders were made from "
                f"it: {' '.join(folders)}. Remove them, undo the change, or copy the recipes to another folder."
            )


def _environment(recipe: str) -> dict[str, str]:
    """Environment of the commands, below the user's own and that of the recipes.

    OpenMP threads only wait for each other in a model of a hundred thousand parameters; a pretrained model gains.
    """
    threads = 1 if find_recipe(f"{recipe}/data") is not None else available_cores()
    defaults = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0"}
    return defaults | os.environ


def _load(record: Path) -> dict[str, _Entry]:
    if not record.is_file():
        return {}
    return {name: _Entry(**entry) for name, entry in json.loads(record.read_text(encoding="utf-8")).items()}


def _save(record: Path, entries: dict[str, _Entry]) -> None:
    write_json(record, {name: asdict(entry) for name, entry in entries.items()})


def _run(command: Command, entry: _Entry, env: dict[str, str]) -> int:
    """Run a command and add its time to its entry; return its exit status, 130 after Ctrl-C."""
    began = time.monotonic()
    try:
        done = subprocess.run([sys.executable, "-m", "hgpo_trl.cli", *command.words], env=env)
    except KeyboardInterrupt:
        return 130
    finally:
        entry.seconds += time.monotonic() - began
    entry.finished = done.returncode == 0
    return done.returncode


def clock(seconds: float) -> str:
    """75.2 -> "0:01:15" """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def times(entries: dict[str, _Entry]) -> str:
    """The table of wall times; commands that were interrupted show how often they were started."""
    rows = [
        (name, clock(entry.seconds), f"  in {entry.starts} starts" if entry.starts > 1 else "")
        for name, entry in entries.items()
    ]
    rows = [("command", "wall time", ""), *rows, ("total", clock(sum(e.seconds for e in entries.values())), "")]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {taken:>9}{note}" for name, taken, note in rows)


def main(argv: Sequence[str]) -> None:
    """Run the demo's commands that are not finished; the first one that fails ends it, with its status."""
    parser = argparse.ArgumentParser("hgpo-trl demo", allow_abbrev=False, description=__doc__)
    parser.add_argument("--recipe", default="chain-sum", help="folder of recipes; default: chain-sum")
    parser.add_argument("--baselines", action="store_true", help="also train and evaluate HFT-RFT and HFT-DPO")
    args = parser.parse_args(argv)
    demo = commands(args.recipe, args.baselines)
    env = _environment(args.recipe)
    record = Path("runs") / args.recipe / _RECORD
    entries = _load(record)
    # Baselines of an earlier start read what changes, too.
    known = commands(args.recipe, baselines=True) if entries.keys() & _BASELINES else demo
    _check_results(known, entries)
    for command in demo:
        name = command.name
        entry = entries.get(name)
        if entry is None or _outdated(command, entry):
            entry = entries[name] = _Entry(_digest(command))
        if entry.finished:
            print(f"\n=== {name}: finished already, in {clock(entry.seconds)} ===", flush=True)
            continue
        print(f"\n=== {name} ===", flush=True)
        entry.starts += 1
        for later in dependents(known, command):
            entries.pop(later.name, None)
        _save(record, entries)  # even if this process is killed
        status = _run(command, entry, env)
        _save(record, entries)
        if status:
            print(f"\n=== {name} ended early; the same command goes on from here ===", flush=True)
            sys.exit(status)
        print(f"=== {name}: {clock(entry.seconds)} ===", flush=True)
    print(f"\n{times({command.name: entries[command.name] for command in demo})}")
    print(f"\nRead runs/{args.recipe}/report/report.html. To run the demo afresh, remove runs/{args.recipe}.")


if __name__ == "__main__":
    run_stage(main, "demo", sys.argv[1:])
