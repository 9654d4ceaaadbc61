"""The list of settings that differ between two records."""

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hgpo_trl.common.differences import differences

NAMES = st.text("abcd_", min_size=1, max_size=4)
RECORDS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    NAMES,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@given(RECORDS)
def test_a_record_does_not_differ_from_its_copy(record: dict[str, Any]) -> None:
    assert differences(record, copy.deepcopy(record)) == ""


@given(RECORDS, NAMES, st.integers(), st.integers())
def test_a_setting_that_differs_is_named(record: dict[str, Any], name: str, old: int, new: int) -> None:
    expected = "" if old == new else f"{name}: {old} -> {new}"
    assert differences(record | {name: old}, record | {name: new}) == expected


def test_the_one_number_of_a_long_recipe_is_named() -> None:
    sources = [{"name": f"source {i}", "path": "a.jsonl", "rows": {"maths": i, "code": 5}} for i in range(10)]
    before = {"seed": 0, "sources": sources, "shares": {"maths": 0.5}}
    now = copy.deepcopy(before)
    now["sources"][7]["rows"]["maths"] = 1_000
    now["shares"] = {"maths": 0.5, "code": 0.5}
    assert differences(before, now) == "shares.code: None -> 0.5, sources[source 7].rows.maths: 7 -> 1000"


def test_lists_of_other_entries_are_shown_whole() -> None:
    """An entry more, another order, or entries that share a name: there is no entry to compare with."""
    one, two = {"name": "a", "rows": 1}, {"path": "b", "rows": 2}
    assert differences({"sources": [one]}, {"sources": [one, two]}) == f"sources: {[one]} -> {[one, two]}"
    assert differences({"sources": [one, two]}, {"sources": [two, one]}) == f"sources: {[one, two]} -> {[two, one]}"
    assert differences({"sources": [one, one]}, {"sources": [one, two]}) == f"sources: {[one, one]} -> {[one, two]}"
    assert differences({"steps": [1, 2]}, {"steps": [1, 3]}) == "steps: [1, 2] -> [1, 3]"


def test_values_are_those_that_a_file_holds() -> None:
    assert differences({"mix": [1, 2], "levels": {"2": 1}}, {"mix": (1, 2), "levels": {2: 1}}) == ""
