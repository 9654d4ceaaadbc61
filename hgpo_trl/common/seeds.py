"""Seeds of the parts of a run: batches, chunks, requests."""

import hashlib


def derived_seed(seed: int, part: int | str) -> int:
    """The seed of a run's part, of 32 bits; no two parts, and no two runs, share one but by chance.

    `seed + part` would give a run's second part the random numbers of the next seed's first one.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {part}".encode(), digest_size=4).digest())
