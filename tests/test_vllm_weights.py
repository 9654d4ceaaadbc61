"""An engine on a CPU takes new weights, whichever kernel the processor gets, and packs them for that kernel again.

Every dispatch of vLLM that this processor can run is forced; a stand-in, which packs as the kernel does and drops the
parameter, takes the place of the others. Layers and an engine live in processes of their own.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from workers import end

ROOT = Path(__file__).parents[1]
VOCABULARY = 500  # vLLM pads it to 512
KERNELS = ["auto", "torch", "oneDNN", "sgl-kernel", "sgl-kernel stand-in", "zentorch stand-in"]
TYINGS = ["untied", "tied", "tied, saved twice"]
STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
CLOSURES = {"handler": "oneDNN", "packed_weight": "sgl-kernel", "zen_weight": "zentorch"}  # variables of `cpu_linear`

pytestmark = pytest.mark.engine


def save_model(folder: Path, tying: str, seed: int) -> PreTrainedModel:
    """A Qwen2 (with biases) whose weights are as large as sgl-kernel takes them, and larger."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=4608,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=tying != "untied",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    if tying == "tied, saved twice":  # as some tools save it; vLLM ties the two once it has loaded them
        state = {name: value.clone() for name, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model


# --- the processes without pytest ---


class StandIns:
    """Kernels in plain torch: what they compute with is a packed copy, here the transposed weight."""

    def __init__(self) -> None:
        self.calls = 0

    def prepack(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().t().contiguous()

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.linear(x, packed.t(), None if bias is None else bias.to(x.dtype))


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[StandIns]:
    """Have vLLM dispatch each layer to `kernel`.

    Raises:
        NotImplementedError: the processor cannot run it.
    """
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    stand_ins = StandIns()
    with contextlib.ExitStack() as stack:

        def replace(where: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(where, name, value, create=True))

        if kernel in ("torch", "oneDNN"):
            replace(utils, "check_cpu_sgl_kernel", lambda n, k, dtype: False)
        if kernel == "torch":
            replace(ops, "_supports_onednn", False)
        if kernel == "oneDNN" and not ops._supports_onednn:
            raise NotImplementedError
        if kernel.startswith("sgl-kernel"):
            replace(utils, "check_cpu_sgl_kernel", lambda n, k, dtype: n * k <= 2**19)
        if kernel == "sgl-kernel":  # also without AMX, in bfloat16
            built = hasattr(torch.ops._C, "convert_weight_packed")
            if not (built and torch.cpu._is_avx512_bf16_supported()):
                raise NotImplementedError
        if kernel == "sgl-kernel stand-in":
            replace(torch.ops._C, "convert_weight_packed", stand_ins.prepack)
            replace(ops, "weight_packed_linear_cpu", lambda x, packed, n, bias: stand_ins.linear(x, packed, bias))
            replace(
                torch.ops._C, "weight_packed_linear", lambda x, packed, bias, vnni: stand_ins.linear(x, packed, bias)
            )
        if kernel == "zentorch stand-in":
            replace(type(current_platform), "is_zen_cpu", lambda self: True)
            replace(torch.ops.zentorch, "zentorch_weight_prepack_for_linear", stand_ins.prepack)
            replace(
                torch.ops.zentorch,
                "zentorch_linear_unary",
                lambda x, packed, bias, is_weight_prepacked: stand_ins.linear(x, packed, bias),
            )
        yield stand_ins


def layer_errors(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the outputs of an engine's linear and embedding layers are from those of `state`, relative to these."""
    errors = {}
    torch.manual_seed(0)
    for name, layer in model.named_modules():
        if not hasattr(layer, "cpu_linear"):
            continue
        part = name.rpartition(".")[2]
        parts = [name.replace(part, piece) for piece in STACKS.get(part, (part,))]
        weight = torch.cat([state[f"{piece}.weight"] for piece in parts]).float()
        if part == "embed_tokens":
            ids = torch.arange(VOCABULARY)
            got, right = layer(ids), weight
        else:
            x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16)
            bias = getattr(layer, "bias", None)
            got = layer.quant_method.apply(layer, x, bias)[:, : len(weight)]
            right = x.float() @ weight.T
            if bias is not None:
                right += torch.cat([state[f"{piece}.bias"] for piece in parts]).float()
        errors[name] = ((got.float() - right).norm() / right.norm()).item()
    return errors


def replace_in_layers(folder: Path) -> None:
    """Load a model with each kernel, replace its weights; the errors of its layers go to folder/errors.json."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    from hgpo_trl.inference.vllm_support import keep_cpu_weights_replaceable

    keep_cpu_weights_replaceable()
    keep_cpu_weights_replaceable()  # a second trainer in the process
    results: dict[str, Any] = {"experts": experts_or_refusal(folder)}
    for tying in TYINGS:
        save_model(folder / tying, tying, seed=0)
        after = save_model(folder / "after", tying, seed=1)
        config = EngineArgs(str(folder / tying), dtype="bfloat16", enforce_eager=True).create_engine_config()
        with set_current_vllm_config(config):
            for kernel in KERNELS:
                with contextlib.suppress(NotImplementedError), forced(kernel) as stand_ins:
                    config.compilation_config.static_forward_context.clear()  # where layers enter their names
                    model = get_model(vllm_config=config)
                    for _ in range(2):  # also weights that have been replaced before
                        with model.replacing_weights():
                            for name, parameter in after.named_parameters():
                                model.load_weights([(name, parameter.data)])
                    closures = [layer.cpu_linear for layer in model.modules() if hasattr(layer, "cpu_linear")]
                    variables = {name for closure in closures for name in closure.__code__.co_freevars}
                    with torch.no_grad():
                        results[f"{kernel}, {tying}"] = {
                            "errors": layer_errors(model, after.state_dict()),
                            "kernels": sorted({CLOSURES[name] for name in variables & set(CLOSURES)}),
                            "calls": stand_ins.calls,
                        }
    (folder / "errors.json").write_text(json.dumps(results), encoding="utf-8")


def experts_or_refusal(folder: Path) -> str:
    """Replace the weights of a mixture of experts: the message if that is refused, or the names of wrong ones."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model

    from hgpo_trl.inference.vllm_support import sync_packed_weights

    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=128, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2,
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / f"experts-{seed}")
        engine = EngineArgs(str(folder / f"experts-{seed}"), dtype="bfloat16", enforce_eager=True)
        vllm_config = engine.create_engine_config()
        with set_current_vllm_config(vllm_config):
            if not models:  # with its group for experts
                init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
                initialize_model_parallel(1, 1)
            models.append(get_model(vllm_config=vllm_config))
    model, fresh = models
    runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner)))
    state = load_file(folder / "experts-1" / "model.safetensors")
    generation = SimpleNamespace(mode="colocate", llm=llm, sync_weights=lambda: model.load_weights(state.items()))
    try:
        sync_packed_weights(generation)
    except RuntimeError as error:
        return str(error)
    generation.sync_weights()
    expected = dict(fresh.named_parameters())
    return ", ".join(name for name, value in model.named_parameters() if not torch.equal(value, expected[name]))


