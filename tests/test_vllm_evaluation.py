"""Evaluation with vLLM against evaluation with Transformers, on one real engine."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from datasets import Dataset
from settings import argv
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hgpo_trl.evaluation import vllm_backend
from hgpo_trl.evaluation.transformers_backend import sample_both_modes
from hgpo_trl.inference.decoding import render
from hgpo_trl.modes import MODES, mode_tokens
from hgpo_trl.scripts import evaluate
from hgpo_trl.scripts.evaluate import main
from hgpo_trl.tasks.embedded import build_model

# Looked up, not imported: that takes seconds, also where these tests are not the ones to run.
pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
NUM_PROMPTS, SAMPLES, MAX_NEW_TOKENS, POSITIONS = 32, 3, 24, 512
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}  # GiB


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Untrained, float32, with heads as wide as vLLM needs them on a CPU. The mode tokens' rows are enlarged, so that
    the model picks one of them now and then."""
    model: LlamaForCausalLM = build_model(tokenizer, hidden_size=64, num_heads=2, max_length=POSITIONS)
    with torch.no_grad():
        model.get_input_embeddings().weight[list(mode_tokens(tokenizer).decision)] *= 2
    return model.eval()


@pytest.fixture(scope="module")
def path(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def few(prompts: Dataset) -> Dataset:
    return prompts.select(range(NUM_PROMPTS))


@pytest.fixture(scope="module")
def engine(path: str) -> Iterator[Any]:
    longest = POSITIONS - MAX_NEW_TOKENS
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with vllm_backend.running_engine(path, longest_prompt=longest, max_new_tokens=MAX_NEW_TOKENS) as engine:
            yield engine


@pytest.fixture(scope="module")
def sample(engine: Any, tokenizer: PreTrainedTokenizerFast, few: Dataset) -> Callable[..., pd.DataFrame]:
    def run(prompts: Any = few["prompt"], **changes: Any) -> pd.DataFrame:
        settings = {"samples_per_mode": SAMPLES, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0, "top_p": 1.0}
        return vllm_backend.sample_both_modes(engine, tokenizer, prompts, **(settings | changes))

    return run


@pytest.fixture(scope="module")
def samples(sample: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    return sample()


@pytest.fixture(scope="module")
def greedy_reference(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, few: Dataset) -> pd.DataFrame:
    """What Transformers makes of the same model."""
    return sample_both_modes(
        model, tokenizer, few["prompt"], samples_per_mode=2, max_new_tokens=MAX_NEW_TOKENS, temperature=0
    )


def test_greedy_is_what_transformers_gives(sample: Callable[..., pd.DataFrame], greedy_reference: pd.DataFrame) -> None:
    """The whole table: columns, types, order, decisions, and every response token for token."""
    assert set(greedy_reference["picked"]) == {-1, 0, 1}
    assert greedy_reference["prob_think"].nunique() > NUM_PROMPTS / 2
    found = sample(temperature=0, samples_per_mode=2)
    pd.testing.assert_frame_equal(found, greedy_reference, rtol=1e-4, atol=1e-6)


def test_greedy_within_limits_is_what_transformers_gives(
    sample: Callable[..., pd.DataFrame], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, few: Dataset
) -> None:
    limits: dict[str, Any] = {"max_think_tokens": MAX_NEW_TOKENS - 2, "max_no_think_tokens": 5, "think_budget": 4}
    limits |= {"max_new_tokens": MAX_NEW_TOKENS, "samples_per_mode": 2, "temperature": 0}
    expected = sample_both_modes(model, tokenizer, few["prompt"], **limits)
    assert (expected["mode"].eq("think") & expected["completion"].str.contains("</think>")).any()
    pd.testing.assert_frame_equal(sample(**limits), expected, rtol=1e-4, atol=1e-6)


def test_samples_have_the_same_shape(samples: pd.DataFrame, greedy_reference: pd.DataFrame) -> None:
    pd.testing.assert_series_equal(samples.dtypes, greedy_reference.dtypes)
    keys = list(samples[["prompt_id", "mode", "sample"]].itertuples(index=False, name=None))
    modes = sorted(mode.value for mode in MODES)
    assert keys == [(row, mode, index) for row in range(NUM_PROMPTS) for mode in modes for index in range(SAMPLES)]
    decisions = samples.drop_duplicates("prompt_id")[["prob_think", "prob_no_think", "picked"]]
    expected = greedy_reference.drop_duplicates("prompt_id")[["prob_think", "prob_no_think", "picked"]]
    pd.testing.assert_frame_equal(  # read at temperature 1, whatever the sampling
        decisions.reset_index(drop=True), expected.reset_index(drop=True), rtol=1e-4, atol=1e-6
    )


def test_responses_end_or_are_truncated(samples: pd.DataFrame) -> None:
    for mode, completion in zip(samples["mode"], samples["completion"], strict=True):
        assert completion.startswith(f"<{mode}>")
    assert set(samples["truncated"]) == {True, False}
    assert (samples["num_tokens"] <= MAX_NEW_TOKENS).all()
    assert (samples.loc[samples["truncated"], "num_tokens"] == MAX_NEW_TOKENS).all()
    words = samples["completion"].str.split().str.len()
    ended = ~samples["truncated"]  # by an end token, which counts but is not text
    assert (samples.loc[ended, "num_tokens"] > words[ended]).all()


def test_the_seed_decides(sample: Callable[..., pd.DataFrame], samples: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(sample(), samples, rtol=1e-4, atol=1e-6)
    other = sample(seed=1)
    assert (other["completion"] != samples["completion"]).mean() > 0.9
    assert sample(seed=-1)["completion"].equals(sample(seed=-1)["completion"])


def test_no_two_responses_share_their_random_numbers(sample: Callable[..., pd.DataFrame], few: Dataset) -> None:
    same = sample([few["prompt"][0]] * 4, samples_per_mode=4)
    assert same.groupby("mode")["completion"].nunique().gt(12).all()


def test_more_prompts_than_one_forward_pass_takes(sample: Callable[..., pd.DataFrame], engine: Any) -> None:
    """vLLM cuts the last prompt that it takes into a pass; on a CPU a seeded request does not survive that."""
    rng, words = random.Random(0), [str(digit) for digit in range(7)]
    texts = [" ".join(rng.choices(words, k=400)) for _ in range(60)]
    assert len(texts) * 400 > engine.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert len(sample(texts, samples_per_mode=1, max_new_tokens=2)) == len(texts) * len(MODES)


def test_temperature_and_top_p(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    few: Dataset,
    sample: Callable[..., pd.DataFrame],
) -> None:
    """The first token after the decision is distributed as computed by hand."""
    count, temperature, top_p = 1500, 2.0, 0.8
    drawn = sample(few["prompt"][:1], samples_per_mode=count, max_new_tokens=2, temperature=temperature, top_p=top_p)
    (ids,) = render(tokenizer, few["prompt"][:1])
    for mode, forced in zip(MODES, mode_tokens(tokenizer).decision, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, forced]])).logits[0, -1]
        probs, tokens = (logits / temperature).softmax(dim=-1).sort(descending=True)
        kept = probs.cumsum(dim=0) - probs < top_p
        assert 1 < kept.sum() < len(kept)
        expected: dict[str, float] = defaultdict(float)
        for token, prob in zip(tokens[kept].tolist(), (probs[kept] / probs[kept].sum()).tolist(), strict=True):
            expected[tokenizer.decode([forced, token], skip_special_tokens=True)] += prob  # special ones look alike
        found = Counter(drawn.loc[drawn["mode"] == mode.value, "completion"])
        assert found.keys() <= expected.keys()
        for text, prob in expected.items():
            assert found[text] / count == pytest.approx(prob, abs=5 * (prob * (1 - prob) / count) ** 0.5)


