"""Model cards: what the card says of runs, data and evaluations, there or not; and pushing to the hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import save_file
from test_report import evaluation, limited
from trl import ModelConfig

from hgpo_trl.common.errors import UserError
from hgpo_trl.reporting.model_card import write_model_card
from hgpo_trl.reporting.report import write_report
from hgpo_trl.scripts import card
from hgpo_trl.scripts.stages import train_and_save
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.run_dir import describe_run

MANIFEST = {
    "sources": {
        "maths": {"path": "org/maths", "licence": "apache-2.0", "kept": 12345},
        "chats": {"path": "/home/me/chats", "licence": None, "kept": 7},
    }
}


def hgpo_run(folder: Path, **changes: Any) -> dict[str, Any]:
    config = HGPOConfig(str(folder), bf16=False, use_cpu=True, margin=0.3, learning_rate=2e-6, report_to="none")
    model = ModelConfig(model_name_or_path="org/base-7b")
    return (
        describe_run("hgpo", config, model)
        | {"train_data": "org/prompts", "reward_funcs": ["mine.py:reward"]}
        | changes
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a run that started from a model and data of the hub."""
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "run.json").write_text(json.dumps(hgpo_run(path)), encoding="utf-8")
    (path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 1000}', encoding="utf-8")
    (path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    save_file({}, path / "model.safetensors")
    return path


def read(folder: Path, **arguments: Any) -> str:
    path = write_model_card(folder, **arguments)
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


def settings_of(text: str, stage: str) -> dict[str, Any]:
    section = text.partition(f"### {stage}\n")[2]
    return yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])


def test_front_matter_is_what_the_hub_reads(folder: Path) -> None:
    data = ModelCard(read(folder)).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == "org/base-7b"
    assert data.datasets == ["org/prompts"]
    assert {"hgpo", "trl", "hybrid-reasoning"} <= set(data.tags)


def test_settings_are_what_differs_and_what_hgpo_adds(folder: Path) -> None:
    settings = settings_of(read(folder), "Hybrid Group Policy Optimization")
    assert settings["margin"] == 0.3
    assert settings["learning_rate"] == 2e-6
    assert settings["alpha"] == 1.0  # a default, but HGPO's own
    assert settings["reward_funcs"] == ["mine.py:reward"]
    assert settings["num_processes"] == 1
    for name in ("output_dir", "report_to", "adam_beta1", "accelerator_config", "generation_batch_size", "stage"):
        assert name not in settings


def test_the_name_on_the_hub_is_used_everywhere(folder: Path) -> None:
    text = read(folder, hub_id="me/think-7b")
    assert "\n# think-7b\n" in text
    assert text.count('from_pretrained("me/think-7b"') == 2
    assert "\nvllm serve me/think-7b\n" in text
    assert "my-model" not in text
    assert "max_new_tokens=500" in text  # half of the positions


def test_both_stages_and_the_data_s_sources_through_a_merged_adapter(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("data", "hft", "hgpo", "merged")}
    runs = {
        "hft": {"stage": "hft", "model_name_or_path": "org/base", "train_data": str(folders["data"]), "max_steps": 5},
        "hgpo": hgpo_run(folders["hgpo"], model_name_or_path=str(folders["hft"])),
        "merged": {"stage": "merge", "model": str(folders["hgpo"]), "output_dir": str(folders["merged"])},
    }
    for name, path in folders.items():
        path.mkdir()
        content, file = (runs[name], "run.json") if name in runs else (MANIFEST, "manifest.json")
        (path / file).write_text(json.dumps(content), encoding="utf-8")
    text = read(folders["merged"])
    assert "by Hybrid Fine-Tuning and then Hybrid Group Policy Optimization" in text
    assert settings_of(text, "Hybrid Fine-Tuning")["max_steps"] == 5
    assert settings_of(text, "Hybrid Group Policy Optimization")["model_name_or_path"] == "hft"
    assert "| maths | 12,345 | apache-2.0 |\n| chats | 7 | unknown |" in text
    assert ModelCard(text).data.base_model == "org/base"
    assert ModelCard(text).data.tags[-2:] == ["hft", "hgpo"]
    assert str(tmp_path) not in text


def test_without_a_run_there_is_no_training(tmp_path: Path) -> None:
    text = read(tmp_path)
    assert "## Use it" in text
    assert "## Training" not in text
    assert "None" not in text


