"""Rollouts of a vLLM engine on a CPU: the kernels that it packs its weights for, against torch's linear, side by side.

    python benchmarks/vllm_cpu.py [--threads 1] [--repeats 3]

The model has the shapes of SmolLM2-135M and random weights in bfloat16; a rollout is 32 responses of 64 tokens to
prompts of 64. The two engines live in processes of their own and take turns. Prints tokens per second, the median of
their ratios, and the seconds that it takes to hand over all weights and pack them again.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

KERNELS = ("packed", "torch")
RESPONSES, PROMPT, RESPONSE = 32, 64, 64


def serve(kernel: str, folder: str) -> None:
    """Answer each line of standard input with a line: tokens per second of a rollout, seconds of a sync before it."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams, TokensPrompt, _custom_ops
    from vllm.model_executor.layers import utils

    from hgpo_trl.inference.vllm_support import keep_cpu_weights_replaceable

    keep_cpu_weights_replaceable()
    if kernel == "torch":
        _custom_ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda n, k, dtype: False
    engine = LLM(
        folder,
        max_model_len=PROMPT + RESPONSE,
        skip_tokenizer_init=True,
        distributed_executor_backend="external_launcher",  # in this process, as TRL has it
    )
    model = engine.llm_engine.model_executor.driver_worker.model_runner.model
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    sampling = SamplingParams(max_tokens=RESPONSE, ignore_eos=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=[100 * i + j for j in range(PROMPT)]) for i in range(RESPONSES)]
    for _ in sys.stdin:
        start = time.perf_counter()
        with model.replacing_weights():
            for name, parameter in policy.named_parameters():
                model.load_weights([(name, parameter.data)])
        engine.reset_prefix_cache()
        synced = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        speed = RESPONSES * RESPONSE / (time.perf_counter() - synced)
        print("measured", speed, synced - start, flush=True)


def measure(process: subprocess.Popen[str]) -> tuple[float, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("measured"):
            _, speed, sync = line.split()
            return float(speed), float(sync)
    sys.exit("an engine ended before it had answered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(arguments.threads), "VLLM_CPU_KVCACHE_SPACE": "1", "RANK": "0", "LOCAL_RANK": "0",
            "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, kernel, folder],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env=environment | {"MASTER_PORT": str(29600 + i)},
            )
            for i, kernel in enumerate(KERNELS)
        ]  # fmt: skip
        try:
            rounds = [[measure(process) for process in processes] for _ in range(arguments.repeats + 1)][1:]  # warm
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for i, kernel in enumerate(KERNELS):
        speed, sync = (statistics.median(row[i][part] for row in rounds) for part in (0, 1))
        print(f"{kernel:8} {speed:8.1f} tokens/s  sync {sync:.2f} s")
    print(f"ratio    {statistics.median(packed[0] / plain[0] for packed, plain in rounds):8.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in KERNELS:
        serve(*sys.argv[1:])
    else:
        main()
