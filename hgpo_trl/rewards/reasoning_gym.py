"""The verifiers of reasoning-gym as a reward function."""

from collections.abc import Callable
from typing import Any

from hgpo_trl.modes import Response
from hgpo_trl.rewards.functions import verified
from hgpo_trl.verification.reasoning_gym import score_answers


def reasoning_gym_reward(
    completions: list,
    reasoning_gym: list[str | None] | None = None,
    response: list[Response] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """The score that the data set's own verifier gives to the answer part of a well-formed response, else 0.0.

    Most verifiers give 1.0 to the right answer and 0.0 to a wrong one. Some give partial credit in between, and some a
    little, 0.01 to 0.05, to any answer; both are kept.

    Args:
        completions: as of `accuracy_reward`.
        reasoning_gym: the column of that name, written by `hgpo-trl data`. A row without it is not scored.
        response: the parts of every response, from a caller that has split them; `completions` is not read then.
        log_metric: of TRL. The share of answers that the verifier could not judge goes to `hgpo/verifier_failures`.

    Returns:
        A score in [0, 1], or None (no verifier, or one that got stuck or raised an error) per completion.

    Raises:
        UserError: the column holds something else; MissingPackageError: reasoning-gym is not installed.
    """
    return verified("A verifier of reasoning-gym", score_answers, completions, reasoning_gym, response, log_metric)
