"""Rewards: one scalar per response, from its answer part alone, lowest where the format is broken (Eq. 7).

Reward functions are TRL's: the trainer and the evaluation split every response once, show the functions its answer part
in place of the completion, and set the reward of a broken format themselves. No reward depends on the mode's cost:
no length penalty and no format bonus, both of which a policy learns to exploit.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_callable_name, is_async_callable

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.imports import load_function
from hgpo_trl.modes import LHRM, ModeFormat, Response, completion_text, split_response
from hgpo_trl.verification import check_answers

logger = logging.getLogger(__name__)


# --- inputs and outputs of reward functions ----------------------------------------------------------------------


def split_completions(completions: list, mode_format: ModeFormat = LHRM) -> list[Response]:
    """Split every completion, a text or a conversation of one assistant message."""
    texts = [completion_text(completion) for completion in completions]
    parts = {
        text: split_response(text, mode_format) for text in dict.fromkeys(texts)
    }  # many short answers are the same
    return [parts[text] for text in texts]


def answer_parts(completions: list, responses: list[Response]) -> list:
    """The completions in the form they have, with the answer part as their whole text."""
    return [
        response.answer if isinstance(completion, str) else [{**completion[0], "content": response.answer}]
        for completion, response in zip(completions, responses, strict=True)
    ]


def check_finite(rewards: Tensor, names: Sequence[str]) -> None:
    """Raise UserError if a reward is infinite, with the name of its function.

    Args:
        rewards: `[B, F]`, one column per reward function, NaN where it gives none.
        names: of the functions.
    """
    infinite = rewards.isinf()
    if infinite.any():
        row, column = infinite.nonzero()[0].tolist()
        raise UserError(
            f"The reward function {names[column]!r} returned {rewards[row, column]}, of which no mean can be taken. "
            "Return a finite number (in training, of float32), or None where there is no reward."
        )


def floor_faults(rewards: Tensor, faulty: Tensor, query: Tensor, weights: Tensor | None = None) -> Tensor:
    """Give every faulty response the lowest reward of its query, whatever reward its answer part got.

    That is 0, or the lowest reward of the query's well-formed responses in the same column if it is below 0: a broken
    format must not be the better choice where scores can be negative. Other queries' rewards do not matter. A query
    whose responses are all faulty gets 0 throughout.

    Where a column is NaN for all responses of a query, its function does not score that query, and the column stays
    NaN. If all columns are NaN, the query carries no signal.

    Args:
        rewards: `[B, F]`, one column per reward function, NaN where it gives none.
        faulty: `[B]`, whether the response breaks the format.
        query: `[B]`, the number of the query that a response answers.
        weights: `[F]`; for a column whose weight is negative the highest reward takes the place of the lowest. None: no
            such column.

    Returns:
        `[B, F]`.
    """
    if weights is not None and (weights < 0).any():
        sign = torch.where(weights < 0, -1.0, 1.0).to(rewards)
        return sign * floor_faults(sign * rewards, faulty, query)
    scored = ~rewards.isnan()
    faulty = faulty.bool()[:, None]
    shape = (int(query.max()) + 1, rewards.shape[1])
    covered = torch.zeros(shape, dtype=torch.long, device=rewards.device).index_add_(0, query, scored.long()) > 0
    well_formed = rewards.where(scored & ~faulty, 0.0)
    places = query[:, None].expand_as(rewards)
    floor = rewards.new_zeros(shape).scatter_reduce_(0, places, well_formed, "amin")
    return torch.where(faulty & covered[query], floor[query], rewards)


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """r of Eq. 7: the weighted sum of the reward functions that score a response.

    Args:
        rewards: `[B, F]`, one column per reward function, NaN where it gives none.
        weights: `[F]`.

    Returns:
        `[B]`, NaN where no function scores the response: that is not a reward of 0.
    """
    return (rewards * weights).nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)


def check_weights(weights: Sequence[float] | None, num_functions: int | None = None) -> None:
    """Raise UserError unless all `reward_weights` are finite; None is 1 each.

    Args:
        num_functions: how many reward functions there are, where that is known; each needs one weight.
    """
    if not all(map(math.isfinite, weights or [])):
        raise UserError(f"reward_weights must be finite numbers; got {weights}.")
    if weights is not None and num_functions not in (None, len(weights)):
        raise UserError(
            f"reward_weights has {len(weights)} entries for {num_functions} reward functions. Give one for each of "
            "reward_funcs and, last, one for reward_model where there is one."
        )


def overlong(lengths: Tensor, well_formed: Tensor, cap: float | None = None, max_tokens: int | None = None) -> Tensor:
    """Which no-think responses answer at greater length than they may: they reason unmarked (TNT, arXiv 2601.04805).

    Args:
        lengths: `[Q, 2, N/2]`, tokens of the answer part.
        well_formed: of the same shape.
        cap: the limit as a multiple of the query's longest answer part among its well-formed think responses; without
            such a response there is no limit by this rule.
        max_tokens: the limit in tokens.

    Returns:
        `[Q, 2, N/2]`, False for every think response.
    """
    limit = torch.full_like(lengths[:, 0, 0], torch.inf, dtype=torch.float64)
    if cap is not None:
        longest = torch.where(well_formed[:, 0].bool(), lengths[:, 0], -1).amax(dim=1).double()
        limit = torch.where(longest < 0, torch.inf, cap * longest)
    if max_tokens is not None:
        limit = limit.clamp(max=max_tokens)
    beyond = torch.zeros_like(lengths, dtype=torch.bool)
    beyond[:, 1] = lengths[:, 1] > limit[:, None]
    return beyond


def check_bounded(rewards: Tensor, weights: Tensor, names: list[str]) -> None:
    """Check that no response's weighted sum of rewards can exceed 1 or fall below 0, as `lazy_thinking` takes it.

    Args:
        rewards: `[B, F]`, one column per reward function, NaN where it gives none.
        weights: `[F]`, not negative.
        names: of the functions.

    Raises:
        UserError: a reward lies outside [0, 1], or the weights of the functions that score the same response add up to
            more than 1.
    """
    outside = (rewards < 0) | (rewards > 1)  # False for NaN
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise UserError(
            f"lazy_thinking needs rewards between 0 and 1, but {names[column]!r} gave {rewards[row, column]:.6g}. "
            "Rescale it (reward_model_squash=true does that for the reward model), or set lazy_thinking=false."
        )
    scored = ~rewards.isnan()
    totals = scored.to(weights.dtype) @ weights
    if totals.max() > 1 + 1e-6:
        row = int(totals.argmax())
        together = " and ".join(name for name, has in zip(names, scored[row].tolist(), strict=True) if has)
        raise UserError(
            f"lazy_thinking needs a sum of rewards of at most 1, but {together} score the same response and their "
            f"reward_weights add up to {totals[row]:.6g}. Lower reward_weights, or set lazy_thinking=false."
        )


def is_model(reward_func: Any) -> bool:
    """Whether TRL runs it as a sequence classifier: a model, or its id or path."""
    return isinstance(reward_func, (str, nn.Module))


def _with_response(columns: dict[str, Any]) -> tuple[list[bool], dict[str, Any]]:
    """Which rows have a `response` (all, if there is no such column), and the columns of these rows."""
    kept = [response is not None for response in columns.get("response") or columns["completions"]]
    return kept, {
        name: [*compress(value, kept)] if isinstance(value, list) and len(value) == len(kept) else value
        for name, value in columns.items()
    }


def checked(reward_func: Any) -> Any:
    """Wrap a reward function so that every error names it; return a reward model unchanged.

    Rows whose `response` is None are not shown to it and get 0; it is not called where no row is left.

    Raises (when called):
        UserError: it returns something else than one number or None per completion.
    """
    if is_model(reward_func):
        return reward_func
    name = get_callable_name(reward_func)

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(f"Raised by the reward function {name!r}.")
            raise

    def numbers(rewards: Any, kept: list[bool]) -> list[float]:
        rule = "it must return one number, or None, per completion"
        try:
            values = [math.nan if reward is None else math.fsum((reward,)) for reward in rewards]
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"The reward function {name!r} returned {_short(rewards)} ({error}): {rule}.") from error
        if len(values) != sum(kept):
            raise UserError(
                f"The reward function {name!r} returned {len(values)} rewards for {sum(kept)} completions: {rule}."
            )
        remaining = iter(values)
        return [next(remaining) if shown else 0.0 for shown in kept]

    async def later(**columns: Any) -> list[float]:
        kept, shown = _with_response(columns)
        with named():
            rewards = await reward_func(**shown) if any(kept) else []
        return numbers(rewards, kept)

    def at_once(**columns: Any) -> list[float]:
        kept, shown = _with_response(columns)
        with named():
            rewards = reward_func(**shown) if any(kept) else []
        return numbers(rewards, kept)

    call = later if is_async_callable(reward_func) else at_once
    call.__name__ = name
    return call


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


# --- the rule ---------------------------------------------------------------------------------------------------


def has_answer(reference: Any) -> bool:
    """Whether a row's `answer` is one to compare with: not None, and not blank."""
    return reference is not None and bool(str(reference).strip())