def test_the_evaluation_of_a_report(folder: Path, tmp_path: Path) -> None:
    report = write_report({"hft": evaluation("hft"), "hgpo": evaluation()}, tmp_path / "report").parent
    text = read(folder, report=report)
    assert "|  | hft | hgpo |" in text
    for name in ("accuracy_vs_tokens", "thinking_ratio_by_level"):
        assert f"(figures/{name}.png)" in text
        assert (folder / "figures" / f"{name}.png").read_bytes() == (report / f"{name}.png").read_bytes()
    assert "decision_bias.png" not in text
    assert "model `hgpo` on `eval.parquet`" in text  # no folders
    assert read(folder, report=report) == text


def test_the_evaluation_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    text = read(folder, report=tmp_path / "eval")
    assert "|  | this model |" in text
    assert "![" not in text


def test_sweeps_of_a_report_are_no_models(folder: Path, tmp_path: Path) -> None:
    report = write_report(
        {"after": limited(None)}, tmp_path, margin_sweep={0.1: evaluation()}, budget_sweep={"after": [limited(8)]}
    )
    card = read(folder, report=report.parent)
    assert "| after |" in card
    assert "_sweep" not in card


def test_a_licence_that_was_added_stays(folder: Path) -> None:
    text = read(folder)
    licence = "license: other\nlicense_name: mine\nlicense_link: https://example.org"
    (folder / "README.md").write_text(text.replace("---\n", f"---\n{licence}\n", 1), encoding="utf-8")
    data = ModelCard(read(folder)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "https://example.org")
    assert data.base_model == "org/base-7b"


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model='.*nowhere': there is no such folder"):
        write_model_card(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"report='.*': there is no report\.json in it.*hgpo-trl report"):
        write_model_card(folder, report=tmp_path)
    assert not (folder / "README.md").exists()


# --- pushing ------------------------------------------------------------------


class Hub:
    """Stands for `HfApi`: keeps what it is asked to do."""

    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **kwargs: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **kwargs}))

    def upload_folder(self, **kwargs: Any) -> str:
        self.calls.append(("upload_folder", kwargs))
        return "https://huggingface.co/me/think-7b"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(card, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_a_model_is_pushed_with_its_card(folder: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    card.main(["--model", str(folder), "--push_to_hub", "me/think-7b"])
    (create, created), (upload, uploaded) = hub.calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert (created["repo_id"], created["exist_ok"]) == ("me/think-7b", True)
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/think-7b", folder)
    assert "checkpoint-*" in uploaded["ignore_patterns"]
    assert 'from_pretrained("me/think-7b")' in (folder / "README.md").read_text(encoding="utf-8")
    assert "Pushed: https://huggingface.co/me/think-7b" in capsys.readouterr().out


def test_nothing_is_pushed_unasked_or_without_a_model(folder: Path, hub: type[Hub]) -> None:
    card.main(["--model", str(folder)])
    assert not hub.calls
    (folder / "README.md").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model='.*': `hgpo-trl hgpo` has not finished there"):
        card.main(["--model", str(folder), "--push_to_hub", "me/think-7b"])
    assert not hub.calls
    assert not (folder / "README.md").exists()


def test_a_trainer_that_pushes_pushes_our_card(folder: Path) -> None:
    """The trainer's own order: card, then upload."""

    class Pushing:
        """The part of a Trainer that `train_and_save` sees."""

        def __init__(self) -> None:
            self.args = HGPOConfig(str(folder), bf16=False, use_cpu=True, push_to_hub=True, report_to="none")
            self.hub_model_id, self.pushed = "me/think-7b", ""
            self.accelerator: Any = self

        def print(self, text: str) -> None: ...
        def add_callback(self, callback: Any) -> None: ...
        def save_model(self) -> None: ...
        def save_state(self) -> None: ...
        def log_metrics(self, *args: Any) -> None: ...
        def save_metrics(self, *args: Any) -> None: ...
        def is_world_process_zero(self) -> bool:
            return True

        def create_model_card(self, **kwargs: Any) -> None:
            raise AssertionError("TRL's card")

        def train(self, **kwargs: Any) -> Any:
            return type("Result", (), {"metrics": {}})

        def push_to_hub(self) -> None:
            (folder / "README.md").unlink()
            self.create_model_card(model_name="think-7b")
            self.pushed = (folder / "README.md").read_text(encoding="utf-8")

    trainer: Any = Pushing()
    train_and_save(trainer, None)
    assert "vllm serve me/think-7b" in trainer.pushed