def replace_in_engine(folder: Path) -> None:
    """Start an engine whose small weights sgl-kernel has, replace all; log-probabilities go to folder/logps.pt."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from hgpo_trl.inference.vllm_support import keep_cpu_weights_replaceable

    before = save_model(folder / "model", "untied", seed=0)
    after = save_model(folder / "after", "untied", seed=1)
    kernel = "sgl-kernel"
    try:
        with forced(kernel):
            pass
    except NotImplementedError:
        kernel = "sgl-kernel stand-in"
    keep_cpu_weights_replaceable()
    with forced(kernel):
        engine = LLM(
            str(folder / "model"),
            dtype="bfloat16",
            max_model_len=32,
            skip_tokenizer_init=True,
            distributed_executor_backend="external_launcher",  # as TRL starts it: in this process
            logprobs_mode="raw_logprobs",
        )
        model = engine.llm_engine.model_executor.driver_worker.model_runner.model
        prompts = torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
        sampling = SamplingParams(max_tokens=16, temperature=0.0, logprobs=0, detokenize=False)
        seen = []
        for policy in (before, after, before):
            with model.replacing_weights():
                for name, parameter in policy.named_parameters():
                    model.load_weights([(name, parameter.data)])
            engine.reset_prefix_cache()
            for prompt, result in zip(
                prompts,
                engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False),
                strict=True,
            ):
                (output,) = result.outputs
                tokens = list(output.token_ids)
                logps = [entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)]
                seen.append(
                    {"ids": prompt + tokens, "logps": logps, "policy": "before" if policy is before else "after"}
                )
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


# --- the tests ---


def run(what: str, folder: Path) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "RANK": "0", "LOCAL_RANK": "0",
        "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    command = [sys.executable, __file__, what, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = run("layers", tmp_path_factory.mktemp("layers"))
    return json.loads((folder / "errors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_layer_computes_with_the_new_weights(kernel: str, tying: str, replaced: dict[str, Any]) -> None:
    result = replaced.get(f"{kernel}, {tying}")
    if result is None:
        pytest.skip(f"this processor cannot run {kernel}")
    assert len(result["errors"]) == 2 * 4 + 2, "per layer qkv, o, gate_up, down; both embeddings"
    assert {name: error for name, error in result["errors"].items() if error > 0.02} == {}
    name = kernel.removesuffix(" stand-in")
    assert name == "auto" or set(result["kernels"]) >= ({name} - {"torch"})
    assert (result["calls"] > 0) == ("stand-in" in kernel)


def test_experts_are_replaced_or_refused(replaced: dict[str, Any]) -> None:
    """vLLM 0.31 packs experts only once, where it packs them: no rollout may come from what is left then."""
    assert replaced["experts"] == "" or re.match(r"vLLM \S+ does not pack model\.\S+experts", replaced["experts"])


def test_an_engine_samples_from_the_new_weights(tmp_path: Path) -> None:
    """With its compiled graph, and as Transformers computes the model that it was given last."""
    seen = json.loads((run("engine", tmp_path) / "seen.json").read_text(encoding="utf-8"))
    policies = {
        name: Qwen2ForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        for name, folder in (("before", "model"), ("after", "after"))
    }
    assert [row["policy"] for row in seen] == ["before"] * 4 + ["after"] * 4 + ["before"] * 4
    for row in seen:
        ids, off = torch.tensor([row["ids"]]), {}
        for name, policy in policies.items():
            with torch.no_grad():
                logps = policy(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-16:, 0]
            off[name] = (logps - torch.tensor(row["logps"])).abs().mean().item()
        other = ({"before", "after"} - {row["policy"]}).pop()
        assert off[row["policy"]] < 0.05 < 0.5 < off[other]


if __name__ == "__main__":  # the engine may start processes that import this file
    {"layers": replace_in_layers, "engine": replace_in_engine}[sys.argv[1]](Path(sys.argv[2]))
    end()