def accuracy_reward(
    completions: list,
    answer: list | None = None,
    response: list[Response] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 for a well-formed response whose answer part equals the reference answer, else 0.0.

    Args:
        completions: answers, as text or as a conversation of one message. A caller that has not split the responses may
            pass them whole: text that begins with <think> or <no_think> is split here, any other text is an answer.
        answer: the data set's column of reference answers, one per completion. A row without one is not scored.
        response: the parts of every response, from a caller that has split them; `completions` is not read then.
        log_metric: of TRL. The share of answers that the verifier could not judge goes to `hgpo/verifier_failures`.

    Returns:
        One of 1.0, 0.0 and None (no reference answer, or none that the verifier could judge) per completion.
    """
    references = None if answer is None else [reference if has_answer(reference) else None for reference in answer]
    return verified("The verifier", check_answers, completions, references, response, log_metric)


def verified(
    name: str,
    verify: Callable[[Sequence[str], Sequence[str]], Sequence[float | None]],
    completions: list,
    references: list | None,
    response: list[Response] | None,
    log_metric: Callable[[str, float], None] | None,
) -> list[float | None]:
    """Rewards of a verifier: its verdict on a well-formed response's answer, 0.0 for a malformed response.

    Args:
        name: of the verifier, for the warning.
        verify: takes references and answers; returns a verdict on each, None where it cannot judge.
        completions, response, log_metric: as of `accuracy_reward`.
        references: one per completion, None where there is nothing to compare with; None: for none of them.

    Returns:
        One per completion; None without a reference or a verdict.
    """
    responses = response or [_answer_or_response(completion_text(completion)) for completion in completions]
    references = references or [None] * len(responses)
    rewards: list[float | None] = [
        None if reference is None else 0.0 for reference, _ in zip(references, responses, strict=True)
    ]
    rows = [row for row, reward in enumerate(rewards) if reward is not None and responses[row].well_formed]
    verdicts = verify([str(references[row]) for row in rows], [responses[row].answer for row in rows])
    for row, verdict in zip(rows, verdicts, strict=True):
        rewards[row] = None if verdict is None else float(verdict)
    if None in verdicts:
        _warn_once(
            f"{name} was stuck or crashed and could not judge an answer. Such a response gets no reward and "
            "carries no signal; hgpo/verifier_failures is their share."
        )
    if rows and log_metric is not None:
        log_metric("hgpo/verifier_failures", list(verdicts).count(None) / len(rows))
    return rewards


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _answer_or_response(text: str) -> Response:
    response = split_response(text)
    return response if response.mode else Response(None, "", response.answer, ())


# --- reward functions by name -------------------------------------------------------------------------------------


def load_reward(name: str) -> Callable | str:
    """Load a function by "package.module.function" or "path/to/file.py:function"; return a reward model's id or path.

    Raises:
        UserError: the file, the module or the function does not exist, or no function is named.
    """
    if not name.endswith(".py") and (("/" in name and ".py:" not in name) or Path(name).exists()):
        return name
    if "." not in name:
        raise UserError(
            f"reward_funcs: {name!r} is neither a function (package.module.function or path/to/file.py:function) nor a "
            "reward model's id or path."
        )
    return load_function("reward_funcs", name)
