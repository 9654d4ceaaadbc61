"""Whose results an output directory holds, and where a run goes on."""

import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import ModelConfig, SFTConfig

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import write_json
from hgpo_trl.training.checkpoints import SEAL, agreed_step, last_checkpoint, seal
from hgpo_trl.training.run_dir import RUN_FILE, claim_run_dir, describe_run


@dataclass
class DataArguments:
    train_data: str = "train.parquet"
    eval_data: str | None = None


def claim(directory: Path, stage: str = "hft", data: DataArguments | None = None, **fields: Any) -> str | None:
    config = SFTConfig(output_dir=str(directory), bf16=False, use_cpu=True, **fields)
    return claim_run_dir(stage, config, data or DataArguments())


def checkpoint(directory: Path, step: int, complete: bool = True, optimizer: str | None = "scheduler.pt") -> str:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"half")
    if optimizer is not None:
        (path / optimizer).write_bytes(b"")
    (path / "trainer_state.json").write_text("{}", encoding="utf-8")
    if complete:
        seal(path)
    return str(path)


def read_run(directory: Path) -> dict[str, Any]:
    return json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))


def test_fresh_directory_is_claimed(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "run"
    assert claim(directory, learning_rate=3e-4) is None
    run = read_run(directory)
    assert (run["stage"], run["learning_rate"], run["train_data"]) == ("hft", 3e-4, "train.parquet")


def test_an_infinite_setting_is_noted_in_valid_json(tmp_path: Path) -> None:
    """And recognised when the run goes on."""
    assert claim(tmp_path, max_grad_norm=math.inf) is None

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    run = json.loads((tmp_path / RUN_FILE).read_text(encoding="utf-8"), parse_constant=refuse)
    assert run["max_grad_norm"] == "Infinity"
    last = checkpoint(tmp_path, 1)
    assert claim(tmp_path, max_grad_norm=math.inf) == last


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_only_json_is_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"deep": [value]})
    assert list(tmp_path.iterdir()) == []


def test_claim_without_results_can_be_changed(tmp_path: Path) -> None:
    """A run that ended before its first checkpoint has left nothing to protect."""
    claim(tmp_path, learning_rate=1e-3)
    assert claim(tmp_path, learning_rate=2e-3) is None
    assert read_run(tmp_path)["learning_rate"] == 2e-3


def test_same_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    claim(tmp_path)
    checkpoint(tmp_path, 9)
    last = checkpoint(tmp_path, 100)  # by number, not by name
    checkpoint(tmp_path, 20)
    assert claim(tmp_path) == last


def test_torn_checkpoints_are_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    claim(tmp_path)
    torn = {9: "older than the whole one, so nobody asks"}
    checkpoint(tmp_path, 9, complete=False)
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, complete=False)
    torn[20] = f"it has no {SEAL}: the run ended while it was written"
    (Path(checkpoint(tmp_path, 30)) / "model.safetensors").unlink()
    torn[30] = "model.safetensors is missing"
    (Path(checkpoint(tmp_path, 40)) / "model.safetensors").write_bytes(b"longer than before")
    torn[40] = "model.safetensors has 18 bytes instead of 4"
    (tmp_path / "checkpoint-50").mkdir()
    seal(tmp_path / "checkpoint-50")
    torn[50] = "trainer_state.json is missing"
    (tmp_path / "checkpoint-60").write_text("a file", encoding="utf-8")
    Path(checkpoint(tmp_path, 70)).rename(tmp_path / "checkpoint-best")
    expected = {str(tmp_path / f"checkpoint-{step}"): what for step, what in torn.items() if step > 10}
    assert last_checkpoint(tmp_path) == (whole, expected)
    assert claim(tmp_path) == whole
    for path, what in expected.items():
        assert f"{path} is torn and skipped: {what}." in caplog.text
    assert "checkpoint-9 " not in caplog.text


steps_of_a_process = st.dictionaries(st.sampled_from([10, 20, 30]), st.sampled_from([None, "torn"]))


