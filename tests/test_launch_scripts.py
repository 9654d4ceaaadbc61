"""Launch scripts: their syntax, what they name, and, with stand-ins for vLLM, accelerate and Slurm, what they start."""

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([ROOT / "recipes" / "vllm_server.sh", *ROOT.glob("recipes/slurm/*.slurm")])
PAIRS = sorted(ROOT.glob("recipes/*/hgpo_server.yaml"))
SLURM = {"SLURM_NNODES": "5", "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "node[1-5]"}

# Stand-ins, each writing down how it was called. The server answers, or not, until it is told to end.
LOG = 'printf "%s\\n" "{name} $CUDA_VISIBLE_DEVICES $VLLM_SERVER_DEV_MODE $*" >> "$CALLS"\n'
SERVER = """
import http.server, sys
port = int(sys.argv[1])
http.server.SimpleHTTPRequestHandler.do_GET = lambda self: (self.send_response(200), self.end_headers())
http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
STAND_INS = {
    "vllm": LOG + '[[ ${SERVER_FAILS:-} ]] && exit 3\nexec "$PYTHON" "$SERVER" "$PORT"\n',
    "accelerate": LOG + '[[ ${TRAINING_LASTS:-} ]] && exec sleep 3600\nexit "${TRAINING_STATUS:-0}"\n',
    "scontrol": "printf '%s\\n' node1 node2 node3 node4 127.0.0.1\n",
    "srun": LOG + 'while [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=3 exec "$@"\n',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which the stand-ins are found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body.replace('{name}', name)}")
        (folder / name).chmod(0o755)
    (tmp_path / "server.py").write_text(SERVER)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SERVER": str(tmp_path / "server.py"),
        "PYTHON": sys.executable,
        "PORT": "8000",  # of the recipes
        **SLURM,
    }


def calls(environment: dict[str, str]) -> list[str]:
    return Path(environment["CALLS"]).read_text().splitlines()


def run(script: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "recipes" / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def answers(port: int = 8000) -> bool:
    url = f"http://127.0.0.1:{port}/health"
    return subprocess.run(["curl", "--silent", "--fail", url], capture_output=True, check=False).returncode == 0


@pytest.fixture
def free_port() -> None:
    if answers():
        pytest.skip("something else listens on port 8000")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax_and_care(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    directives = [i for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    assert bool(directives) == (path.suffix == ".slurm")
    if directives:  # Slurm reads no directive after the first command
        assert max(directives) < text[: text.index("set -euo")].count("\n")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_names_exists(path: Path) -> None:
    """With each of the paper's models for $name, and every accelerate config that a script chooses itself."""
    text = path.read_text(encoding="utf-8")
    for model in {pair.parent.name for pair in PAIRS}:
        for template in re.findall(r"recipe=(\S+)", text):
            assert (ROOT / template.replace("$name", model)).is_file()
    chosen = set(re.findall(r"\b(?:ACCELERATE|accelerate)=(\w+)", text))
    assert chosen == {"zero2", "zero3"}
    for name in chosen:
        assert (ROOT / "recipes" / "accelerate" / f"{name}.yaml").is_file()
    for module in re.findall(r"-m (hgpo_trl[\w.]+)", text):
        assert find_spec(module) is not None


def test_flags_of_vllm_exist() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = {
        option for action in make_arg_parser(FlexibleArgumentParser())._actions for option in action.option_strings
    }
    for path in SCRIPTS:
        for serve in re.findall(r"vllm serve.*?&\n", path.read_text(encoding="utf-8"), re.DOTALL):
            flags = re.findall(r"(?<=\s)(--[\w-]+)", serve)
            assert len(flags) >= 8
            assert set(flags) <= known


def test_flags_of_accelerate_exist() -> None:
    from accelerate.commands.launch import launch_command_parser

    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for path in SCRIPTS:
        launch = re.findall(r"accelerate launch(.*?)(?:-m hgpo|\n\))", path.read_text(encoding="utf-8"), re.DOTALL)
        assert launch
        for flag in re.findall(r"(?<=\s)(--[\w-]+)", "".join(launch)):
            assert flag in known


# --- one node -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.parent.name)
@pytest.mark.usefixtures("free_port")
def test_one_node_server_and_training(pair: Path, environment: dict[str, str]) -> None:
    recipe = yaml.safe_load(pair.read_text(encoding="utf-8"))
    result = run("vllm_server.sh", environment, pair.parent.name, "--seed", "3")
    assert result.returncode == 0, result.stderr
    serve, train = calls(environment)
    assert serve.startswith(f"vllm 4,5,6,7 1 serve {recipe['model_name_or_path']} --host 127.0.0.1 --port 8000 ")
    assert f"--data-parallel-size 4 --dtype bfloat16 --max-model-len {recipe['vllm_max_model_length']} " in serve
    assert '--weight-transfer-config {"backend": "nccl"} --logprobs-mode processed_logprobs --max-logprobs -1' in serve
    zero = "zero3" if pair.parent.name.endswith("7b") else "zero2"
    assert train == (
        f"accelerate 0,1,2,3  launch --config_file recipes/accelerate/{zero}.yaml --num_processes 4 "
        f"-m hgpo_trl.scripts.hgpo --config {pair.relative_to(ROOT)} --seed 3"
    )
    assert not answers(), "the server ends with the training"


@pytest.mark.usefixtures("free_port")
def test_failed_training_ends_the_server_and_is_reported(environment: dict[str, str]) -> None:
    result = run("vllm_server.sh", {**environment, "TRAINING_STATUS": "7"}, PAIRS[0].parent.name)
    assert result.returncode == 7
    assert not answers()


@pytest.mark.usefixtures("free_port")
def test_server_that_does_not_start_is_reported_before_any_training(environment: dict[str, str]) -> None:
    result = run("vllm_server.sh", {**environment, "SERVER_FAILS": "1"}, PAIRS[0].parent.name)
    assert result.returncode == 1
    assert "ended before it was ready" in result.stderr
    assert len(calls(environment)) == 1


@pytest.mark.usefixtures("free_port")
def test_server_that_ends_during_the_training_ends_it(environment: dict[str, str]) -> None:
    command = ["bash", str(ROOT / "recipes" / "vllm_server.sh"), PAIRS[0].parent.name]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**environment, "TRAINING_LASTS": "1"}, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (Path(environment["CALLS"]).is_file() and len(calls(environment)) == 2):
            time.sleep(0.1)
            assert process.poll() is None
        servers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", environment["SERVER"]], capture_output=True)
        os.kill(int(servers.stdout.split()[0]), 15)
        assert process.wait() == 1
    finally:
        process.terminate()
    assert process.stderr is not None
    assert "ended during the training" in process.stderr.read()


