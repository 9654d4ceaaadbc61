"""A classifier that keeps complex reasoning queries out of the no-think part.

Logistic regression on hashed words and pairs of words: no state but 32,768 weights, thousands of queries a second.
The paper (section 2, Stage I) takes fastText for it, whose development has ended; this is the same kind of model.

The file that comes with the package was trained on problems of competitions and on a thousand general instructions
(`recipes/data/data_classifier.yaml`). It finds mathematics with great certainty, code mostly by the seed terms below,
and few logic puzzles that are told as a story. For a data set of the paper's size train it on queries of the sources.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import write_atomically
from hgpo_trl.data.example import Drop, Example, Step
from hgpo_trl.modes import Mode

FEATURES = {"n_features": 2**15, "ngram_range": [1, 2], "token_pattern": r"\\?[^\W\d_]+|\d|[^\w\s]"}
"""Of the vectoriser. A token is a word, a command of LaTeX, a digit or a sign."""

SEED_TERMS = {
    "code": (
        r"python|java(script)?|typescript|c\+\+|c#|golang|rust|php|ruby|kotlin|matlab|haskell|perl|awk|scala|fortran|cobol"
        r"|lua|bash|shell script|powershell|sql|postgres(ql)?|html|css|json|yaml|xml|api|regexp?|regular expressions?"
        r"|numpy|dataframes?|pytorch|tensorflow|django|flask|node\.?js|react|angular|docker|kubernetes|linux|git"
        r"|code|coding|program(ming)?|pseudo-?code|algorithms?|software|compil(e|er|ing)|debug(ging)?|refactor"
        r"|(write|create|construct|implement) an? (\w+ )?(function|class|script|query|method|loop)"
        r"|unit tests?|database schema|select statement|(for|while|nested) loops?|arrays?|hash.?(map|table)s?"
        r"|linked.lists?|binary (tree|search)|quick.?sort|merge.?sort|dynamic programming|dijkstra('s)?|big.o"
        r"|time complexity|recursi(on|ve)|stack (trace|overflow)|segfault|pointers?|exceptions?|syntax error|leetcode"
        r"|(sort|merge|reverse)(s|ing)? .{0,20}(list|array|string)s?"
    ),
    "maths": (
        r"prove|proof|show that|theorem|lemma|equations?|inequality|polynomials?|quadratic|derivatives?|integra(l|te)"
        r"|differentiate|logarithms?|matri(x|ces)|determinant|eigenvalues?|probability|expected value|combinations?"
        r"|permutations?|modulo|divisible|remainder|primes?|prime numbers?|square root|cube root|fractions?|triangles?"
        r"|perimeter|hypotenuse|circumference|(surface )?area of|volume of|mean of|median of|standard deviation"
        r"|solve for|solve the|calculate|compute|evaluate|how many ways|factori[sz]e|derive|converges?|velocity"
        r"|acceleration|moles|molar|balance the .{0,20}equation|\d\s*[+*^=]\s*\d"
    ),
    "logic": (
        r"puzzle|riddle|sudoku|brain.?teaser|kna(ves?|ights? and)|counterfeit|cryptarithm|syllogism|logically"
        r"|logic problem|truth.tables?|deduce|if all .{1,40} are|(tall|old|young|fast|heavi|short)er than .{1,60} than"
        r"|next (number|term)"
    ),
}
"""Words that make a query one of code, maths or logic, as regular expressions between word boundaries: a feature each,
and what relabels a query of the other kind in training."""

_SEEDS = {kind: re.compile(rf"(?<!\w)(?:{terms})(?!\w)") for kind, terms in SEED_TERMS.items()}
_ADDRESS = re.compile(r"https?://\S+")
_HEAD, _TAIL = 1_500, 500  # characters of a query that are looked at
_SHIPPED = "reasoning_queries.safetensors"


class ReasoningQueryClassifier:
    """Probability that a query asks for complex reasoning: maths, code, logic. Picklable.

    Args:
        weights: [features].
        bias: of the linear model.
        threshold: lowest probability of a reasoning query.
        metadata: its training data and its quality.
    """

    def __init__(
        self, weights: NDArray[np.floating], bias: float, threshold: float, metadata: Mapping[str, Any]
    ) -> None:
        self.weights = np.asarray(weights, dtype=np.float32)
        self.bias, self.threshold, self.metadata = float(bias), float(threshold), dict(metadata)

    def probability(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probability of each text, `[n]`."""
        if not texts:
            return np.zeros(0)
        scores = np.asarray(vectorise(texts) @ self.weights, dtype=np.float64) + self.bias
        return 1.0 / (1.0 + np.exp(-scores))

    def save(self, path: Path) -> None:
        """Write weights (16 bits) and metadata to one safetensors file."""
        about = {"bias": self.bias, "threshold": self.threshold, "features": FEATURES, **self.metadata}
        content = save({"weights": self.weights.astype(np.float16)}, {"classifier": json.dumps(about, sort_keys=True)})
        write_atomically(path, content)

    @classmethod
    def load(cls, path: str | Path | None = None) -> "ReasoningQueryClassifier":
        """Read a file of `save`; without a path the one that comes with the package.

        Raises:
            UserError: there is no such file, it is no classifier, or one for other features.
        """
        found = Path(str(files("hgpo_trl.data") / _SHIPPED)) if path is None else Path(path)
        if not found.is_file():
            raise UserError(
                f"reasoning_classifier={str(path)!r}: there is no such file. Train it with `hgpo-trl data classifier`."
            )
        try:
            with safe_open(found, framework="numpy") as file:
                about = json.loads((file.metadata() or {})["classifier"])
                weights = file.get_tensor("weights")
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"reasoning_classifier={str(path)!r} is no file of `hgpo-trl data classifier`: {error}"
            ) from None
        if about.pop("features") != FEATURES:
            raise UserError(f"reasoning_classifier={str(path)!r} was trained with other features: train it again.")
        return cls(weights, about.pop("bias"), about.pop("threshold"), about)


