"""Hashes that tell inputs of the same name apart: a folder is trained again, a file is built again."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import xxhash
from transformers import AutoConfig

from hgpo_trl.common.data_files import BUILDERS

_MODEL = ("*.safetensors", "pytorch_model*.bin", "config.json", "generation_config.json", "tokenizer*", "chat_*")


def model_fingerprint(model: str) -> str | None:
    """Tell a model from others of the same name: a hash of a folder's weights, configuration and tokenizer files, or
    the commit of a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
    return _hash(folder, (path for pattern in _MODEL for path in folder.glob(pattern) if path.is_file()))


def data_fingerprint(data: str) -> str | None:
    """Tell a data set from others of the same name: a hash of a local file, or of a folder's files of the first kind
    in `BUILDERS` that is there; None for a hub id."""
    path = Path(data)
    if path.is_file():
        return _hash(path.parent, [path])
    found = filter(None, (list(path.rglob(f"*{suffix}")) for suffix in BUILDERS))
    return _hash(path, next(found, [])) if path.is_dir() else None


def _hash(folder: Path, files: Iterable[Path]) -> str:
    """Hash files, each with its path below a folder."""
    found = xxhash.xxh3_128()
    for path in sorted(files):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        found.update(f"{path.relative_to(folder)}\0{digest}\0".encode())
    return found.hexdigest()
