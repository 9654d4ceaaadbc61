"""The internals of other libraries that `hgpo_trl.common.compat` uses exist, and do what it says."""

import inspect
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.generation.vllm_generation import VLLMGeneration

from hgpo_trl.common import compat
from hgpo_trl.inference.vllm_support import SUPPORTED


def test_a_stream_begins_with_tokens_that_are_not_generated(tokenizer: PreTrainedTokenizerFast) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    given, generated = tokenizer.convert_tokens_to_ids(["3", "5"])
    compat.prepend_to_stream(streamer, [given])
    streamer.put(torch.tensor([[7, 8]]))  # the prompt
    streamer.put(torch.tensor([generated]))
    streamer.end()
    assert "".join(streamer).split() == ["3", "5"]


def test_zero3_is_hidden_and_comes_back() -> None:
    pytest.importorskip("deepspeed")
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        with suppress(OSError), compat.no_deepspeed_config():
            assert not is_deepspeed_zero3_enabled()
            raise OSError("loading has failed")
        assert is_deepspeed_zero3_enabled()
        assert config.is_zero3()
    finally:
        unset_hf_deepspeed_config()
    with compat.no_deepspeed_config():
        pass
    assert not is_deepspeed_zero3_enabled()


class Engine:
    """The part of vLLM's engine that TRL reaches through to load weights into the model in this process."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, Any]] = []
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, named: list[tuple[str, Any]]) -> None:
        self.loaded += named

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None  # resetting caches, sleeping


def test_trl_sends_the_changed_weights_to_the_model_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VLLMGeneration, "_iter_named_params", lambda self: iter([("a", 1), ("b", 2)]))
    generation: Any = object.__new__(VLLMGeneration)
    generation.mode, generation.enable_sleep_mode, generation.llm = "colocate", False, Engine()
    generation.accelerator = SimpleNamespace(is_main_process=True)
    compat.map_synced_weights(generation, lambda named: ((f"{name}.x", 10 * value) for name, value in named))
    generation.sync_weights()
    assert compat.model_in_process(generation.llm).loaded == [("a.x", 10), ("b.x", 20)]


def test_trls_generation_has_the_method_that_is_replaced() -> None:
    assert inspect.isgeneratorfunction(VLLMGeneration._iter_named_params)
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]


def test_vllms_loader_calls_the_wrapped_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = pytest.importorskip("vllm")
    from vllm.model_executor.model_loader import base_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    assert SUPPORTED.contains(Version(vllm.__version__).base_version)
    assert "process_weights_after_loading" in inspect.unwrap(base_loader.BaseModelLoader.load_model).__code__.co_names
    pack = base_loader.process_weights_after_loading
    assert list(inspect.signature(pack).parameters) == ["model", "model_config", "target_device"]
    monkeypatch.setattr(base_loader, "process_weights_after_loading", pack)  # put back afterwards
    compat.wrap_weight_packing(lambda pack: lambda *args: pack)
    assert base_loader.process_weights_after_loading() is pack
    before = torch.get_default_dtype()
    with set_default_torch_dtype(torch.float64):
        assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_dtype() == before
