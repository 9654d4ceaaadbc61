"""Samples of both modes by vLLM."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.evaluation.processes import own_share
from hgpo_trl.evaluation.samples import Generated, samples_table
from hgpo_trl.inference.decoding import FirstToken, end_tokens, render
from hgpo_trl.inference.limits import Limits, ThinkBudget
from hgpo_trl.modes import MODES, OTHER, ModeTokens, mode_tokens
from hgpo_trl.modes.decision import OFF_MODE
from hgpo_trl.modes.hybrid_accuracy import THINK

if TYPE_CHECKING:
    from vllm import LLM  # importing it takes seconds, and it is optional


@contextmanager
def running_engine(
    model: str,
    *,
    longest_prompt: int,
    max_new_tokens: int,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
) -> Iterator["LLM"]:
    """Start a vLLM engine, and shut it down on leaving. By default it runs in processes of its own.

    A process that is terminated meanwhile shuts its engine down, too, and ends with status 143.

    Args:
        model: path or hub id.
        longest_prompt: tokens, without the decision.
        max_new_tokens: per response, the decision token included.
        dtype: of the weights; `auto` is the type that they are saved in, as in Transformers.
        tensor_parallel_size: GPUs that share the model.
        gpu_memory_utilization: the engine's share of each GPU's memory.

    Raises:
        UserError: the model has too few positions for the longest prompt and its response.
    """
    from vllm import LLM, EngineArgs
    from vllm.platforms import current_platform

    weights_dtype: Any = dtype
    if dtype == "auto":  # vLLM's own `auto` makes bfloat16 of float32
        weights_dtype = AutoConfig.from_pretrained(model).dtype or dtype
    needed = longest_prompt + max_new_tokens
    available = EngineArgs(model=model, dtype=weights_dtype).create_model_config().max_model_len
    if needed > available:
        raise UserError(
            f"max_new_tokens={max_new_tokens} and the longest prompt of {longest_prompt} tokens need {needed} "
            f"positions, but the model {model!r} has {available} (max_position_embeddings). Lower max_new_tokens, drop "
            "the longest prompts, or set backend to transformers, which does not check it."
        )
    with _termination_as_exit():
        with own_devices(tensor_parallel_size):
            engine = LLM(
                model=model,
                dtype=weights_dtype,
                max_model_len=needed,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                logprobs_mode="raw_logprobs",  # of the model itself, whatever the sampling
                # On a CPU a seeded request whose prompt is cut ends the engine: torch's CPU generator has no offset.
                enable_chunked_prefill=False if current_platform.is_cpu() else None,
            )
        try:
            yield engine
        finally:
            engine.llm_engine.engine_core.shutdown(timeout=30)  # seconds; its processes end themselves first


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Make SIGTERM an exception: an engine's processes outlive a process that the signal itself ends."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals there alone
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as a shell reports it
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def own_devices(each: int) -> Iterator[None]:
    """Where several processes have an engine each, show the processes of an engine that starts here its own devices.

    On a CPU these are groups of cores, if `VLLM_CPU_OMP_THREADS_BIND` has several: 0-15|16-31.

    Args:
        each: devices of an engine.

    Raises:
        UserError: there are too few for all processes on this machine.
    """
    from vllm.platforms import current_platform

    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        yield
        return
    before = dict(os.environ)
    if not current_platform.is_cpu():
        name = current_platform.device_control_env_var
        visible = os.environ.get(name)
        devices = visible.split(",") if visible else list(map(str, range(torch.accelerator.device_count())))
        os.environ[name] = ",".join(own_share("accelerators", devices, each))
    elif "|" in (cores := os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")):
        groups = own_share("groups of cores (VLLM_CPU_OMP_THREADS_BIND)", cores.split("|"), each)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(groups)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # an engine's processes meet at a store of their own
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def sample_both_modes(
    engine: "LLM",
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    samples_per_mode: int,
    max_new_tokens: int,
    max_think_tokens: int | None = None,
    max_no_think_tokens: int | None = None,
    think_budget: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    progress: tqdm | None = None,
) -> pd.DataFrame:
    """As `hgpo_trl.evaluation.transformers_backend.sample_both_modes`, with an engine of `running_engine`.

    vLLM shows a bar of its own while it generates, unless `progress` is disabled; `progress` moves at the end.

    Args:
        numbers: of the prompts, among all that are sampled with this seed; None: 0, 1, 2, ... A prompt's random numbers
            depend on its number and the seed, not on the prompts beside it.
    """
    tokens = mode_tokens(tokenizer)
    ids = render(tokenizer, prompts)
    generation_config = engine.llm_engine.model_config.try_get_generation_config()
    ends = end_tokens(tokenizer, generation_config.get("eos_token_id"))
    decisions = _read_decisions(engine, ids, tokens)
    limits = Limits(max_new_tokens, max_think_tokens, max_no_think_tokens, think_budget)
    rooms, budget = limits.rooms(tokens), limits.budget(tokenizer, tokens)
    seeds = [derived_seed(seed, number) for number in numbers or range(len(ids))]
    shown = progress is None or not progress.disable
    responses = _generate(engine, ids, tokens, ends, samples_per_mode, rooms, budget, temperature, top_p, seeds, shown)
    samples = samples_table(tokenizer, decisions, responses, ends)
    if progress is not None:
        progress.update(len(samples))
    return samples


def _read_decisions(engine: "LLM", ids: list[list[int]], tokens: ModeTokens) -> list[FirstToken]:
    from vllm import SamplingParams, TokensPrompt

    beginnings = tokens.beginnings
    requests, params = [], []
    for row in ids:
        for beginning, following in beginnings.items():
            requests.append(TokensPrompt(prompt_token_ids=[*row, *beginning]))
            asked = list(following)
            params.append(SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=asked, detokenize=False))
    results = iter(engine.generate(requests, params, use_tqdm=False))
    decisions: list[FirstToken] = []
    for _ in ids:
        log_probs: dict[tuple[int, ...], float] = {}  # of a beginning's last token, behind the others
        greedy: dict[tuple[int, ...], int] = {}
        for beginning, following in beginnings.items():
            (output,) = next(results).outputs
            assert output.logprobs is not None  # they were asked for
            log_probs |= {(*beginning, token): output.logprobs[0][token].logprob for token in following}
            (greedy[beginning],) = output.token_ids
        think, no_think = tokens.probabilities(log_probs)
        picked = tokens.picked(greedy)
        decisions.append((think, no_think, OFF_MODE if picked is None else MODES.index(picked)))
    return decisions


def _generate(
    engine: "LLM",
    ids: list[list[int]],
    tokens: ModeTokens,
    ends: list[int],
    samples_per_mode: int,
    rooms: Sequence[int],
    budget: ThinkBudget | None,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    show_progress: bool,
) -> Iterator[Generated]:
    """One call for all, if it can be: vLLM forms its batches, and a prompt's samples and modes share their prefix.

    Responses of a mode that is OTHER, and think responses with a budget, go on in a call of their own.

    Args:
        seeds: of the prompts.
    """
    from vllm import SamplingParams, TokensPrompt

    greedy = temperature == 0
    keys = [(prompt, mode) for prompt in range(len(ids)) for mode in range(len(MODES))]
    other = tokens.decision.index(OTHER) if OTHER in tokens.decision else None
    drawn_opening = int(other == THINK)  # tokens of the opening that are drawn

    def params(prompt: int, request: str, num_samples: int, max_tokens: int, **settings: Any) -> SamplingParams:
        return SamplingParams(
            n=1 if greedy else num_samples,  # vLLM takes n = 1 only where all would be the same
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            stop_token_ids=ends,
            # Sample i of a request is drawn with its seed + i: no two responses share one unless their requests do.
            seed=derived_seed(seeds[prompt], request) * samples_per_mode,
            detokenize=False,
            **settings,
        )

    def sample(responses: Sequence[tuple[int, int, list[int]]], settings: list[SamplingParams]) -> Any:
        requests = [
            TokensPrompt(prompt_token_ids=[*ids[prompt], *tokens.openings[mode], *begun])
            for prompt, mode, begun in responses
        ]
        return engine.generate(requests, settings, use_tqdm=show_progress) if requests else []

    def first(prompt: int, mode: int) -> SamplingParams:
        if mode == other:  # any token but the other mode's
            ban = {tokens.decision[1 - mode]: -100.0}
            return params(prompt, MODES[mode], samples_per_mode, 1, logit_bias=ban)
        return params(prompt, MODES[mode], samples_per_mode, behind_opening(mode))

    def behind_opening(mode: int) -> int:
        return budget.tokens if budget is not None and mode == THINK else rooms[mode]

    results = sample([(prompt, mode, []) for prompt, mode in keys], [first(prompt, mode) for prompt, mode in keys])
    responses = []
    for (prompt, mode), result in zip(keys, results, strict=True):
        outputs = [list(output.token_ids) for output in result.outputs] * (samples_per_mode if greedy else 1)
        responses += [Generated(prompt, mode, number, output) for number, output in enumerate(outputs)]

    def request(begun: Generated) -> str:
        return f"{MODES[begun.mode]} {begun.sample} behind {len(begun.tokens)}"

    def extend(places: list[int], most: Callable[[Generated], int]) -> None:
        begun = [responses[place] for place in places]
        results = sample(
            [(response.prompt, response.mode, response.tokens) for response in begun],
            [params(response.prompt, request(response), 1, most(response)) for response in begun],
        )
        for place, response, result in zip(places, begun, results, strict=True):
            responses[place] = response._replace(tokens=[*response.tokens, *result.outputs[0].token_ids])

    if other is not None:
        begun = [place for place, response in enumerate(responses) if response.mode == other]
        extend([place for place in begun if responses[place].tokens[-1] not in ends], lambda _: behind_opening(other))
    if budget is not None:
        cut = [
            place
            for place, response in enumerate(responses)
            if response.mode == THINK and budget.goes_on(response.tokens[drawn_opening:], ends)
        ]
        for place in cut:
            opened, reasoning = responses[place].tokens[:drawn_opening], responses[place].tokens[drawn_opening:]
            responses[place] = responses[place]._replace(tokens=[*opened, *budget.closed(reasoning)])
        extend(cut, lambda response: rooms[THINK] + drawn_opening - len(response.tokens))
    yield from responses