@given(found=st.lists(steps_of_a_process, min_size=1, max_size=4))
def test_processes_agree_on_the_newest_that_is_whole_for_all(found: list[dict[int, str | None]]) -> None:
    """Each may see another folder. What some have and no checkpoint of all is never thrown away in silence."""
    whole = [[step for step, what in of.items() if what is None] for of in found]
    common = [step for step in (10, 20, 30) if all(step in steps for steps in whole)]
    if common or not any(whole):
        assert agreed_step(found) == max(common, default=None)
        return
    newest = max(step for steps in whole for step in steps)
    lacking = ", ".join(str(process) for process, steps in enumerate(whole) if newest not in steps)
    with pytest.raises(
        UserError, match=rf"checkpoint-{newest} is for .* is not for process {lacking} \((torn|it is not there)"
    ):
        agreed_step(found)


def test_only_a_torn_checkpoint_starts_afresh(tmp_path: Path) -> None:
    claim(tmp_path)
    checkpoint(tmp_path, 10, complete=False)
    assert claim(tmp_path) is None


@pytest.mark.parametrize("result", ["checkpoint-10", "config.json", "adapter_config.json"])
def test_another_runs_results_are_kept(tmp_path: Path, result: str) -> None:
    claim(tmp_path, learning_rate=1e-3)
    before = read_run(tmp_path)
    (tmp_path / result).mkdir()
    with pytest.raises(ValueError) as caught:
        claim(tmp_path, data=DataArguments(train_data="other.parquet"), learning_rate=2e-3)
    message = str(caught.value)
    assert f"output_dir={str(tmp_path)!r} holds another run's results" in message
    assert "learning_rate: 0.001 -> 0.002" in message
    assert "train_data: 'train.parquet' -> 'other.parquet'" in message
    assert "Choose another output_dir" in message
    assert "seed" not in message
    assert read_run(tmp_path) == before


def test_another_stages_results_are_kept(tmp_path: Path) -> None:
    claim(tmp_path, stage="hft")
    checkpoint(tmp_path, 1)
    with pytest.raises(ValueError, match="Changed: stage: 'hft' -> 'hgpo'"):
        claim(tmp_path, stage="hgpo")


@pytest.mark.parametrize("field", ["model_name_or_path", "train_data"])
def test_inputs_made_anew_are_another_runs(tmp_path: Path, field: str) -> None:
    """Stage I is trained again, or the data built again, where it was: their names are the same."""
    model, data = tmp_path / "hft", tmp_path / "data"
    model.mkdir()
    data.mkdir()
    made = {"model_name_or_path": model / "model.safetensors", "train_data": data / "train.parquet"}
    for path in made.values():
        path.write_bytes(b"first")

    def start() -> str | None:
        arguments = DataArguments(train_data=str(data)), ModelConfig(model_name_or_path=str(model))
        config = SFTConfig(output_dir=str(tmp_path / "run"), bf16=False, use_cpu=True)
        return claim_run_dir("hgpo", config, *arguments)

    start()
    last = checkpoint(tmp_path / "run", 1)
    (model / "README.md").write_text("a card is no part of the model", encoding="utf-8")
    assert start() == last
    made[field].write_bytes(b"other")
    with pytest.raises(UserError, match=rf"Changed: input_files\.{field}: '\w+' -> '\w+'\. Choose another output_dir"):
        start()


def test_inputs_of_the_hub_are_known_by_their_names(tmp_path: Path) -> None:
    run = claim_run_dir(
        "hgpo",
        SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True),
        DataArguments(train_data="owner/data"),
        ModelConfig(model_name_or_path="owner/model"),
    )
    assert run is None
    assert read_run(tmp_path)["input_files"] == {"train_data": None, "model_name_or_path": None}


@pytest.mark.parametrize("output_dir", ["file", "file/run", "file/deep/run"])
def test_a_file_in_the_way_is_named(tmp_path: Path, output_dir: str) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be a folder, since '\S+file' is a file. Move it"):
        claim(tmp_path / output_dir)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("result", ["checkpoint-10", "config.json"])