def no_reasoning_queries(classifier: ReasoningQueryClassifier, threshold: float | None = None) -> Step:
    """Drop no-think examples whose user asks for complex reasoning, as "reasoning_query"; keep all others.

    Generated examples are kept: whoever names a generator for this mode has chosen its queries.

    Args:
        classifier: judges the user's messages of all turns.
        threshold: lowest probability at which an example is dropped; None: the classifier's own.

    Raises:
        UserError: the threshold does not lie in (0, 1].
    """
    limit = classifier.threshold if threshold is None else threshold
    if not 0.0 < limit <= 1.0:
        raise UserError(f"threshold must lie in (0, 1]; got {limit}.")
    return partial(_no_reasoning_queries, classifier, limit)


def _no_reasoning_queries(
    classifier: ReasoningQueryClassifier, threshold: float, examples: Sequence[Example]
) -> list[Drop | None]:
    verdicts: list[Drop | None] = [None] * len(examples)
    judged = [i for i, example in enumerate(examples) if example.mode is Mode.NO_THINK and not example.generated]
    texts = ["\n".join(m["content"] for m in examples[i].prompt if m["role"] == "user") for i in judged]
    for i, probability in zip(judged, classifier.probability(texts), strict=True):
        if probability >= threshold:
            verdicts[i] = Drop("reasoning_query", {"probability": round(float(probability), 3)})
    return verdicts


# --- features -------------------------------------------------------------------------------------------------


@cache
def _vectoriser() -> HashingVectorizer:
    features = FEATURES | {"ngram_range": tuple(FEATURES["ngram_range"])}  # type: ignore[arg-type]
    return HashingVectorizer(**features, lowercase=False, norm="l2", dtype=np.float32)


def vectorise(texts: Sequence[str]) -> csr_matrix:
    """Features of queries, `[n, features]`, sparse."""
    return _vectoriser().transform(map(_prepare, texts))


def _prepare(text: str) -> str:
    """Lower case, a 0 for every number, without the marks of LaTeX formulas, and a word for each kind of seed term."""
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} {text[-_TAIL:]}"
    seeds = " ".join(f"seed{kind}" for kind in seed_kinds(text))
    plain = re.sub(r"\$|\\[()\[\]]|\\left|\\right", " ", text.lower())
    return f"{seeds} {re.sub(r'[0-9]+', '0', plain)}"


def seed_kinds(text: str) -> list[str]:
    """The kinds of seed terms in a query."""
    lower = _ADDRESS.sub(" ", text.lower())
    return [kind for kind, pattern in _SEEDS.items() if pattern.search(lower)]


# --- training -------------------------------------------------------------------------------------------------

_C = 30.0
_FOLDS = 5
_DOUBTFUL = 0.9


def train(
    reasoning: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]], threshold: float, seed: int
) -> ReasoningQueryClassifier:
    """Fit a classifier to queries of both kinds, by the names of their sources.

    General queries always include some code and maths. So queries of `other` with a seed term count as reasoning
    queries, with half the weight of that class. Of the rest, those that cross-validation takes for reasoning queries
    with a probability of 0.9 are left out. Both classes have the same weight. The metadata gives the number of each.
    """
    others = [text for texts in other.values() for text in texts]
    relabelled = [text for text in others if seed_kinds(text)]
    plain = [text for text in others if not seed_kinds(text)]
    given = [text for texts in reasoning.values() for text in texts]
    features = vectorise([*given, *relabelled, *plain])
    labels = np.repeat([1, 1, 0], [len(given), len(relabelled), len(plain)])
    groups = np.repeat([0, 1, 2], [len(given), len(relabelled), len(plain)])

    def fit_weights(kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        shares = np.array([0.25, 0.25, 0.5]) * len(others) * 2
        return (shares / np.maximum(np.bincount(groups[kept], minlength=3), 1))[groups[kept]]

    model = LogisticRegression(C=_C, max_iter=1_000)
    everything = np.ones(len(labels), dtype=bool)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    weights = {"sample_weight": fit_weights(everything)}
    guesses = cross_val_predict(model, features, labels, cv=folds, params=weights, method="predict_proba")[:, 1]
    kept = (labels == 1) | (guesses < _DOUBTFUL)
    model.fit(features[kept], labels[kept], sample_weight=fit_weights(kept))
    about = {
        "sources": {"reasoning": sorted(reasoning), "other": sorted(other)},
        "rows": {
            "reasoning": len(given),
            "other": len(plain),
            "relabelled": len(relabelled),
            "doubtful": int((~kept).sum()),
        },
        "scikit_learn": sklearn.__version__,
        "seed": seed,
    }
    return ReasoningQueryClassifier(model.coef_[0], model.intercept_[0], threshold, about)


def precision_and_recall(
    reasoning: NDArray[np.float64], other: NDArray[np.float64], thresholds: Sequence[float]
) -> list[dict[str, float | None]]:
    """One row per threshold, from the probabilities of queries of both kinds; precision is None if none is found."""
    rows = []
    for threshold in thresholds:
        hits, false = int((reasoning >= threshold).sum()), int((other >= threshold).sum())
        precision = hits / (hits + false) if hits + false else None
        rows.append({"threshold": threshold, "precision": precision, "recall": hits / max(len(reasoning), 1)})
    return rows