def test_usage(environment: dict[str, str]) -> None:
    result = run("vllm_server.sh", environment, "--seed", "3")
    assert (result.returncode, "usage: " in result.stderr) == (2, True)


# --- several nodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "nodes", "machines", "recipe", "accumulation"),
    [
        ("hft.slurm", 4, 4, "hft", {"1.5b": 4, "7b": 4}),  # 1 row x 32 processes x 4 = 128
        ("hgpo_colocate.slurm", 4, 4, "hgpo", {"1.5b": 4, "7b": 16}),  # 8 or 2 rows x 32 processes = 1,024
        ("hgpo_server.slurm", 5, 4, "hgpo_server", {"1.5b": 4, "7b": 16}),
    ],
)
@pytest.mark.parametrize("size", ["1.5b", "7b"])
@pytest.mark.usefixtures("free_port")
def test_slurm(
    script: str, nodes: int, machines: int, recipe: str, accumulation: dict[str, int], size: str, environment: dict
) -> None:
    name = f"qwen2.5-math-{size}"
    result = run(f"slurm/{script}", {**environment, "SLURM_NNODES": str(nodes)}, name, "--seed", "3")
    assert result.returncode == 0, result.stderr
    lines = calls(environment)
    (train,) = [line for line in lines if line.startswith("accelerate ")]
    zero = "zero3" if size == "7b" else "zero2"
    server = " --vllm_server_host 127.0.0.1" if recipe == "hgpo_server" else ""
    assert train.split(maxsplit=1)[1] == (
        f"launch --config_file recipes/accelerate/{zero}.yaml --num_machines {machines} "
        f"--num_processes {machines * 8} --main_process_ip node1 --main_process_port 29734 --rdzv_backend static "
        f"--machine_rank 3 -m hgpo_trl.scripts.{recipe.split('_')[0]} --config recipes/{name}/{recipe}.yaml "
        f"--gradient_accumulation_steps {accumulation[size]}{server} --seed 3"
    )
    serving = [line for line in lines if line.startswith("vllm ")]
    assert len(serving) == (recipe == "hgpo_server")
    if serving:
        assert f" 1 serve runs/{name}/hft --host 0.0.0.0 --port 8000 --data-parallel-size 8 " in serving[0]
        assert any("--nodes=1 --ntasks=1 --nodelist=127.0.0.1 vllm" in line for line in lines)
        assert any("--nodes=4 --ntasks=4 --nodelist=node1,node2,node3,node4" in line for line in lines)
        assert not answers()


def test_slurm_with_another_accelerate_config(environment: dict[str, str]) -> None:
    result = run("slurm/hft.slurm", environment | {"SLURM_NNODES": "2"}, "qwen2.5-math-7b", "zero3_offload")
    assert result.returncode == 0, result.stderr
    assert "--config_file recipes/accelerate/zero3_offload.yaml --num_machines 2 " in calls(environment)[-1]


@pytest.mark.parametrize("script", ["hft.slurm", "hgpo_colocate.slurm"])
def test_batch_that_does_not_come_out_is_refused(script: str, environment: dict[str, str]) -> None:
    result = run(f"slurm/{script}", environment | {"SLURM_NNODES": "3"}, "qwen2.5-math-7b")
    assert result.returncode == 1
    assert "24 processes of" in result.stderr
    assert not Path(environment["CALLS"]).is_file()
