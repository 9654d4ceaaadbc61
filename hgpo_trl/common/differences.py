"""What differs between two records of settings, for the message that refuses a folder of other results."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the settings that differ, as "seed: 0 -> 1, sources[sums].rows: 5 -> 6"; empty if none does.

    Mappings are compared key by key, and lists of named entries entry by entry, so that a recipe of many sources shows
    the one number that has changed. A setting that one side lacks is None there.
    """
    return ", ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in _leaves("", _plain(before), _plain(now)))


def _plain(record: Mapping[str, Any]) -> Any:
    """The record as it reads back from JSON: tuples are lists, keys are texts."""
    return json.loads(json.dumps(record))


def _leaves(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _leaves(f"{name}.{key}" if name else key, before.get(key), now.get(key))
        return
    old, new = _by_name(before), _by_name(now)
    if old is not None and new is not None and list(old) == list(new):
        for key in old:
            yield from _leaves(f"{name}[{key}]", old[key], new[key])
        return
    yield name, before, now


def _by_name(value: Any) -> dict[str, Any] | None:
    """Entries of a list by their `name`, or `path` where they have none; None if there is no such list."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return None
    names = [str(entry.get("name") or entry.get("path")) for entry in value]
    return dict(zip(names, value, strict=True)) if len(set(names)) == len(names) else None
