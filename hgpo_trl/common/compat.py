"""Internals of other libraries that this package uses, each with the version in which it was read.

They are no part of a public interface and may change in any release; `tests/test_compat.py` notices. The methods that
`HGPOTrainer` overrides are listed in its own docstring.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def prepend_to_stream(streamer: Any, token_ids: list[int]) -> None:
    """Begin a text streamer's output with tokens that are not generated, such as a forced mode's tag.

    Transformers 5.17: `TextStreamer` decodes the whole of `token_cache` with every new token.
    """
    streamer.token_cache += token_ids


@contextmanager
def no_deepspeed_config() -> Iterator[None]:
    """Hide DeepSpeed's configuration from `from_pretrained`, which shards a model by it under ZeRO-3.

    Transformers 5.17: `set_hf_deepspeed_config` keeps a weak reference in `_hf_deepspeed_config_weak_ref`, and no
    function returns the object itself.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def map_synced_weights(
    generation: Any, change: Callable[[Iterable[tuple[str, Any]]], Iterator[tuple[str, Any]]]
) -> None:
    """Change the names and parameters that TRL's `VLLMGeneration` sends to vLLM.

    TRL 1.16: `sync_weights` takes them from `_iter_named_params`, however the model is sharded.
    """
    named_params = generation._iter_named_params
    generation._iter_named_params = lambda: change(named_params())


def model_in_process(llm: Any) -> Any:
    """The module that a vLLM engine in this process runs.

    vLLM 0.31: `external_launcher`, with which TRL 1.16 starts the engine, keeps its only worker in this process.
    """
    return llm.llm_engine.model_executor.driver_worker.model_runner.model


def wrap_weight_packing(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Wrap the function with which vLLM brings loaded weights into the layout of its kernels, for all later engines.

    vLLM 0.31: `BaseModelLoader.load_model` calls `process_weights_after_loading(model, model_config, device)` by its
    name in the loader's module.

    Raises:
        AttributeError: the loader's module has no such function.
    """
    from vllm.model_executor.model_loader import base_loader

    base_loader.process_weights_after_loading = wrap(base_loader.process_weights_after_loading)
