"""The demo: its commands for any folder of recipes, how it goes on after an interruption, and the times it shows."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hgpo_trl.common import recipe_files
from hgpo_trl.common.cores import available_cores
from hgpo_trl.common.errors import UserError
from hgpo_trl.scripts import demo

HUB_ID, BASE = "Someone/Tiny-Instruct", "runs/tiny/base"
DATA = "runs/tiny/data"
PRETRAINED: dict[str, dict[str, Any]] = {
    "model": {"hub_id": HUB_ID, "output_dir": BASE},
    "data_hft": {"tokenizer": HUB_ID, "output_dir": f"{DATA}/hft"},
    "data_hgpo": {"output_dir": f"{DATA}/hgpo"},
    "data_eval": {"decontamination": [{"path": f"{DATA}/hgpo/data"}], "output_dir": f"{DATA}/eval"},
    "hft": {"model_name_or_path": HUB_ID, "train_data": f"{DATA}/hft", "output_dir": "runs/tiny/hft"},
    "hgpo": {"model_name_or_path": "runs/tiny/hft", "train_data": f"{DATA}/hgpo", "output_dir": "runs/tiny/hgpo"},
    "evaluate": {"model": "runs/tiny/hgpo", "data": f"{DATA}/eval", "output_dir": "runs/tiny/eval/hgpo"},
    "evaluate_baselines": {"model": "runs/tiny/hft", "data": f"{DATA}/hgpo", "output_dir": "runs/tiny/samples"},
    "baselines_rft": {"samples": "runs/tiny/samples", "output_dir": "runs/tiny/baselines/rft"},
    "baselines_dpo": {"samples": "runs/tiny/samples", "output_dir": "runs/tiny/baselines/dpo"},
    "report": {
        "evaluations": ["hft=runs/tiny/eval/hft", "hgpo=runs/tiny/eval/hgpo"],
        "training_runs": ["hft=runs/tiny/hft", "hgpo=runs/tiny/hgpo"],
        "output_dir": "runs/tiny/report",
    },
}
NAMES = "model, data hft, data hgpo, data eval, train-hft, train-hgpo, evaluate hft, evaluate hgpo, report".split(", ")

Write = Callable[..., None]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Work in a folder with the recipes `tiny`, of a pretrained model; return a function that writes one anew."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes" / "tiny"
    folder.mkdir(parents=True)

    def write(name: str, **more: Any) -> None:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(PRETRAINED[name] | more), encoding="utf-8")

    for name in PRETRAINED:
        write(name)
    return write


@dataclass
class Shell:
    """Stands in for subprocess.run: notes commands and environments, and makes the folders that commands write."""

    commands: list[demo.Command]
    fails: str | None = None
    error: type[BaseException] | None = None
    seen: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    def run(self, command: list[str], env: dict[str, str]) -> Any:
        name = next(known.name for known in self.commands if known.words == command[3:])
        self.seen.append(name)
        self.env = env
        if name == self.fails:
            if self.error is not None:
                raise self.error
            return subprocess.CompletedProcess(command, returncode=3)
        folder = next(known.output_dir for known in self.commands if known.name == name)
        Path(folder).mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, returncode=0)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shell]:
    """Start the demo `tiny` without running its commands; return what would have run."""
    clock = iter(range(0, 10**6, 30))  # every command takes half a minute
    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def run(
        *words: str, recipe: str = "tiny", fails: str | None = None, error: type[BaseException] | None = None
    ) -> Shell:
        shell = Shell(demo.commands(recipe, "--baselines" in words), fails, error)
        monkeypatch.setattr(subprocess, "run", shell.run)
        if fails is None:
            demo.main(["--recipe", recipe, *words])
        else:
            with pytest.raises(SystemExit) as caught:
                demo.main(["--recipe", recipe, *words])
            assert caught.value.code == (130 if error else 3)
        return shell

    return run


# --- its commands ---------------------------------------------------------------------------------------------


def whole() -> list[tuple[str, bool]]:
    """The folders of recipes that have a demo, without and, where there are recipes for them, with baselines."""
    names = recipe_files.recipe_names(recipe_files.package_recipes())
    folders = sorted({name.partition("/")[0] for name in names if name.endswith(("/data", "/model"))})
    return [
        (folder, baselines)
        for folder in folders
        for baselines in (False, True)
        if f"{folder}/report" in names and (not baselines or f"{folder}/baselines_rft" in names)
    ]


@pytest.mark.parametrize(("recipe", "baselines"), [*whole(), ("tiny", True)])
def test_every_command_reads_what_an_earlier_one_writes(recipe: str, baselines: bool, tiny: Write) -> None:
    written: list[str] = []
    for command in demo.commands(recipe, baselines):
        named = [path for key, value in command.fields.items() if key != "output_dir" for path in demo._paths(value)]
        for path in [path for path in named if path.startswith("runs/")]:
            assert any(f"{path}/".startswith(f"{folder}/") for folder in written), (command.name, path)
        written.append(command.output_dir)
    assert f"runs/{recipe}/report" in written
    assert len(set(written)) == len(written)


def test_a_pretrained_model_comes_first_and_stands_in_for_the_hubs(tiny: Write) -> None:
    found = {command.name: command for command in demo.commands("tiny")}
    assert list(found) == NAMES
    assert found["train-hft"].words[-2:] == ["--model_name_or_path", BASE]
    assert found["data hft"].words[-2:] == ["--tokenizer", BASE]
    assert HUB_ID not in str([command.fields for command in list(found.values())[1:]])


def test_without_a_model_recipe_the_hubs_model_is_trained(tiny: Write) -> None:
    Path("recipes/tiny/model.yaml").unlink()
    found = {command.name: command for command in demo.commands("tiny")}
    assert list(found) == NAMES[1:]
    assert found["train-hft"].fields["model_name_or_path"] == HUB_ID
    assert len(found["train-hft"].words) == 3


def test_the_baselines_come_before_the_report_that_shows_them(tiny: Write) -> None:
    *_, report = found = demo.commands("tiny", baselines=True)
    assert [command.name for command in found[len(NAMES) - 1 : -1]] == [
        "sample hft", "train-rft", "evaluate rft", "train-dpo", "evaluate dpo",
    ]  # fmt: skip
    place = report.words.index("--evaluations")
    assert report.words[place + 1 :] == [f"{name}=runs/tiny/eval/{name}" for name in ("hft", "hgpo", "rft", "dpo")]


def test_recipes_that_are_missing_are_named(tiny: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no recipe chainsum/data_hft\. Name one of chain-sum, .*two-domains"):
        demo.main(["--recipe", "chainsum"])
    with pytest.raises(UserError, match=r"no recipe qwen2\.5-math-1\.5b/data_eval\."):
        demo.main(["--recipe", "qwen2.5-math-1.5b"])
    Path("recipes/tiny/hgpo.yaml").unlink()
    monkeypatch.setattr(recipe_files, "package_recipes", lambda: Path("nowhere"))
    with pytest.raises(UserError, match=r"no recipe tiny/hgpo\."):
        demo.main(["--recipe", "tiny"])


# --- going on -------------------------------------------------------------------------------------------------


def test_the_demo_ends_with_the_command_that_fails(
    tiny: Write, start: Callable[..., Shell], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(fails="data hgpo").seen == NAMES[:3]
    assert "=== data hgpo ended early; the same command goes on from here ===" in capsys.readouterr().out


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_demo_goes_on_where_it_stopped(
    name: str, error: type[BaseException] | None, tiny: Write, start: Callable[..., Shell]
) -> None:
    place = NAMES.index(name)
    assert start(fails=name, error=error).seen == NAMES[: place + 1]
    assert start().seen == NAMES[place:]
    assert start().seen == []


def test_the_times_of_all_starts_are_shown(
    tiny: Write, start: Callable[..., Shell], capsys: pytest.CaptureFixture[str]
) -> None:
    start(fails="train-hft")
    start()
    table = capsys.readouterr().out.partition("wall time")[2].splitlines()
    assert table[1].split() == ["model", "0:00:30"]
    assert table[5].split() == ["train-hft", "0:01:00", "in", "2", "starts"]
    assert table[10].split() == ["total", "0:05:00"]
    start()
    assert "=== train-hft: finished already, in 0:01:00 ===" in capsys.readouterr().out


def test_a_start_that_was_killed_counts(tiny: Write, start: Callable[..., Shell]) -> None:
    class Killed(BaseException):
        pass

    with pytest.raises(Killed):
        start(fails="train-hft", error=Killed)
    record = json.loads(Path("runs/tiny/demo.json").read_text(encoding="utf-8"))
    assert record["train-hft"]["starts"] == 1
    assert not record["train-hft"]["finished"]


def remove_later_results(repeated: list[str]) -> None:
    """Remove the folders that the demo names before it runs anything: those of later commands, but for the report."""
    folders = {command.name: command.output_dir for command in demo.commands("tiny")}
    later = [folders[name] for name in repeated[1:] if name != "report"]
    if later:
        before = Path("runs/tiny/demo.json").read_text(encoding="utf-8")
        with pytest.raises(UserError, match=f"were made from it: {' '.join(later)}\\. Remove them"):
            demo.main(["--recipe", "tiny"])
        assert Path("runs/tiny/demo.json").read_text(encoding="utf-8") == before
    for folder in later:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("changed", "repeated"),
    [
        ("report", ["report"]),
        ("hgpo", ["train-hgpo", "evaluate hgpo", "report"]),
        ("data_hgpo", ["data hgpo", "data eval", "train-hgpo", "evaluate hft", "evaluate hgpo", "report"]),
        ("data_eval", ["data eval", "evaluate hft", "evaluate hgpo", "report"]),
        ("model", ["model", "data hft", *NAMES[4:]]),
    ],
)
def test_what_reads_from_a_changed_command_is_repeated(
    changed: str, repeated: list[str], tiny: Write, start: Callable[..., Shell]
) -> None:
    start()
    tiny(changed, seed=1)
    remove_later_results(repeated)
    first = start(fails=repeated[0])
    assert first.seen == repeated[:1]
    assert start().seen == repeated  # even where the change is known from a start before


def test_what_reads_from_a_removed_folder_is_repeated(tiny: Write, start: Callable[..., Shell]) -> None:
    start()
    shutil.rmtree("runs/tiny/hgpo")
    remove_later_results(["train-hgpo", "evaluate hgpo", "report"])
    assert start().seen == ["train-hgpo", "evaluate hgpo", "report"]


def test_baselines_of_an_earlier_start_are_repeated(tiny: Write, start: Callable[..., Shell]) -> None:
    """Even if Stage I has run again in a start without them."""
    everything = start("--baselines").seen
    tiny("hft", seed=1)
    later = [command.output_dir for command in demo.commands("tiny", baselines=True)[5:-1]]
    with pytest.raises(UserError, match=f"were made from it: {' '.join(later)}\\. Remove them"):
        demo.main(["--recipe", "tiny"])
    for folder in later:
        shutil.rmtree(folder)
    assert start().seen == NAMES[4:]
    assert start("--baselines").seen == everything[8:], "the samples, both baselines, their evaluations, the report"
    assert start("--baselines").seen == []


def test_a_comment_repeats_nothing(tiny: Write, start: Callable[..., Shell]) -> None:
    start()
    path = Path("recipes/tiny/hft.yaml")
    path.write_text(f"# Stage I.\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    assert start().seen == []


# --- its environment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "threads"), [("chain-sum", 1), ("tiny", available_cores())])
def test_threads_fit_the_model(
    recipe: str, threads: int, tiny: Write, start: Callable[..., Shell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert start(recipe=recipe).env["OMP_NUM_THREADS"] == str(threads)


def test_the_environment_gives_way_to_the_users(
    tiny: Write, start: Callable[..., Shell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    env = start().env
    assert (env["OMP_NUM_THREADS"], env["TOKENIZERS_PARALLELISM"]) == ("4", "false")
    assert env.keys() >= os.environ.keys()
