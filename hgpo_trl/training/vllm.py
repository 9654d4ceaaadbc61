"""vLLM as the trainer uses it: checks before the model is loaded, weights sent to it, failures that name the server."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl import GRPOConfig

from hgpo_trl.inference.vllm_support import (
    check_server,
    check_vllm_installed,
    keep_cpu_weights_replaceable,
    sync_merged_weights,
    sync_packed_weights,
)


def prepare_vllm(args: GRPOConfig, model: str) -> None:
    """Check that vLLM can sample for a training; call it before the model is loaded.

    Raises:
        MissingPackageError: vLLM is missing or of an unsupported version.
        ServerError, UserError: the server does not answer, or serves another model.
    """
    check_vllm_installed("use_vllm=true")
    if args.vllm_mode == "colocate":
        keep_cpu_weights_replaceable()
    elif args.process_index == 0:
        check_server(server_url(args), model, args.vllm_server_timeout)


def prepare_generation(generation: Any, merge_adapter: bool) -> None:
    """Set up TRL's `VLLMGeneration`.

    Args:
        merge_adapter: the model is a `PeftModel`; vLLM gets its merged weights.
    """
    if merge_adapter:
        sync_merged_weights(generation)
    sync_packed_weights(generation)


def server_url(args: GRPOConfig) -> str:
    """Base URL of the vLLM server of a training."""
    return (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")


@contextmanager
def naming_a_failing_server(args: GRPOConfig, step: int) -> Iterator[None]:
    """Raise errors of a vLLM server as RuntimeError that names the server, the step and the remedy."""
    try:
        yield
    except Exception as error:
        if not args.use_vllm or args.vllm_mode != "server":
            raise
        raise RuntimeError(
            f"The vLLM server at {server_url(args)} failed at step {step}: {error}. Read its log, restart it, and "
            "resume the training."
        ) from error
