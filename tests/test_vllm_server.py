"""vLLM as a server: what is asked of it, in which order, and what is said when it is not what it should be.

A real vLLM server on the CPU, a real client and real requests. What needs a GPU at both ends is left out: the weights'
way over NCCL. Their names and shapes, which are announced to the server first, are checked.
"""

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from settings import ON_CPU, VLLM_SERVER, argv
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from workers import end

from hgpo_trl.inference import vllm_support
from hgpo_trl.inference.vllm_support import check_server, check_vllm_installed
from hgpo_trl.modes import mode_tokens
from hgpo_trl.tasks.embedded import build_model

ROOT = Path(__file__).parents[1]
GROUP = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- checks before anything is loaded ---------------------------------------------------------------------------


def test_vllm_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_support, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"use_vllm=true needs vLLM, which is not installed.*<0\.32,>=0\.22"):
        check_vllm_installed("use_vllm=true")


@pytest.mark.parametrize(
    ("version", "fits"), [("0.21.9", False), ("0.22.0", True), ("0.31.2", True), ("0.32.0", False)]
)
def test_vllm_of_another_version(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_support, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_support, "version", lambda distribution: version)
    if fits:
        check_vllm_installed("use_vllm=true")
        return
    with pytest.raises(ImportError, match=rf"installed version {version} is not supported.*<0\.32,>=0\.22"):
        check_vllm_installed("use_vllm=true")


def test_the_range_is_that_of_the_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'vllm = ["vllm>=0.22,<0.32"]' in text
    assert vllm_support.SUPPORTED == ">=0.22,<0.32"


def test_server_that_is_down() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        ConnectionError, match=rf"no vLLM server answers at {url} after 0.1 seconds \(vllm_server_timeout"
    ):
        check_server(url, "my/model", timeout=0.1)