def test_results_of_unknown_origin_are_kept(tmp_path: Path, result: str) -> None:
    (tmp_path / result).mkdir()
    with pytest.raises(ValueError, match=rf"unknown run \(no {RUN_FILE}\)\. Choose another output_dir"):
        claim(tmp_path)
    assert not (tmp_path / RUN_FILE).exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"report_to": "wandb", "run_name": "again", "logging_steps": 3},
        {"save_steps": 7, "save_total_limit": 1},
        {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 2},
        {"dataloader_num_workers": 2, "disable_tqdm": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_does_not_change_the_training_may_change(tmp_path: Path, fields: dict[str, Any]) -> None:
    claim(tmp_path)
    last = checkpoint(tmp_path, 4)
    assert claim(tmp_path, data=DataArguments(eval_data="held_out.parquet"), **fields) == last
    assert read_run(tmp_path)["eval_data"] == "held_out.parquet"


def test_another_spelling_of_the_directory_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path / "run")
    checkpoint(tmp_path / "run", 4)
    monkeypatch.chdir(tmp_path)
    assert claim(Path("run")) == str(Path("run/checkpoint-4"))


def test_named_checkpoint_wins_over_the_last(tmp_path: Path) -> None:
    claim(tmp_path)
    first, last = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    assert claim(tmp_path, resume_from_checkpoint=first) == first
    assert claim(tmp_path, resume_from_checkpoint="true") == last


def test_named_checkpoint_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='nowhere' is not a folder\. Leave it out"):
        claim(tmp_path, resume_from_checkpoint="nowhere")


def test_named_checkpoint_must_be_whole(tmp_path: Path) -> None:
    claim(tmp_path)
    torn = Path(checkpoint(tmp_path, 4))
    (torn / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4' is torn: model.safetensors is missing\. Leave it out"):
        claim(tmp_path, resume_from_checkpoint=str(torn))


def test_named_checkpoint_may_be_of_another_tool(tmp_path: Path) -> None:
    """Trainer's own checkpoints have no seal."""
    foreign = checkpoint(tmp_path / "elsewhere", 4, complete=False)
    assert claim(tmp_path / "run", resume_from_checkpoint=foreign) == foreign


@pytest.mark.parametrize("named", [False, True])
def test_no_run_goes_on_without_its_optimizer(tmp_path: Path, named: bool) -> None:
    """As save_only_model leaves a checkpoint; DeepSpeed's own optimizer and schedule have a file `latest`."""
    claim(tmp_path)
    whole, alone = checkpoint(tmp_path, 4, optimizer="latest"), checkpoint(tmp_path, 8, optimizer=None)
    with pytest.raises(ValueError, match=r"checkpoint-8 holds the model without its optimizer \(save_only_model"):
        claim(tmp_path, **{"resume_from_checkpoint": alone} if named else {})
    assert claim(tmp_path, resume_from_checkpoint=whole) == whole


def test_another_number_of_processes_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path)
    checkpoint(tmp_path, 4)
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    with pytest.raises(ValueError, match="Changed: num_processes: 1 -> 2"):
        claim(tmp_path)


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTConfig, "process_index", 1)
    claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tokens_are_not_written(tmp_path: Path) -> None:
    claim(tmp_path, hub_token="secret")
    assert "secret" not in (tmp_path / RUN_FILE).read_text(encoding="utf-8")


def test_a_run_is_described_in_json(tmp_path: Path) -> None:
    run = describe_run("hft", DataArguments(), SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True))
    assert json.loads(json.dumps(run)) == run
    assert run["lr_scheduler_type"] == "linear"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"b": 1, "a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü", "b": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_json(path, {"a": "new"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü", "b": 1}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "run.json", set()
    contents = [{"step": step, "padding": "x" * 200_000} for step in range(20)]
    write_json(path, contents[0])
    writer = threading.Thread(target=lambda: [write_json(path, content) for content in contents])
    writer.start()
    while writer.is_alive():
        seen.add(json.loads(path.read_text(encoding="utf-8"))["step"])
    writer.join()
    assert seen <= set(range(20))
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
