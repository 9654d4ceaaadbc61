"""Balanced partition of a step's rows: which process computes which rows, and in which micro-batch.

A micro-batch of n rows is a block of n x w tokens, as wide as its longest prompt and its longest response together;
whatever a row lacks is padding. Rows sorted by length are cut into blocks of at most so many tokens, and the blocks are
dealt to the processes. Everything here is a function of the lengths alone, so that all processes find the same plan.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Plan = list[list[list[int]]]  # [micro-batch][process]: row numbers


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive rows of the sorted order, and their tokens with padding."""

    start: int
    stop: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """Lengths of rows, the longest first."""

    prompts: list[int]
    completions: list[int]
    multiple: int

    def block(self, start: int, stop: int) -> _Block:
        width = self._padded(max(self.prompts[start:stop])) + self._padded(max(self.completions[start:stop]))
        return _Block(start, stop, (stop - start) * width)

    def blocks(self, max_tokens: int) -> list[_Block]:
        """The fewest blocks of at most so many tokens; a row that is longer is a block of its own."""
        found, start, prompt, completion, tokens = [], 0, 0, 0, 0
        for row, lengths in enumerate(zip(self.prompts, self.completions, strict=True)):
            prompt, completion = max(prompt, self._padded(lengths[0])), max(completion, self._padded(lengths[1]))
            grown = (row + 1 - start) * (prompt + completion)
            if row > start and grown > max_tokens:
                found.append(_Block(start, row, tokens))
                start, prompt, completion = row, self._padded(lengths[0]), self._padded(lengths[1])
                grown = prompt + completion
            tokens = grown
        return [*found, _Block(start, len(self.prompts), tokens)]

    def _padded(self, length: int) -> int:
        return math.ceil(max(1, length) / self.multiple) * self.multiple


def balanced_partition(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    num_processes: int,
    max_tokens: int,
    multiple: int | None = None,
) -> Plan:
    """Divide rows into the fewest micro-batches of at most `max_tokens`, of like size on all processes.

    Every process gets the same number of micro-batches, since ZeRO-3 and FSDP gather weights in each. The number of
    rows is free. The tokens of a step are spread evenly over its micro-batches, so that the last one is no remnant, and
    blocks of like size are computed at the same time. In lock-step, where each micro-batch takes as long as the
    largest of all processes, a step takes no longer than the mean over the processes and one micro-batch.

    Args:
        prompt_lengths, completion_lengths: `[B]`, of all processes' rows; B is a multiple of `num_processes`.
        max_tokens: of a micro-batch, padding included; a single row may have more.
        multiple: widths of prompts and of completions are rounded up to it (`pad_to_multiple_of`).

    Returns:
        `plan[k][p]`, the rows of the k-th micro-batch of process p, none empty. The largest micro-batches come first:
        if memory does not suffice, the first one shows it.
    """
    order = sorted(range(len(prompt_lengths)), key=lambda row: -(prompt_lengths[row] + completion_lengths[row]))
    rows = _Rows([prompt_lengths[i] for i in order], [completion_lengths[i] for i in order], multiple or 1)
    num_micro_batches = math.ceil(len(rows.blocks(max_tokens)) / num_processes)
    num_blocks = num_micro_batches * num_processes
    low, high = 1, max_tokens
    while low < high:  # the smallest limit that needs no more blocks
        middle = (low + high) // 2
        low, high = (low, middle) if len(rows.blocks(middle)) <= num_blocks else (middle + 1, high)
    blocks = rows.blocks(low)
    while len(blocks) < num_blocks:
        largest = max((block for block in blocks if block.stop - block.start > 1), key=lambda block: block.tokens)
        half = (largest.start + largest.stop) // 2
        blocks.remove(largest)
        blocks += [rows.block(largest.start, half), rows.block(half, largest.stop)]
    blocks.sort(key=lambda block: -block.tokens)
    plan = []
    for k in range(num_micro_batches):
        together = blocks[k * num_processes : (k + 1) * num_processes]
        # To and fro, so that no process always has the largest.
        plan.append([order[block.start : block.stop] for block in (together if k % 2 == 0 else reversed(together))])
    return plan
