"""Embedded tasks: right in themselves, and several of them in one data set."""

import random
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from transformers import AutoTokenizer

from hgpo_trl.cli import main
from hgpo_trl.modes import Mode, format_response
from hgpo_trl.tasks import chain_sum, shell_game
from hgpo_trl.tasks.embedded import Query, build_tokenizer, domain_of, draw, draw_equally, load_task

TASKS = (chain_sum, shell_game)
NAMES = [task.__name__ for task in TASKS]
ALL_TASKS = (*TASKS, load_task(str(Path(__file__).parents[1] / "benchmarks" / "chain_difference.py")))
TOKENIZER = build_tokenizer(*ALL_TASKS)
COUNT_LETTERS = str(Path(__file__).parents[1] / "examples" / "count_letters.py")
TINY = {"num_hft": 72, "num_hgpo": 36, "num_eval": 36, "hidden_size": 8, "num_heads": 2, "num_layers": 1}


def shell_game_places(prompt: str) -> list[str]:
    """The ball's cup after each swap, by moving what is under the cups."""
    found = re.fullmatch(r"ball in (\w+)((?: [a-h] swap \w+ \w+)+) where \?", prompt)
    assert found, prompt
    under = dict.fromkeys(("red", "blue", "green"), "nothing") | {found[1]: "ball"}
    assert len(under) == 3
    places = []
    for name, (step, one, other) in zip("abcdefgh", re.findall(r"(\w) swap (\w+) (\w+)", found[2]), strict=False):
        assert step == name
        assert one != other
        under[one], under[other] = under[other], under[one]
        assert len(under) == 3, "a cup that there is none of"
        places += [cup for cup, thing in under.items() if thing == "ball"]
    return places


def chain_sum_totals(prompt: str) -> list[str]:
    """The sum modulo 10 after each operand: the last digit of the plain sum."""
    digits = [int(digit) for digit in re.findall(r"= (\d)", prompt)]
    return [str(sum(digits[: count + 1]))[-1] for count in range(len(digits))]


def chain_difference_rests(prompt: str) -> list[str]:
    """What is left modulo 10 after each operand: the last digit of the plain difference, from a hundred more."""
    start, *digits = map(int, re.findall(r"(?:from|=) (\d)", prompt))
    return [str(100 + start - sum(digits[: count + 1]))[-1] for count in range(len(digits))]


SOLVERS = {
    "shell_game": shell_game_places,
    "chain_sum": chain_sum_totals,
    "chain_difference": chain_difference_rests,
}


@st.composite
def queries(draw: st.DrawFn) -> tuple[ModuleType, Query]:
    task = draw(st.sampled_from(ALL_TASKS))
    level = draw(st.sampled_from(sorted(task.LEVELS)))
    return task, task.sample(level, random.Random(draw(st.integers(0, 2**32))))


@settings(max_examples=300)
@given(queries())
def test_answers_and_traces_are_right(drawn: tuple[ModuleType, Query]) -> None:
    """Against solvers that share nothing with the tasks; a trace says what happens at every step."""
    task, query = drawn
    states = SOLVERS[domain_of(task)](query.prompt)
    assert query.level == len(states)
    assert query.answer == states[-1]
    prefix, steps = query.reasoning.split(" : ")
    assert prefix.startswith("let me ")
    words = steps.split()
    size = len(words) // query.level
    assert len(words) == size * query.level
    assert words[size - 1 :: size] == states
    assert "".join(words[::size]) == "abcdefgh"[: query.level]
    if task is shell_game:
        swaps = re.findall(r"swap (\w+ \w+)", query.prompt)
        assert [" ".join(words[at + 1 : at + 3]) for at in range(0, len(words), size)] == swaps


@settings(max_examples=100)
@given(queries())
def test_vocabulary_covers_a_query_and_its_length_is_small(drawn: tuple[ModuleType, Query]) -> None:
    _, query = drawn
    response = format_response(Mode.THINK, query.answer, query.reasoning)
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": query.prompt}], add_generation_prompt=True, return_dict=False
    )
    completion = TOKENIZER.encode(response, add_special_tokens=False)
    assert TOKENIZER.unk_token_id not in [*prompt, *completion]
    assert TOKENIZER.decode(completion).split() == response.split()
    assert len(prompt) <= 45
    assert len(completion) + 1 <= 60  # the end token


@pytest.mark.parametrize("task", ALL_TASKS, ids=domain_of)
def test_draws_keep_the_parts_and_the_answers_apart(task: ModuleType) -> None:
    drawn = {part: list(draw(task, 900, held_out=part, fraction=0.2, seed=0)) for part in (True, False)}
    texts = {part: {query.prompt for query in found} for part, found in drawn.items()}
    assert not texts[True] & texts[False]
    for found in drawn.values():
        assert {query.domain for query in found} == {domain_of(task)}
        assert Counter(query.level for query in found) == {level: 100 * w for level, w in task.LEVELS.items()}
    hardest = Counter(query.answer for query in drawn[False] if query.level == max(task.LEVELS))
    assert max(hardest.values()) < 0.5 * hardest.total(), "no answer is a good guess"


