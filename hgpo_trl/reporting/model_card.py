"""A trained model's README.md, its card on the hub, written from the files of its training and its evaluation."""

import dataclasses
import json
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig
from trl import DPOConfig, ModelConfig, SFTConfig

from hgpo_trl.common import paper
from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import looks_like_path, write_atomically
from hgpo_trl.modes import LHRM, as_format
from hgpo_trl.reporting.evaluations import SWEEPS
from hgpo_trl.reporting.plots import CAPTIONS
from hgpo_trl.reporting.tables import results_markdown
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.run_dir import RUN_FILE, is_free

STAGES = {
    "hft": ("Hybrid Fine-Tuning", SFTConfig),
    "hgpo": ("Hybrid Group Policy Optimization", HGPOConfig),
    "rft": ("Rejection fine-tuning on the best response of both modes", SFTConfig),
    "dpo": ("DPO of the better mode over the other", DPOConfig),
}
PICTURES = ("accuracy_vs_tokens", "decision_bias", "thinking_ratio_by_level")
PACKAGES = ("hgpo-trl", "trl", "transformers", "torch")
MANIFEST = "manifest.json"

_TEMPLATE = resources.files("hgpo_trl").joinpath("templates/model_card.md.jinja").read_text(encoding="utf-8")
_DERIVED = {
    "accelerator_config",
    "generation_batch_size",
    "input_files",
    "stage",
}  # derived, or named elsewhere


def write_model_card(model: str | Path, *, report: str | Path | None = None, hub_id: str | None = None) -> Path:
    """Write README.md of a model, and the figures it shows, into the model's folder.

    Args:
        model: folder of a stage's output. Settings come from its `run.json` and that of the stage before, if its folder
            still exists; sources of the data from a `manifest.json` beside the training data.
        report: folder of `hgpo-trl report` or of `hgpo-trl evaluate`; None leaves the evaluation out.
        hub_id: the model's name on the hub; default: the folder's name.

    Returns:
        Path of README.md. The same input gives the same bytes.

    Raises:
        UserError: there is no such folder, or no report in `report`.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(f"model={str(model)!r}: there is no such folder. Name the output_dir of a training stage.")
    evaluations = _evaluations(Path(report)) if report is not None else {}
    pictures = _copy_pictures(Path(report), folder) if report is not None else []
    runs = _runs(folder)
    base = _hub_name(runs[0].get("model_name_or_path")) if runs else None
    datasets = [name for run in runs if (name := _hub_name(run.get("train_data")))]
    name = hub_id or folder.resolve().name
    path = folder / "README.md"
    data = ModelCardData(
        base_model=base,
        datasets=datasets or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hybrid-reasoning", "trl", *(run["stage"] for run in runs)],
        **_licence(path),
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=name.split("/")[-1],
        name=name,
        base_model=base,
        runs=[_described(run) for run in runs],
        stages=[STAGES[run["stage"]][0] for run in runs],
        paper_title=paper.TITLE,
        paper_id=paper.ARXIV_ID,
        mode_format=_own_format(folder),
        max_new_tokens=_max_new_tokens(folder),
        results=results_markdown(evaluations) if evaluations else "",
        pictures=pictures,
        versions=", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES),
        citation=paper.CITATION.strip(),
    )
    write_atomically(path, f"{str(card).strip()}\n".encode())
    return path


def _licence(path: Path) -> dict[str, Any]:
    """The licence that a user has added to the card's front matter; a new card keeps it."""
    if not path.is_file():
        return {}
    found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return {name: found[name] for name in ("license", "license_name", "license_link") if found.get(name)}


# --- training -------------------------------------------------------------------------------------------------


def _runs(folder: Path) -> list[dict[str, Any]]:
    """Read `run.json` of the stages that led to a model, the first stage first."""
    runs: list[dict[str, Any]] = []
    path = folder / RUN_FILE
    while path.is_file() and len(runs) < len(STAGES):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["stage"] in STAGES:
            runs.insert(0, run)
        elif run["stage"] == "model" and runs:  # `hgpo-trl model` has fetched it in place of the hub's
            runs[0]["model_name_or_path"] = run["hub_id"]
        # A merged model's run names the adapter, which is where the training stage has left its own.
        path = Path(str(run.get("model" if run["stage"] == "merge" else "model_name_or_path"))) / RUN_FILE
    return runs


