"""Rewards: one scalar per response, from its answer part alone, 0 where the format is broken (Eq. 7, the rule).

They are ordinary TRL reward functions and know nothing of what a mode costs: no length penalty and no format bonus,
both of which a policy learns to exploit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hgpo_trl.imports import load_module
from hgpo_trl.modes import completion_text, split_response
from hgpo_trl.verification import check_answers


def accuracy_reward(completions: list, answer: list[str | None], **kwargs: Any) -> list[float | None]:
    """1.0 for a well-formed response whose answer part equals the reference answer, else 0.0.

    Args:
        completions: as TRL passes them, mode tags included.
        answer: the data set's column of reference answers, one per completion. Rows without one (None or blank) are not
            scored.

    Returns:
        One of 1.0, 0.0 and None (no reference answer, or the verifier got stuck on it) per completion.
    """
    responses = [split_response(completion_text(completion)) for completion in completions]
    references = ["" if reference is None else str(reference) for reference in answer]
    scored = [bool(reference.strip()) for reference in references]
    rows = [i for i, row in enumerate(zip(scored, responses, strict=True)) if row[0] and row[1].well_formed]
    right = check_answers([references[i] for i in rows], [responses[i].answer for i in rows])
    rewards = [0.0 if is_scored else None for is_scored in scored]
    for i, verdict in zip(rows, right, strict=True):
        rewards[i] = None if verdict is None else float(verdict)
    return rewards


def load_reward(name: str) -> Callable | str:
    """A reward function by "package.module.function" or "path/to/file.py:function"; else a reward model's id or path.

    Raises:
        ValueError: the file, the module or the function does not exist, or no function is named.
    """
    if name.endswith(".py"):
        raise ValueError(f"reward_funcs: {name!r} names a file but no function in it: write {name}:function.")
    source, separator, function = name.rpartition(":" if ".py:" in name else ".")
    if ("/" in name and ".py:" not in name) or Path(name).exists():
        return name
    if not separator:
        raise ValueError(
            f"reward_funcs: {name!r} is neither a function (package.module.function or path/to/file.py:function) nor a "
            "reward model's id or path."
        )
    module = load_module(source)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward_funcs: {name!r}: {source} has no function {function!r}.")
    return getattr(module, function)
