"""The vLLM backend of the evaluation without an engine: the decision and the forced modes in every kind of format."""

import math
import random
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_formats import OPENINGS, SIZE, Chain, tokens_of

from hgpo_trl.inference.limits import Limits
from hgpo_trl.modes import MODES, OTHER
from hgpo_trl.modes.decision import OFF_MODE, read_decision

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (the extra `vllm`)")


class Engine:
    """An engine whose next token depends on the last one alone, with vLLM's requests and answers.

    Sample i of a request is drawn with the request's seed + i, as by vLLM.
    """

    def __init__(self, probs: torch.Tensor) -> None:
        self.probs = probs

    def _draw(self, last: int, params: Any, rng: random.Random) -> int:
        weights = self.probs[last].clone()
        for token, bias in (params.logit_bias or {}).items():
            weights[token] *= math.exp(bias)
        if params.temperature == 0:
            return int(weights.argmax())
        return rng.choices(range(SIZE), weights.tolist())[0]

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool = True) -> list[Any]:
        assert len(prompts) == len(params)
        return [
            self._answer(prompt["prompt_token_ids"], settings) for prompt, settings in zip(prompts, params, strict=True)
        ]

    def _answer(self, prompt: list[int], params: Any) -> Any:
        outputs = []
        for number in range(params.n):
            rng = random.Random((params.seed or 0) + number)
            ids = list(prompt)
            while len(ids) < len(prompt) + params.max_tokens and ids[len(prompt) :][-1:] not in (
                [token] for token in params.stop_token_ids
            ):
                ids.append(self._draw(ids[-1], params, rng))
            asked = params.logprob_token_ids or []
            found = {token: SimpleNamespace(logprob=math.log(self.probs[prompt[-1], token])) for token in asked}
            outputs.append(SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=[found]))
        return SimpleNamespace(outputs=outputs)


@pytest.fixture(params=range(3))
def probs(request: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(request.param)
    return torch.rand(SIZE, SIZE, generator=generator).double().mul(3).softmax(-1)


@pytest.mark.parametrize(("think", "no_think"), OPENINGS)
def test_decisions_are_those_of_transformers(think: tuple, no_think: tuple, probs: torch.Tensor) -> None:
    from hgpo_trl.evaluation.vllm_backend import _read_decisions

    tokens, prompts = tokens_of(think, no_think), [[0], [6, 0], [6]]
    found = _read_decisions(Engine(probs), prompts, tokens)  # type: ignore[arg-type]
    for prompt, (of_think, of_no_think, picked) in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = read_decision(Chain(probs), ids, torch.ones_like(ids), tokens)
        assert of_think == pytest.approx(float(expected.think), rel=1e-5)
        assert of_no_think == pytest.approx(float(expected.no_think), rel=1e-5)
        assert picked == int(expected.picked)
        assert picked in (0, 1, OFF_MODE)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("think", "no_think"), OPENINGS)
def test_responses_begin_with_their_mode(
    think: tuple, no_think: tuple, temperature: float, probs: torch.Tensor
) -> None:
    from hgpo_trl.evaluation.vllm_backend import _generate

    tokens, ends, longest = tokens_of(think, no_think), [2], 12
    found = list(
        _generate(
            Engine(probs), [[0], [6]], tokens, ends, samples_per_mode=3, rooms=Limits(longest).rooms(tokens),
            budget=None, temperature=temperature, top_p=1.0, seeds=[0, 1], show_progress=False,
        )  # type: ignore[arg-type]
    )  # fmt: skip
    keys = [(generated.prompt, generated.mode, generated.sample) for generated in found]
    assert sorted(keys) == [(prompt, mode, sample) for prompt in range(2) for mode in range(2) for sample in range(3)]
    for generated in found:
        opening = tokens.openings[generated.mode]
        response = [*opening, *generated.tokens]
        assert tokens.chosen(response) is MODES[generated.mode]
        assert len(response) <= longest
        assert not set(generated.tokens[:-1]) & set(ends), "nothing follows the end"
        if tokens.decision[generated.mode] == OTHER:
            assert generated.tokens[0] != tokens.decision[1 - generated.mode]


@pytest.mark.parametrize(("think", "no_think"), OPENINGS)
def test_samples_of_a_prompt_depend_on_its_seed_alone(think: tuple, no_think: tuple, probs: torch.Tensor) -> None:
    """Not on the prompts beside it, so that any number of processes draws the same."""
    from hgpo_trl.evaluation.vllm_backend import _generate

    tokens = tokens_of(think, no_think)

    def responses(ids: list[list[int]], seeds: list[int]) -> dict[Any, list[int]]:
        found = _generate(
            Engine(probs), ids, tokens, [2], samples_per_mode=3, rooms=Limits(12).rooms(tokens), budget=None,
            temperature=1.0, top_p=1.0, seeds=seeds, show_progress=False,
        )  # type: ignore[arg-type]  # fmt: skip
        return {(seeds[prompt], mode, sample): response for prompt, mode, sample, response in found}

    together = responses([[0], [6], [6], [0]], [10, 11, 12, 13])
    assert responses([[6]], [12]) | responses([[0], [0], [6]], [13, 10, 11]) == together
    drawn = [[together[seed, mode, sample] for mode in range(2) for sample in range(3)] for seed in (11, 12)]
    assert drawn[0] != drawn[1], "of the same prompt"