def _is_local(name: str) -> bool:
    return looks_like_path(name) or Path(name).exists()


def _hub_name(name: str | None) -> str | None:
    """A model's or data set's name on the hub; None where it is a path."""
    return None if name is None or _is_local(name) else name


def _shown(value: Any) -> Any:
    """A setting without the folders of this machine."""
    return Path(value).name if isinstance(value, str) and "/" in value and _is_local(value) else value


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's data and settings: those other than the defaults, and all that HGPO adds to GRPO."""
    config = STAGES[run["stage"]][1]
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in (*dataclasses.fields(ModelConfig), *dataclasses.fields(config))
    }
    always = HGPOConfig.__annotations__ if config is HGPOConfig else {}
    return {
        key: _shown(value)
        for key, value in sorted(run.items())
        if value not in (None, [], {})
        and not (key in _DERIVED or is_free(key) or (isinstance(value, str) and value.startswith("<")))
        and (key in always or key not in defaults or defaults[key] != value)
    }


def _described(run: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's variables of the template."""
    data = str(run["train_data"])
    hub = _hub_name(data)
    return {
        "stage": STAGES[run["stage"]][0],
        "data": f"[{hub}](https://huggingface.co/datasets/{hub})" if hub else f"`{_shown(data)}`",
        "sources": _sources(Path(data)),
        "settings": yaml.safe_dump(_settings(run), sort_keys=False, allow_unicode=True, width=120).rstrip(),
    }


def _sources(data: Path) -> list[dict[str, str]]:
    """The sources of a built data set, from the manifest in its folder; none without a manifest."""
    path = (data if data.is_dir() else data.parent) / MANIFEST
    if not path.is_file():
        return []
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return [
        {"name": name, "rows": f"{source['kept']:,}", "licence": source["licence"] or "unknown"}
        for name, source in manifest["sources"].items()
    ]


def _own_format(folder: Path) -> str | None:
    """The name of the format that a model keeps from its base; None: this library's."""
    path = folder / "tokenizer_config.json"
    declared = json.loads(path.read_text(encoding="utf-8")).get("mode_format") if path.is_file() else None
    return None if declared is None or as_format(declared) == LHRM else as_format(declared).name


def _max_new_tokens(folder: Path) -> int:
    """Tokens to generate in the example: 4,096, or half of the model's positions if these are fewer."""
    if not (folder / "config.json").is_file():  # an adapter, or a run that has saved no model so far
        return 4096
    config = AutoConfig.from_pretrained(folder).get_text_config()
    return min(4096, getattr(config, "max_position_embeddings", 8192) // 2)


# --- evaluation -----------------------------------------------------------------------------------------------


def _evaluations(report: Path) -> dict[str, dict[str, Any]]:
    """The evaluations in the folder of a report, or the one in the folder of an evaluation."""
    path = report / "report.json"
    if not path.is_file():
        raise UserError(
            f"report={str(report)!r}: there is no report.json in it. Name the output_dir of `hgpo-trl report` or "
            "`hgpo-trl evaluate`."
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    for sweep in SWEEPS:
        content.pop(sweep, None)
    evaluations = {"this model": content} if "hybrid_accuracy" in content else content
    return {
        name: {**evaluation, "model": _shown(evaluation["model"]), "dataset": _shown(evaluation["dataset"])}
        for name, evaluation in evaluations.items()
    }


def _copy_pictures(report: Path, folder: Path) -> list[dict[str, str]]:
    """Copy a report's figures into the model's folder."""
    pictures = []
    for name in PICTURES:
        source = report / f"{name}.png"
        if source.is_file():
            file = f"figures/{source.name}"
            write_atomically(folder / file, source.read_bytes())
            title, caption = CAPTIONS[name]
            pictures.append({"file": file, "title": title, "caption": caption})
    return pictures
