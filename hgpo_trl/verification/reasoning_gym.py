"""Data sets of reasoning-gym (https://github.com/open-thought/reasoning-gym): entries as text, and verifiers.

A row of ours keeps an entry in one column, so that its verifier can score an answer long after the entry was generated.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from hgpo_trl.common.errors import MissingPackageError, UserError, did_you_mean
from hgpo_trl.verification.workers import ask_server

TIMEOUT_S = 10.0  # for one answer: some verifiers evaluate it as an expression
_TUPLE, _PAIRS, _FRACTION = "__tuple__", "__pairs__", "__fraction__"


def require() -> None:
    """Raise MissingPackageError unless the package is installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingPackageError(
            "The package reasoning-gym is not installed: pip install 'hgpo-trl[reasoning-gym]' or pip install "
            "reasoning-gym."
        )


def dataset_names() -> list[str]:
    """Names of all data sets."""
    return sorted(set(_datasets()) - {"composite"})  # of several data sets: here several sources take its place


def _datasets() -> dict[str, tuple[type, type]]:
    require()
    importlib.import_module("reasoning_gym")
    return importlib.import_module("reasoning_gym.factory").DATASETS


def open_dataset(name: str, config: Mapping[str, Any], *, size: int = 1, seed: int = 0) -> Any:
    """Create a data set, `reasoning_gym.dataset.ProceduralDataset`, once for each setting.

    Raises:
        UserError: there is no such data set, or its configuration is refused; `MissingPackageError`: no package.
    """
    return _open(name, json.dumps(config, sort_keys=True), size, seed)


@lru_cache(256)
def _open(name: str, config: str, size: int, seed: int) -> Any:
    if name not in (names := dataset_names()):
        hint = did_you_mean(name, names, f"; they are {', '.join(names)}.")
        raise UserError(f"reasoning-gym has no data set {name!r}{hint}")
    kind, config_kind = _datasets()[name]
    settings = json.loads(config)
    known = [field for field in config_kind.__dataclass_fields__ if field not in ("size", "seed")]  # type: ignore[attr-defined]
    for key in settings:
        if key not in known:
            raise UserError(
                f"config: {name} has no setting {key!r}{did_you_mean(key, known)} Its settings are {', '.join(known)}."
            )
    try:
        built = config_kind(**settings, size=size, seed=seed)
        if hasattr(built, "validate"):
            built.validate()
        return kind(config=built)
    except Exception as error:  # of the data set's own checks: mostly AssertionError, TypeError, ValueError
        raise UserError(
            f"config={settings!r}: {name} refuses it: {type(error).__name__}: {error}. Its defaults are "
            f"{ {key: getattr(config_kind(), key) for key in known} }."
        ) from error


# --- entries as text ------------------------------------------------------------------------------------------


def to_column(name: str, config: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """An entry (question, answer, metadata) as JSON, with what its verifier needs: data set and configuration.

    Tuples, fractions and keys that are not text, of which JSON knows nothing, survive.

    Raises:
        UserError: the metadata hold a value of another kind.
    """
    return json.dumps({"dataset": name, "config": dict(config), "entry": _plain(dict(entry))}, ensure_ascii=False)


def from_column(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The data set's name, its configuration and the entry.

    Raises:
        UserError: the text is not of `to_column`.
    """
    try:
        value = json.loads(text, object_hook=_restored)
        return value["dataset"], value["config"], value["entry"]
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"The column reasoning_gym holds {text!r:.80}, which is no entry as `hgpo-trl data` writes it ({error})."
        ) from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
        return {_PAIRS: [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(item) for item in value]}
    if isinstance(value, Fraction):
        return {_FRACTION: str(value)}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # of numpy
        return _plain(value.tolist())
    raise UserError(
        f"An entry of reasoning-gym holds a {type(value).__name__}, which has no form as text: {value!r:.80}."
    )


def _restored(value: dict[str, Any]) -> Any:
    if _TUPLE in value:
        return tuple(value[_TUPLE])
    if _PAIRS in value:
        return dict(value[_PAIRS])
    if _FRACTION in value:
        return Fraction(value[_FRACTION])
    return value


# --- verifiers ------------------------------------------------------------------------------------------------


def score(column: str, answer: str) -> float:
    """Score an answer by the entry's own data set, in [0, 1]. It may raise anything, and may not end."""
    name, config, entry = from_column(column)
    return min(max(float(open_dataset(name, config).score_answer(answer, entry)), 0.0), 1.0)


class _Scorer:
    """`score`, which where it is unpickled first imports the package: workers that are forked later need not."""

    def __call__(self, column: str, answer: str) -> float:
        return score(column, answer)

    def __reduce__(self) -> tuple[Callable[[], "_Scorer"], tuple[()]]:
        return _prepared, ()


def _prepared() -> _Scorer:
    _datasets()
    return _Scorer()


def score_answers(columns: Sequence[str], answers: Sequence[str]) -> list[float | None]:
    """Score answers in worker processes that are killed at a time limit, once per distinct pair, in order.

    Args:
        columns: of `to_column`.
        answers: as many.

    Returns:
        In [0, 1]; None where the verifier got stuck or raised an error.

    Raises:
        UserError: a column is not of `to_column`, or the package is not installed.
    """
    require()
    for column in dict.fromkeys(columns):
        _check_column(column)
    pairs = list(dict.fromkeys(zip(columns, answers, strict=True)))
    scores = dict(zip(pairs, ask_server(pairs, _Scorer(), TIMEOUT_S) if pairs else [], strict=True))
    return [scores[pair] for pair in zip(columns, answers, strict=True)]


@lru_cache(4096)
def _check_column(column: str) -> None:
    name, config, _ = from_column(column)
    open_dataset(name, config)