@pytest.fixture
def serving() -> Iterator[str]:
    """A server that says it serves /models/hft, and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "lhrm", "root": "/models/hft"}]}).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_server_of_another_model(serving: str) -> None:
    for name in ("lhrm", "/models/hft", "runs/hft"):
        check_server(serving, name, timeout=1)
    with pytest.raises(ValueError, match=r"serves /models/hft or lhrm, but the model to train is runs/other\. Restart"):
        check_server(serving, "runs/other", timeout=1)


# --- a real server ----------------------------------------------------------------------------------------------


def train(folder: Path, *argv: str) -> None:
    """Stage II through its own main with all but NCCL; what is sent and what comes back is written to `folder`."""
    from trl.generation import vllm_client
    from trl.generation.vllm_client import VLLMClient
    from urllib3.util.retry import Retry

    from hgpo_trl.scripts import hgpo
    from hgpo_trl.training.trainer import HGPOTrainer

    requests: list[dict[str, Any]] = []
    announced: list[Any] = []
    generate = VLLMClient.generate

    def watched(self: VLLMClient, **kwargs: Any) -> Any:
        answer = generate(self, **kwargs)
        requests.append({"prompts": kwargs["prompts"], "n": kwargs["n"], "max_tokens": kwargs["max_tokens"]})
        return answer

    def update(self: VLLMClient, metadata: list, named_params: Iterator) -> None:
        announced.append(metadata)
        assert [name for name, _ in named_params] == [name for name, _, _ in metadata]

    class Watched(HGPOTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            rollout = super()._generate_and_score_completions(inputs)
            tensors = {key: value for key, value in rollout.items() if isinstance(value, torch.Tensor)}
            torch.save(tensors, folder / f"rollout_{self.state.global_step}_{self.accelerator.process_index}.pt")
            if self.accelerator.is_main_process:
                (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
                (folder / "announced.json").write_text(json.dumps(announced), encoding="utf-8")
            return rollout

    VLLMClient.generate = watched
    VLLMClient.update_named_params = update
    VLLMClient.init_communicator = lambda self, device: None
    VLLMClient.close_communicator = lambda self: None
    vllm_client.Retry = lambda **kwargs: Retry(total=0)  # a server that is gone is not waited for
    hgpo.HGPOTrainer = Watched
    hgpo.main(argv)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, prompts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    build_model(tokenizer, hidden_size=64, num_heads=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts.select(range(16)).to_parquet(folder / "prompts.parquet")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    port = free_port()
    environment = VLLM_SERVER | {"VLLM_SERVER_DEV_MODE": "1"}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")),
        *("--port", str(port), "--host", "127.0.0.1", "--max-model-len", "128", "--dtype", "float32"),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enforce-eager"),
    ]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(ConnectionError):
                check_server(url, str(folder / "model"), timeout=1)
                break
        else:
            pytest.fail((folder / "server.log").read_text()[-3000:])
        yield url, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def launch(folder: Path, url: str, output: Path, processes: int, **fields: Any) -> subprocess.CompletedProcess[str]:
    common: dict[str, Any] = ON_CPU | {
        "model_name_or_path": folder / "model", "train_data": folder / "prompts.parquet", "use_vllm": True,
        "vllm_mode": "server", "vllm_server_base_url": url, "num_generations": GROUP, "max_completion_length": 8,
        "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 2, "save_steps": 1,
        "logging_steps": 1, "save_strategy": "steps", "ddp_backend": "gloo", "output_dir": output / "run",
        "learning_rate": 1e-3,
    }  # fmt: skip
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
        *(__file__, str(output), *argv(common | fields)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(folder: Path, server: tuple[str, subprocess.Popen]) -> Path:
    """What two processes of 6 x 2 rows, N = 4, sent and received: every other group straddles them."""
    done = launch(folder, server[0], folder, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.engine
def test_each_mode_of_a_query_is_one_request_for_half_the_group(
    trained: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = mode_tokens(tokenizer)
    requests = json.loads((trained / "requests.json").read_text(encoding="utf-8"))
    for step in range(2):
        request = requests[step]
        assert (request["n"], request["max_tokens"]) == (GROUP // 2, 7), "the decision token is one of the 8"
        assert [prompt[-1] for prompt in request["prompts"]] == [tokens.think, tokens.no_think] * 6
        for think, no_think in zip(request["prompts"][::2], request["prompts"][1::2], strict=True):
            assert think[:-1] == no_think[:-1], "both modes of one query follow each other"

        rollouts = [torch.load(trained / f"rollout_{step}_{process}.pt", weights_only=True) for process in range(2)]
        rows = [
            (prompt[mask.bool()].tolist(), ids)
            for rollout in rollouts
            for prompt, mask, ids in zip(
                rollout["prompt_ids"], rollout["prompt_mask"], rollout["completion_ids"].tolist(), strict=True
            )
        ]
        assert len(rows) == 24
        for row, (prompt, completion) in enumerate(rows):  # each row got a response to its own query in its own mode
            assert [*prompt, completion[0]] == request["prompts"][row // (GROUP // 2)]
        for rollout in rollouts:
            assert rollout["sampling_per_token_logps"][:, 0].isnan().all()
            if step == 0:  # later the policy has moved on, and the server, without NCCL, has not
                mask = rollout["completion_mask"][:, 1:].bool()
                gap = (rollout["old_per_token_logps"] - rollout["sampling_per_token_logps"])[:, 1:]
                assert gap[mask].abs().max() < 1e-3, "same weights, same type: same log-probabilities"


@pytest.mark.engine
def test_the_weights_are_announced_by_the_names_they_have(trained: Path) -> None:
    announced = json.loads((trained / "announced.json").read_text(encoding="utf-8"))
    assert len(announced) == 2, "once for each step"
    model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype="float32")
    expected = [[name, "float32", list(value.shape)] for name, value in model.named_parameters()]
    assert announced[0] == announced[1] == expected


@pytest.mark.engine
def test_a_server_that_dies_during_the_training(
    folder: Path, server: tuple[str, subprocess.Popen], tmp_path: Path
) -> None:
    """Last in this file: the server does not come back."""
    url, process = server
    (tmp_path / "reward.py").write_text(
        "import os\nimport signal\ncalls = 0\n\n\ndef kills(completions, **kwargs):\n    global calls\n    calls += 1\n"
        f"    if calls == 3:\n        os.killpg({process.pid}, signal.SIGKILL)\n    return [0.5] * len(completions)\n",
        encoding="utf-8",
    )
    done = launch(folder, url, tmp_path, processes=1, max_steps=4, reward_funcs=f"{tmp_path}/reward.py:kills")
    assert done.returncode != 0
    assert f"The vLLM server at {url} failed at step 3: " in done.stderr
    assert "Training ended early, at step 3. The same command goes on from" in done.stdout
    assert "checkpoint-3." in done.stdout


if __name__ == "__main__":
    train(Path(sys.argv[1]), *sys.argv[2:])
    end()
