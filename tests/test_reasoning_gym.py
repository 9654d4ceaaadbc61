"""The verifiers of reasoning-gym as a reward: alone, in evaluation, and on a GRPO-style batch of mixed rows."""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hgpo_trl.common.errors import UserError
from hgpo_trl.data.generators import ReasoningGymGenerator
from hgpo_trl.evaluation.scores import score_samples
from hgpo_trl.rewards import load_reward, reasoning_gym_reward
from hgpo_trl.rewards.functions import check_bounded, checked
from hgpo_trl.verification import reasoning_gym


def row_of(name: str, index: int = 0, **config: Any) -> dict[str, Any]:
    return ReasoningGymGenerator(name, name, config, 3, 5, None, None)(index)


DOCS = Path(__file__).parents[1] / "docs" / "data.md"
LEGS = row_of("leg_counting")
COUNTDOWN = row_of("countdown")
PATH = row_of("shortest_path")


def no_think(answer: str) -> str:
    return f"<no_think> {answer} </no_think>"


def test_only_the_answer_part_of_a_well_formed_response_counts() -> None:
    answer = LEGS["answer"]
    responses = [
        no_think(answer),
        f"<think> {answer}1 </think> {answer}",
        f"<think> it is {answer} </think> {answer}1",
        f"<think> it is {answer}",
        answer,
        no_think("none"),
    ]
    expected = [1.0, 1.0, len(answer) / (len(answer) + 1), 0.0, 1.0, 0.0]
    assert reasoning_gym_reward(responses, [LEGS["reasoning_gym"]] * 6) == pytest.approx(expected)
    messages = [[{"role": "assistant", "content": response}] for response in responses]
    assert reasoning_gym_reward(messages, [LEGS["reasoning_gym"]] * 6) == pytest.approx(expected)


def test_rows_of_other_sources_are_not_scored() -> None:
    assert reasoning_gym_reward([no_think("4")] * 2) == [None, None]
    columns = [LEGS["reasoning_gym"], None]
    assert reasoning_gym_reward([no_think(LEGS["answer"])] * 2, columns, answer=["x", "4"]) == [1.0, None]


def test_an_answer_that_keeps_the_verifier_busy_is_no_verdict(caplog: pytest.LogCaptureFixture) -> None:
    """Verifiers of expressions evaluate them, with powers as high as an answer wants."""
    columns = [COUNTDOWN["reasoning_gym"]] * 2 + [LEGS["reasoning_gym"]]
    answers = [no_think(answer) for answer in (COUNTDOWN["answer"], "9**9**9**9", LEGS["answer"])]
    assert reasoning_gym_reward([answers[0], answers[2]], [columns[0], columns[2]]) == [1.0, 1.0]  # workers are warm
    logged: list[tuple[str, float]] = []
    rewards = reasoning_gym_reward(answers, columns, log_metric=lambda *metric: logged.append(metric))
    assert rewards == [1.0, None, 1.0]
    assert logged == [("hgpo/verifier_failures", pytest.approx(1 / 3))]
    assert "hgpo/verifier_failures is their share" in caplog.text


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("no json", r"holds 'no json', which is no entry as `hgpo-trl data` writes it"),
        ("[1]", r"holds '\[1\]'"),
        ('{"dataset": "leg_counting"}', "which is no entry"),
        ('{"dataset": "leg", "config": {}, "entry": {}}', "no data set 'leg'"),
    ],
)
def test_another_column_of_that_name_is_refused(column: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reasoning_gym_reward([no_think("4")], [column])


def test_evaluation_scores_with_it() -> None:
    rows = [LEGS, PATH, {**LEGS, "reasoning_gym": None}]
    data = Dataset.from_list([{"prompt": row["prompt"], "reasoning_gym": row["reasoning_gym"]} for row in rows])
    samples = pd.DataFrame(
        [
            {"prompt_id": i, "mode": "no_think", "sample": 0, "completion": no_think(row["answer"]), "truncated": False}
            for i, row in enumerate(rows)
        ]
    )
    found = score_samples(samples, data, [load_reward("hgpo_trl.rewards.reasoning_gym_reward")])  # type: ignore[list-item]
    assert found["reward"].tolist()[:2] == [1.0, 1.0]
    assert found["reward"].isna().tolist() == [False, False, True]


def test_lazy_thinking_takes_its_scores() -> None:
    """They lie in [0, 1], partial credit included."""
    cases = [(COUNTDOWN, "1 + 1"), (PATH, PATH["answer"]), (PATH, "nowhere"), (LEGS, f"It is {LEGS['answer']}.")]
    rewards = checked(reasoning_gym_reward)(
        prompts=[None] * 4,
        completions=[no_think(answer) for _, answer in cases],
        reasoning_gym=[row["reasoning_gym"] for row, _ in cases],
    )
    assert 0 < rewards[0] < 0.1
    assert rewards[1:3] == [1.0, 0.0]
    assert 0 < rewards[3] < 1
    check_bounded(torch.tensor(rewards)[:, None], torch.ones(1), ["reasoning_gym_reward"])


def test_divided_as_the_docs_say() -> None:
    """docs/data.md: rows with a verifier are its, the others the rule's."""
    (code,) = re.findall(
        r"```python\n(from hgpo_trl\.rewards import.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(code, names)
    rows = [(LEGS["answer"], LEGS), (f"{LEGS['answer']}.0", LEGS), ("4.0", None), ("5", None), (None, None)]
    rewards = names["divided_reward"](
        [no_think(str(answer)) for answer, _ in rows],
        answer=[LEGS["answer"], LEGS["answer"], "4", "4", None],
        reasoning_gym=[row and row["reasoning_gym"] for _, row in rows],
        prompts=[None] * 5,
    )
    assert rewards[0] == 1.0
    assert 0 < rewards[1] < 1, "right by the rule, whose row it is not"
    assert rewards[2:] == [1.0, 0.0, None]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.fractions(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
        | st.dictionaries(st.tuples(st.integers(), st.text(max_size=2)), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(JSON)
def test_entries_survive_as_text(value: Any) -> None:
    entry = {"question": "q", "answer": "a", "metadata": {"value": value}}
    column = reasoning_gym.to_column("leg_counting", {"min_animals": 1}, entry)
    name, config, found = reasoning_gym.from_column(column)
    assert (name, config, found) == ("leg_counting", {"min_animals": 1}, entry)
    assert repr(found) == repr(entry), "kinds, not only values"
    json.loads(column)


def test_what_has_no_form_as_text_is_refused() -> None:
    assert reasoning_gym.from_column(reasoning_gym.to_column("x", {}, {"m": Fraction(1, 3)}))[2] == {
        "m": Fraction(1, 3)
    }
    with pytest.raises(UserError, match="holds a object, which has no form as text"):
        reasoning_gym.to_column("x", {}, {"m": object()})
