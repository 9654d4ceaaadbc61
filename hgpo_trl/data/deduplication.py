"""Exact and near duplicates among prompts, within a source and across sources, from a few numbers per example.

The keys of an example depend on it alone, so they can be computed in any order and process. Clusters of duplicates are
found afterwards, from the columns of keys.
"""

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hgpo_trl.common.errors import UserError
from hgpo_trl.data.example import Example
from hgpo_trl.data.text import SIGNS, tokens

_SHINGLE = 2  # words
_NEAR_FROM = 32  # tokens


def dedup_keys(
    examples: Sequence[Example],
    *,
    num_perm: int = 128,
    threshold: float = 0.7,
    near: bool = True,
    across_modes: bool = False,
) -> NDArray[np.uint64]:
    """Compute keys of examples; two examples that share a key in the same column are duplicates.

    Column 0 is a hash of the whole prompt's `hgpo_trl.data.text.tokens`: blanks, case, punctuation and ways to write
    LaTeX do not count. The others are MinHash bands over pairs of successive tokens, so that prompts with a Jaccard
    similarity of about `threshold` or more share one. Each also contains the sequence of the prompt's numbers,
    mathematical signs and single letters: two problems that differ in a number are never near-duplicates. A prompt of
    fewer than 32 tokens has its exact key in every column: there, another word is another question. So it is, at any
    length, in a generated example; its exact key is that of the text as it is, for some ask about case or punctuation.

    Args:
        examples: only their prompts and modes are used.
        num_perm: permutations of MinHash.
        threshold: lowest similarity of near-duplicates.
        near: whether to compute the bands.
        across_modes: whether a think and a no-think example of the same prompt are duplicates.

    Returns:
        `[n, 1 + bands]`.

    Raises:
        UserError: the threshold does not lie in (0, 1), or num_perm is below 2.
    """
    bands, rows = _bands(num_perm, threshold) if near else (0, 0)
    keys = np.empty((len(examples), 1 + bands), dtype=np.uint64)
    long: list[int] = []
    salts: list[bytes] = []
    shingles: list[set[bytes]] = []
    for i, example in enumerate(examples):
        if example.generated:
            words = [
                word for message in example.prompt for word in (f"<{message['role']}>", message["content"].strip())
            ]
        else:
            words = [w for message in example.prompt for w in (f"<{message['role']}>", *tokens(message["content"]))]
        mode = "" if across_modes else str(example.mode)
        keys[i] = _key(mode, words)
        if near and not example.generated and len(words) >= _NEAR_FROM:
            long.append(i)
            salts.append(_key(mode, filter(_is_exact, words)).to_bytes(8, "little"))
            shingles.append({" ".join(words[j : j + _SHINGLE]).encode() for j in range(len(words) - _SHINGLE + 1)})
    hashes = MinHash.generator(shingles, num_perm=num_perm, hashfunc=xxhash.xxh32_intdigest)
    for i, salt, minhash in zip(long, salts, hashes, strict=True):
        values = minhash.hashvalues
        for band in range(bands):
            content = salt + values[band * rows : (band + 1) * rows].tobytes()
            keys[i, 1 + band] = xxhash.xxh3_64_intdigest(content, seed=band)
    return keys


@cache  # an integral is solved for each candidate
def _bands(num_perm: int, threshold: float) -> tuple[int, int]:
    """Number of bands and of rows per band with the fewest wrong decisions around the threshold."""
    if not 0.0 < threshold < 1.0:
        raise UserError(f"threshold must lie between 0 and 1; got {threshold}.")
    if num_perm < 2:
        raise ValueError(f"num_perm must be at least 2; got {num_perm}.")
    index = MinHashLSH(threshold=threshold, num_perm=num_perm)
    return index.b, index.r


@lru_cache(2**16)
def _is_exact(token: str) -> bool:
    """Whether a token must be the same in near-duplicates: a number, a sign, or a letter that is a variable."""
    return token in SIGNS or token[0].isdigit() or (len(token) == 1 and token.isascii() and token not in "ai")


def _key(mode: str, words: Iterable[str]) -> int:
    return xxhash.xxh3_64_intdigest("\x1f".join((mode, *words)).encode())


def first_of_each(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Find the earliest row of each row's cluster.

    Rows that share a key in some column are in one cluster, directly or through other rows. One column is read at a
    time: `keys` may be a memory-mapped file. Memory: about ten numbers per row.

    Args:
        keys: `[N, K]`.

    Returns:
        `[N]`, row numbers.
    """
    count, columns = keys.shape
    labels = np.arange(count)
    for column in range(columns):
        values = np.asarray(keys[:, column])
        order = np.argsort(values, kind="stable")
        same = values[order[1:]] == values[order[:-1]]
        left, right = labels[order[:-1][same]], labels[order[1:][same]]
        links = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(count, count))
        labels = connected_components(links, directed=False)[1].astype(np.int64)[labels]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)