# --- several tasks ----------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.sampled_from([TASKS, TASKS[:1], TASKS[::-1]]))
@settings(max_examples=20)
def test_tasks_take_turns(num_queries: int, tasks: tuple[ModuleType, ...]) -> None:
    """Each draws what it draws alone."""
    found = list(draw_equally(tasks, num_queries, held_out=False, fraction=0.2, seed=3))
    assert len(found) == num_queries
    for place, task in enumerate(tasks):
        own = found[place :: len(tasks)]
        assert own == list(islice(draw(task, num_queries, held_out=False, fraction=0.2, seed=3), len(own)))


def test_vocabulary_is_the_union() -> None:
    words = {word for task in ALL_TASKS for word in task.VOCABULARY}
    assert words < set(TOKENIZER.get_vocab())
    alone = build_tokenizer(chain_sum)
    assert len(TOKENIZER) == len(alone) + len(words - set(chain_sum.VOCABULARY))


def build(output_dir: Path, **fields: Any) -> dict[str, pd.DataFrame]:
    """`hgpo-trl data task` with these fields: what it writes."""
    recipe = output_dir.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(TINY | fields | {"output_dir": str(output_dir)}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hgpo-trl", "data", "task", "--config", str(recipe)])
        main()
    return {part: pd.read_parquet(output_dir / f"{part}.parquet") for part in ("hft", "hgpo", "eval")}


def by_domain(table: pd.DataFrame) -> dict[str, int]:
    return table["domain"].value_counts().to_dict()


def test_data_of_two_tasks(tmp_path: Path) -> None:
    parts = build(tmp_path / "data", tasks=NAMES)
    assert by_domain(parts["hft"]) == {"chain_sum": 36, "shell_game": 36}
    assert by_domain(parts["hgpo"]) == by_domain(parts["eval"]) == {"chain_sum": 18, "shell_game": 18}
    for table in parts.values():
        for row in table.itertuples():
            assert ("swap" in row.prompt[0]["content"]) == (row.domain == "shell_game")
    for row in parts["eval"].itertuples():
        assert row.answer == SOLVERS[row.domain](row.prompt[0]["content"])[-1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "base")
    for row in parts["hft"].itertuples():
        text = f"{row.prompt[0]['content']} {row.completion[0]['content']}"
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_stage_two_of_one_of_two_tasks(tmp_path: Path) -> None:
    """The other parts stay as they are; what Stage II has is what it has where the task stands alone."""
    both = build(tmp_path / "both", tasks=NAMES)
    one = build(tmp_path / "one", tasks=NAMES, hgpo_tasks=NAMES[1:])
    alone = build(tmp_path / "alone", tasks=NAMES[1:])
    assert by_domain(one["hgpo"]) == {"shell_game": 36}
    pd.testing.assert_frame_equal(one["hgpo"], alone["hgpo"])
    pd.testing.assert_frame_equal(one["hft"], both["hft"])
    pd.testing.assert_frame_equal(one["eval"], both["eval"])


def test_a_file_is_a_domain_of_its_stem(tmp_path: Path) -> None:
    sizes = {"num_hft": 28, "num_hgpo": 14, "num_eval": 14}
    parts = build(tmp_path / "data", tasks=[COUNT_LETTERS, NAMES[0]], hgpo_tasks=[COUNT_LETTERS], **sizes)
    assert by_domain(parts["hft"]) == {"count_letters": 14, "chain_sum": 14}
    assert by_domain(parts["hgpo"]) == {"count_letters": 14}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks": []}, "tasks is empty; name at least one task"),
        ({"tasks": NAMES, "hgpo_tasks": []}, "hgpo_tasks is empty; name at least one of tasks"),
        ({"tasks": [NAMES[0], NAMES[0]]}, "two have the domain 'chain_sum'"),
        ({"tasks": [NAMES[0], "{folder}/chain_sum.py"]}, "two have the domain 'chain_sum'"),
        (
            {"tasks": NAMES[:1], "hgpo_tasks": NAMES[1:]},
            f"hgpo_tasks: '{NAMES[1]}' is none of tasks=\\['{NAMES[0]}'\\]",
        ),
        ({"tasks": NAMES, "hgpo_tasks": ["chain_sum"]}, "hgpo_tasks: 'chain_sum' is none of tasks="),
        ({"tasks": NAMES, "hgpo_tasks": [NAMES[0], NAMES[0]]}, "names a task twice"),
        ({"tasks": [NAMES[0], "hgpo_trl.tasks.nothing"]}, "There is no module 'hgpo_trl.tasks.nothing'"),
        ({"tasks": [NAMES[0], "json"]}, "tasks: 'json' lacks LEVELS, VOCABULARY, sample"),
    ],
)
def test_tasks_that_are_refused(fields: dict[str, list[str]], words: str, tmp_path: Path) -> None:
    (tmp_path / "chain_sum.py").write_text(Path(chain_sum.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    fields = {key: [name.format(folder=tmp_path) for name in value] for key, value in fields.items()}
    with refused(words):
        build(tmp_path / "data", **fields)
    assert not (tmp_path / "data").exists()
