r"""Whether an answer equals the reference answer: exact rungs first, then math-verify, in workers with a time limit.

What counts of an answer is its last `\boxed{}`, else what it states as the answer, else its last mathematics: an answer
that names several candidates, or says that one is not the answer, is not right because one of them is. Both sides are
spelt in one way, and the rungs follow, each of which settles or passes on:

    text       equal, but for blanks, dollar signs, bold, a full stop and ways to write the same LaTeX
    numbers    plain numbers, fractions, mixed numbers, percentages, number bases: exactly, whatever their length
    words      names and letters of choices
    lists      tuples, intervals and matrices in order, sets and bare lists in any order, unknowns by their names
    equations  the value on the right; two equations where one is a multiple of the other
    values     expressions, at points for their letters: exactly, or in as many digits as it takes
    symbolic   math-verify, for what the rungs above cannot read, and only where both sides are one expression

Only the last can get stuck. `check_answers` gives it to processes that are killed at the time limit.
"""

from collections.abc import Callable, Sequence

from hgpo_trl.verification.exact import final_answer, settle
from hgpo_trl.verification.symbolic import TIMEOUT_S, symbolically_equal
from hgpo_trl.verification.workers import ask_server

__all__ = ["check_answers", "final_answer"]


def check_answers(
    references: Sequence[str],
    answers: Sequence[str],
    *,
    timeout: float = TIMEOUT_S,
    compare: Callable[[str, str], bool] = symbolically_equal,
) -> list[bool | None]:
    """Whether each answer equals its reference answer, in order.

    What the exact rungs do not settle goes, once per distinct pair, to worker processes that are killed at the limit.
    From any thread; the workers are started when they are first needed and kept.

    Args:
        references: reference answers; a list as text ("['2', '3']") asks for all its entries, a worked solution that
            ends in "#### 18" for 18.
        answers: as many answers: an expression, or prose with the result in it.
        timeout: seconds for one sample.
        compare: the last rung.

    Returns:
        True, False or, where the verifier got stuck or crashed on this sample, None.

    Raises:
        ValueError: not as many answers as references.
    """
    if len(references) != len(answers):
        raise ValueError(f"answers: {len(answers)} for {len(references)} references: give one per reference.")
    verdicts: dict[tuple[str, str], bool | None] = {
        pair: settle(*pair)[0] for pair in dict.fromkeys(zip(references, answers, strict=True))
    }
    rest = sorted(pair for pair, verdict in verdicts.items() if verdict is None)
    if rest:
        verdicts.update(zip(rest, ask_server(rest, compare, timeout), strict=True))
    return [verdicts[pair] for pair in zip(references, answers, strict=True)]
