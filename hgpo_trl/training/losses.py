"""By what TRL divides the loss of a micro-batch, for each `loss_type` that allows its rows to be regrouped.

`bnpo` is not here: it divides by the micro-batch's own tokens, so that which rows share one matters.
"""

from typing import NamedTuple


class Divisor(NamedTuple):
    """What a `loss_type` divides by, and whether tokens without an advantage can be left out of it."""

    per_row: bool  # by the micro-batch's rows; False: by the tokens of the whole step
    by_length: bool  # and first each row's sum by the row's tokens
    idle_tokens_count: bool  # otherwise a token without an advantage changes neither the loss nor its gradient


DIVISORS = {
    "grpo": Divisor(per_row=True, by_length=True, idle_tokens_count=False),
    "dr_grpo": Divisor(per_row=True, by_length=False, idle_tokens_count=False),
    "sapo": Divisor(per_row=True, by_length=True, idle_tokens_count=False),
    "luspo": Divisor(per_row=True, by_length=False, idle_tokens_count=False),
    "dapo": Divisor(per_row=False, by_length=False, idle_tokens_count=False),
    "cispo": Divisor(per_row=False, by_length=False, idle_tokens_count=False),
    "vespo": Divisor(per_row=False, by_length=False, idle_tokens_count=True),  # weights are of whole sequences
}
