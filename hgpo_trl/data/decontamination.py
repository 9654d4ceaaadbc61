"""Overlap with evaluation benchmarks, by the n-grams of their questions."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import xxhash

from hgpo_trl.common.errors import UserError
from hgpo_trl.data.example import Drop, Example
from hgpo_trl.data.text import BRACKETS, tokens

_MAX_TEXT = 200  # characters of a message in a drop's detail


class Decontaminator:
    """Drop examples whose prompt holds at least a given share of the n-grams of some question of a benchmark.

    A picklable step. The defaults are the criterion of Tülu 3 (arXiv 2411.15124): half of the 8-grams. N-grams consist
    of the words, numbers and mathematical signs of `hgpo_trl.data.text.tokens`, without brackets, so that blanks, case,
    punctuation and ways to write LaTeX do not count. Each message of a prompt is searched. A question of fewer than n
    tokens is found only as a whole message. A variant with other numbers is found if enough of the wording is left; a
    paraphrase is not.

    Templated questions share their n-grams with one another; a benchmark of those can be matched exactly: its questions
    are compared, as they are, with the whole text of each message.

    A drop has the reason "contaminated" and in its detail `benchmark`, `row` of it, `overlap` (the share) and `text`
    (the first n-gram that both have).

    Args:
        benchmarks: questions by name of the benchmark.
        exact: the benchmarks, by name, that are matched exactly.
        n: tokens of an n-gram.
        threshold: share of a question's n-grams.

    Raises:
        UserError: n is not positive, the threshold does not lie in (0, 1], or a benchmark has no questions.
    """

    def __init__(
        self,
        benchmarks: Mapping[str, Iterable[str]],
        n: int = 8,
        threshold: float = 0.5,
        exact: Collection[str] = (),
    ) -> None:
        if n < 1:
            raise UserError(f"n must be at least 1; got {n}.")
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"threshold must lie in (0, 1]; got {threshold}.")
        self.n, self.threshold = n, threshold
        self._rows: list[tuple[str, int]] = []  # benchmark and row of each question
        self._sizes: list[int] = []  # its n-grams
        self._exact: dict[int, int] = {}  # hash of a text to its question
        index: defaultdict[int, list[int]] = defaultdict(list)
        for name, questions in benchmarks.items():
            before = len(self._rows)
            for row, question in enumerate(questions):
                grams: set[int] = set()
                if name in exact:
                    self._exact.setdefault(_text_key(question), len(self._rows))
                else:
                    grams.update(self._grams(_words(question)))
                for gram in grams:
                    index[gram].append(len(self._rows))
                self._rows.append((name, row))
                self._sizes.append(len(grams))
            if len(self._rows) == before:
                raise UserError(f"benchmarks: {name!r} has no questions.")
        self._index = {gram: tuple(questions) for gram, questions in index.items()}

    def __call__(self, examples: Sequence[Example]) -> list[Drop | None]:
        return [self._verdict(example) for example in examples]

    def _grams(self, words: list[str]) -> Iterator[int]:
        """Hashes of a message's n-grams; a message of fewer than n words is one gram."""
        for i in range(max(len(words) - self.n, 0) + 1):
            gram = words[i : i + self.n]
            if gram:
                yield xxhash.xxh3_64_intdigest(" ".join(gram).encode())

    def _verdict(self, example: Example) -> Drop | None:
        for message in example.prompt if self._exact else ():
            same = self._exact.get(_text_key(message["content"]))
            if same is not None:
                name, row = self._rows[same]
                text = message["content"].strip()[:_MAX_TEXT]
                return Drop("contaminated", {"benchmark": name, "row": row, "overlap": 1.0, "text": text})
        if not self._index:
            return None
        messages = [_words(message["content"]) for message in example.prompt]
        found: dict[int, tuple[int, int]] = {}  # n-gram to its first place
        for m, words in enumerate(messages):
            for i, gram in enumerate(self._grams(words)):
                if gram in self._index:
                    found.setdefault(gram, (m, i))
        if not found:
            return None
        shared = Counter(question for gram in found for question in self._index[gram])
        question = min(shared, key=lambda q: (-shared[q] / self._sizes[q], q))
        overlap = shared[question] / self._sizes[question]
        if overlap < self.threshold:
            return None
        m, i = min(place for gram, place in found.items() if question in self._index[gram])
        name, row = self._rows[question]
        text = " ".join(messages[m][i : i + self.n])
        return Drop("contaminated", {"benchmark": name, "row": row, "overlap": round(overlap, 3), "text": text})


def _text_key(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.strip().encode(errors="surrogatepass"))


def _words(text: str) -> list[str]:
    return [token for token in tokens(text) if token not in BRACKETS]