def test_plain_text_prompts_are_conversations_already_rendered(
    tokenizer: PreTrainedTokenizerFast, few: Dataset, sample: Callable[..., pd.DataFrame], samples: pd.DataFrame
) -> None:
    texts = tokenizer.apply_chat_template(list(few["prompt"]), add_generation_prompt=True, tokenize=False)
    pd.testing.assert_frame_equal(sample(texts), samples, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["math500", "aime24", "amc23", "olympiadbench", "gsm8k"])
def test_a_benchmark(
    name: str,
    engine: Any,
    path: str,
    model: LlamaForCausalLM,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole command on real problems, in parts, greedily, against Transformers."""

    @contextmanager
    def running_engine(name: str, longest_prompt: int, max_new_tokens: int, **settings: Any) -> Iterator[Any]:
        assert longest_prompt + max_new_tokens <= POSITIONS
        yield engine

    monkeypatch.setattr(vllm_backend, "running_engine", running_engine)
    monkeypatch.setattr(evaluate, "VLLM_CHUNK", 8)  # responses, of two prompts
    reports = {}
    for backend in ("vllm", "transformers"):
        fields = {
            "backend": backend, "model": path, "data": name, "data_dir": shared_data, "temperature": 0,
            "output_dir": tmp_path / backend, "num_prompts": 5, "samples_per_mode": 2, "max_new_tokens": MAX_NEW_TOKENS,
        }  # fmt: skip
        main(argv(fields))
        reports[backend] = json.loads((tmp_path / backend / "report.json").read_text(encoding="utf-8"))
        assert reports[backend].pop("settings")["backend"] == backend
    samples = [pd.read_parquet(tmp_path / backend / "samples.parquet") for backend in reports]
    pd.testing.assert_frame_equal(*samples, rtol=1e-4, atol=1e-6)
    for group in ("by_level", "by_subject", "by_domain"):
        assert len(reports["vllm"][group]) == len(reports["transformers"][group])
    assert reports["vllm"]["accuracy"] == pytest.approx(reports["transformers"]["accuracy"], rel=1e-4, abs=1e-6)


# --- The command --------------------------------------------------------------


@pytest.fixture
def command(path: str, few: Dataset, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run `hgpo-trl evaluate --backend vllm` as users do."""
    few.to_parquet(tmp_path / "eval.parquet")

    def run(*launcher: str, **changes: Any) -> subprocess.CompletedProcess:
        fields = {
            "backend": "vllm",
            "model": path,
            "data": tmp_path / "eval.parquet",
            "output_dir": tmp_path / "out",
            "samples_per_mode": SAMPLES,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        return subprocess.run(
            [sys.executable, *(launcher or ("-m", "hgpo_trl.cli", "evaluate")), *argv(fields | changes)],
            env=os.environ | ENVIRONMENT,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    return run


def test_the_command_writes_report_and_samples(
    command: Callable[..., subprocess.CompletedProcess],
    model: LlamaForCausalLM,
    few: Dataset,
    path: str,
    tmp_path: Path,
) -> None:
    result = command(temperature=0, samples_per_mode=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "hybrid accuracy" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["num_prompts"], report["samples_per_mode"]) == (NUM_PROMPTS, 1)
    samples = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    assert samples.pop("reward").isin([0.0, 1.0]).all()
    samples["faults"] = samples["faults"].map(list)
    expected = sample_both_modes(
        model,
        AutoTokenizer.from_pretrained(path),
        few["prompt"],
        samples_per_mode=1,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0,
    )
    pd.testing.assert_frame_equal(samples, expected, rtol=1e-4, atol=1e-6, check_dtype=False)


def test_two_processes_sample_what_one_does(
    command: Callable[..., subprocess.CompletedProcess], sample: Callable[..., pd.DataFrame], tmp_path: Path
) -> None:
    """Each with an engine of its own, and half of the prompts; up to rounding, which other batches change."""
    launcher = "-m accelerate.commands.launch --config_file recipes/accelerate/cpu_ddp.yaml --main_process_port 0"
    result = command(*launcher.split(), "-m", "hgpo_trl.scripts.evaluate", temperature=1.0, top_p=1.0)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("hybrid accuracy") == 1
    found = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    expected = sample()
    decided = ["prompt_id", "mode", "sample", "prob_think", "prob_no_think", "picked"]
    pd.testing.assert_frame_equal(found[decided], expected[decided], rtol=1e-4, atol=1e-6, check_dtype=False)
    assert (found["completion"] == expected["completion"]).mean() > 0.9


def test_the_engine_of_a_process_has_its_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3|4-7")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with vllm_backend.own_devices(1):
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-3|4-7"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with vllm_backend.own_devices(1):
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "4-7"
        assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-3|4-7"
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    with (
        pytest.raises(
            ValueError, match=r"need 4 groups of cores \(VLLM_CPU_OMP_THREADS_BIND\), 2 each, but it has 2\."
        ),
        vllm_backend.own_devices(2),
    ):
        pass


def test_too_few_positions_are_refused(path: str, model: LlamaForCausalLM) -> None:
    positions = model.config.max_position_embeddings
    message = (
        rf"max_new_tokens={positions} and the longest prompt of 1 tokens need {positions + 1} positions, but the model "
        rf".* has {positions} \(max_position_embeddings\)\. Lower max_new_tokens"
    )
    with (
        pytest.raises(ValueError, match=message),
        vllm_backend.running_engine(path, longest_prompt=1, max_new_tokens=positions),
    ):
        pass


def test_an_adapter_is_refused(path: str, few: Dataset, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(path, adapter)
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    few.to_parquet(tmp_path / "eval.parquet")
    fields = {"backend": "vllm", "model": adapter, "data": tmp_path / "eval.parquet", "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"model=.*adapter' is a LoRA adapter of None; merge it first"):
        main(argv(fields))


def test_termination_ends_the_engine_too(path: str, few: Dataset, tmp_path: Path) -> None:
    """A scheduler that stops a job signals the process that it started, not the engine's."""
    few.to_parquet(tmp_path / "eval.parquet")
    fields = {"backend": "vllm", "model": path, "data": tmp_path / "eval.parquet", "output_dir": tmp_path / "out"}
    fields |= {"samples_per_mode": 200, "max_new_tokens": 400, "reward_funcs": "hgpo_trl.rewards.accuracy_reward"}
    log = tmp_path / "log"
    engine: list[psutil.Process] = []
    with log.open("w", encoding="utf-8") as output:
        process = psutil.Popen(
            [sys.executable, "-m", "hgpo_trl.cli", "evaluate", *argv(fields)],
            stdout=output,
            stderr=output,
            env=os.environ | ENVIRONMENT,
        )
    try:
        while "Processed prompts" not in log.read_text(encoding="utf-8"):  # the engine samples
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        engine = process.children(recursive=True)
        assert any("VLLM" in part for child in engine for part in child.cmdline())
        process.terminate()
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(engine, timeout=60)[1]
    finally:
        for left in [*engine, process]:
            if left.is_running():
                left.kill()
