"""Seeds of the parts of a run: batches, chunks, requests."""

import hashlib


def derived_seed(seed: int, part: int | str) -> int:
    """Derive a 32-bit seed for a part of a run. Two parts, or two runs, share one only by chance.

    With `seed + part`, part 1 of seed 0 would draw the same random numbers as part 0 of seed 1.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {part}".encode(), digest_size=4).digest())
