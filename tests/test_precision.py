"""`bf16: auto`, with the timings of processors of every kind; and bf16 on this one: autocast over fp32 weights."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from settings import ON_CPU, argv

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import Mode, format_response
from hgpo_trl.scripts import hft, hgpo, stages
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.training import precision
from hgpo_trl.training.precision import check_same_precision, choose_bf16, cpu_speedup, resolve_bf16


def costs(fp32: float, bf16: float) -> Callable[[bool], float]:
    """A processor; a first call takes ten times as long, and every other one is disturbed."""
    factors: dict[bool, Iterator[float]] = {kind: iter([10.0, 1.5, *[1.0, 2.0] * 10]) for kind in (False, True)}
    return lambda in_bf16: next(factors[in_bf16]) * (bf16 if in_bf16 else fp32)


@pytest.mark.parametrize(("fp32", "bf16"), [(2.2, 1.1), (2.0, 2.0), (2.0, 3.0)])
def test_speedup_is_of_undisturbed_calls(fp32: float, bf16: float) -> None:
    assert cpu_speedup(costs(fp32, bf16)) == pytest.approx(fp32 / bf16)


def test_slow_processor_is_measured_once() -> None:
    calls: list[bool] = []

    def cost(in_bf16: bool) -> float:
        calls.append(in_bf16)
        return 0.3 if in_bf16 else 0.003

    assert cpu_speedup(cost) == pytest.approx(0.01)
    assert calls == [False, True] * 2, "the first two prepare the kernels"


def test_measurement_runs_here_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    assert cpu_speedup() > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("ratio", "chosen", "line"),
    [
        (4.1, True, "bf16: auto: bf16 is 4.1 times as fast as fp32 on this processor: computing in bf16."),
        (1.1, False, "bf16: auto: bf16 is 1.1 times as fast as fp32 on this processor: computing in fp32."),
        (0.01, False, "bf16: auto: bf16 is 100.0 times as slow as fp32 on this processor: computing in fp32."),
    ],
)
def test_processor_computes_in_bf16_where_that_is_faster(
    ratio: float, chosen: bool, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_bf16(True, lambda: ratio) is chosen
    assert capsys.readouterr().out == f"{line}\n"


@pytest.mark.parametrize("has_it", [True, False])
def test_gpu_computes_in_bf16_if_it_has_it(
    has_it: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: has_it)
    assert choose_bf16(False, lambda: pytest.fail("a GPU is not timed")) is has_it
    assert choose_bf16(True, lambda: 2.0), "with use_cpu the GPU does not matter"
    assert "this GPU" in capsys.readouterr().out


@pytest.mark.parametrize("begun", [True, False])
def test_resumed_run_keeps_its_precision(begun: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"bf16": begun}), encoding="utf-8")
    fields = Namespace(output_dir=tmp_path, use_cpu=True)
    assert resolve_bf16(fields, lambda use_cpu: pytest.fail("nothing to decide")) is begun
    assert capsys.readouterr().out == f"bf16: auto: {str(begun).lower()}, as the run in {tmp_path} was begun.\n"
    fields.output_dir = tmp_path / "other"
    assert resolve_bf16(fields, lambda use_cpu: not begun) is not begun


def test_processes_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_precision(Namespace(bf16=True))
    monkeypatch.setattr(precision, "gather_object", lambda mine: [*mine, False, False])
    with pytest.raises(UserError, match=r"true for 1 of 3 processes.*Write bf16: true or bf16: false"):
        check_same_precision(Namespace(bf16=True))


class Chosen:
    """Stands for the measurement, and counts its uses."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, fields: Namespace) -> bool:
        self.calls += 1
        return True


@pytest.mark.parametrize(
    "words", [["--bf16", "auto"], ["--config", "RECIPE"], ["--config", "RECIPE", "--bf16", "auto"]]
)
def test_recipe_and_command_line_take_auto(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("bf16: auto\nuse_cpu: true\n", encoding="utf-8")
    words = [str(tmp_path / "recipe.yaml") if word == "RECIPE" else word for word in words]
    chosen = Chosen()
    parser = RecipeParser((hft.SFTConfig,), prog="test", automatic={"bf16": chosen})
    (config,) = parser.parse_recipe([*words, "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert (config.bf16, chosen.calls) == (True, 1)


def test_an_explicit_value_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("bf16: auto\n", encoding="utf-8")
    chosen = Chosen()
    parser = RecipeParser((hft.SFTConfig,), prog="test", automatic={"bf16": chosen})
    words = ["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    (config,) = parser.parse_recipe([*words, "--bf16", "false"])
    assert (config.bf16, chosen.calls) == (False, 0)


@pytest.mark.parametrize("value", ["quick", "3", "[auto]"])
def test_other_words_are_of_the_wrong_type(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(f"bf16: {value}\n", encoding="utf-8")
    parser = RecipeParser((hft.SFTConfig,), prog="test", automatic={"bf16": Chosen()})
    with pytest.raises(SystemExit):
        parser.parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert "bf16" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["hft", "hgpo"])
def test_stages_compute_in_bf16_over_fp32_weights(
    stage: str, model_dir: str, prompts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products in bf16, weights in fp32, even where accelerate's config says `mixed_precision: no`, as cpu.yaml.

    The choice is given; a processor of any kind can compute in bf16.
    """
    seen: set[tuple[torch.dtype, torch.dtype]] = set()  # of outputs and weights
    train_and_save = stages.train_and_save

    def watched(trainer: Any, checkpoint: str | None) -> None:
        layer = trainer.model.model.layers[0].mlp.down_proj

        def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:  # not of the rollout
                seen.add((output.dtype, module.weight.dtype))

        layer.register_forward_hook(note)
        train_and_save(trainer, checkpoint)

    main = {"hft": hft, "hgpo": hgpo}[stage]
    monkeypatch.setattr(main, "train_and_save", watched)
    monkeypatch.setattr("hgpo_trl.scripts.stages.resolve_bf16", lambda fields: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    rows = prompts.select(range(8))
    if stage == "hft":
        rows = rows.map(
            lambda row: {
                "completion": [{"role": "assistant", "content": format_response(Mode.NO_THINK, row["answer"])}]
            }
        ).select_columns(["prompt", "completion"])
    rows.to_parquet(tmp_path / "rows.parquet")
    fields = ON_CPU | {"bf16": "auto", "model_name_or_path": model_dir, "train_data": tmp_path / "rows.parquet"}
    fields |= {"output_dir": tmp_path / "run", "max_steps": 1, "per_device_train_batch_size": 8}
    fields |= {"max_length": 64} if stage == "hft" else {"num_generations": 4, "max_completion_length": 4}
    main.main(argv(fields))
    assert seen == {(torch.bfloat16, torch.float32)}
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["bf16"] is True


@pytest.mark.parametrize(("has_accelerator", "asked"), [(False, False), (True, False), (True, True)])
def test_without_an_accelerator_auto_names_the_processor(has_accelerator, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_accelerator)
    fields = Namespace(output_dir=tmp_path, use_cpu=asked)
    resolve_bf16(fields, lambda use_cpu: use_cpu)
    assert fields.use_cpu is (asked or not has_accelerator)
