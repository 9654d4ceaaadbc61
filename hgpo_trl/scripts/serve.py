"""`hgpo-trl serve --model MODEL [vLLM's arguments ...]`: run vLLM's OpenAI-compatible server with split reasoning."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import resources

from hgpo_trl.common.errors import run_stage
from hgpo_trl.common.files import expand_path
from hgpo_trl.inference.vllm_support import check_vllm_installed
from hgpo_trl.training.model_dir import check_model_path


def command(model: str, arguments: Sequence[str]) -> list[str]:
    """The command line of vLLM's server with the reasoning parser, its split deltas and the decision bias."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--reasoning-parser-plugin", str(resources.files("hgpo_trl.serving").joinpath("vllm_reasoning.py"))),
        *("--reasoning-parser", "lhrm"),
        *("--middleware", "hgpo_trl.serving.vllm_deltas.SplitDeltas"),
        *("--logits-processors", "hgpo_trl.serving.vllm_decision:DecisionBias"),
        *arguments,
    ]


def main(argv: Sequence[str]) -> None:
    """Replace this process by the server."""
    parser = argparse.ArgumentParser("hgpo-trl serve", allow_abbrev=False, description=__doc__)
    parser.add_argument("--model", required=True, help="name or path of the model")
    arguments, rest = parser.parse_known_args(argv)
    model = expand_path("model", arguments.model)
    check_vllm_installed("hgpo-trl serve")
    check_model_path("model", model)
    words = command(model, rest)
    os.execv(words[0], words)


if __name__ == "__main__":
    run_stage(main, "serve", sys.argv[1:])
