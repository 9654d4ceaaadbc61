"""Traces for two data sets of reasoning-gym: functions of an entry (question, answer, metadata)."""

import re
from collections.abc import Mapping
from typing import Any

from reasoning_gym.arithmetic.leg_counting import ANIMALS


def legs(entry: Mapping[str, Any]) -> str:
    """`leg_counting`: the legs of each animal, then their running total."""
    total, lines = 0, []
    for animal, number in entry["metadata"]["animals"].items():
        legs = number * ANIMALS[animal]
        lines.append(f"{animal}: {number} x {ANIMALS[animal]} = {legs}, total {total} + {legs} = {total + legs}")
        total += legs
    return "\n".join(lines)


def running_total(entry: Mapping[str, Any]) -> str:
    """`chain_sum`: one operation a line."""
    first, *rest = re.findall(r"\d+|[+-]", entry["metadata"]["expression"])
    total, lines = int(first), []
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        result = total + number if sign == "+" else total - number
        lines.append(f"{total} {sign} {number} = {result}")
        total = result
    return "\n".join(lines)
