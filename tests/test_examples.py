"""Examples of an evaluation: which prompts are shown, what is shown of them, and how the report shows it."""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import evaluation

from hgpo_trl.cli import main
from hgpo_trl.common.files import nan_to_null, write_json
from hgpo_trl.evaluation import examples
from hgpo_trl.evaluation.examples import LIMIT, LONGEST, PER_GROUP, WRONG_CHOICES, chosen_prompts, shortened
from hgpo_trl.modes import MODES
from hgpo_trl.reporting.report import write_report

THINK, NO_THINK = "<think>\n2 + 2 = 4\n</think>\n\n4", "<no_think>\n5\n</no_think>"


def data_of(prompts: list[str], answers: list[str] | None = None) -> Dataset:
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": conversations, "answer": answers or ["4"] * len(prompts)})


def samples_of(prompts: int, picked: list[int] | None = None, per_mode: int = 2, **changes: Any) -> pd.DataFrame:
    """Thinking is right, not thinking wrong; the first responses are THINK and NO_THINK."""
    rows = [
        {
            "prompt_id": prompt,
            "mode": mode.value,
            "sample": sample,
            "completion": text if sample == 0 else f"<{mode}> another </{mode}>",
            "num_tokens": tokens + sample,
            "truncated": False,
            "faults": [],
            "prob_think": 0.25,
            "prob_no_think": 0.5,
            "picked": 1 if picked is None else picked[prompt],
            "reward": reward,
        }
        | changes
        for prompt in range(prompts)
        for mode, text, tokens, reward in zip(MODES, (THINK, NO_THINK), (9, 3), (1.0, 0.0), strict=True)
        for sample in range(per_mode)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def examples_of(samples: pd.DataFrame, dataset: Dataset, groups: Mapping[str, Sequence[Any]], **settings: Any) -> list:
    """As `hgpo-trl evaluate` makes them: the prompts are chosen without the texts, which are read for these alone."""
    chosen = chosen_prompts(samples.drop(columns="completion"), dataset, groups, **settings)
    of_these = samples[samples["prompt_id"].isin([prompt for prompt, _ in chosen])]
    return examples.examples_of(chosen, of_these, dataset, groups, **settings)


# --- which -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=30))
def test_each_group_has_its_first_prompts_and_no_choice_counts(data: st.DataObject, sizes: list[int]) -> None:
    levels = [level for level, size in enumerate(sizes) for _ in range(size)]
    prompts = [f"prompt {n}" for n in range(len(levels))]
    picks = data.draw(st.lists(st.integers(-1, 1), min_size=len(levels), max_size=len(levels)))
    found = examples_of(samples_of(len(levels), picks, per_mode=1), data_of(prompts), {"level": levels})
    shown = [e for e in found if not e["chosen_for_its_wrong_choice"]]
    wrong = [e for e in found if e["chosen_for_its_wrong_choice"]]
    counts = Counter(e["level"] for e in shown)
    assert len(shown) == min(LIMIT, sum(min(PER_GROUP, size) for size in sizes))
    assert all(counts[level] <= min(PER_GROUP, size) for level, size in enumerate(sizes))
    assert set(counts) == set(range(len(sizes))), "every level has one before any has two"
    assert [e["level"] for e in shown] == sorted(e["level"] for e in shown)
    ids = [e["prompt_id"] for e in found]
    assert len(set(ids)) == len(ids)
    possible = [n for n, pick in enumerate(picks) if pick != 0 and n not in {e["prompt_id"] for e in shown}]
    assert len(wrong) == min(WRONG_CHOICES, len(possible))
    assert {e["prompt_id"] for e in wrong} <= {*possible}
    assert all(e["chosen"] != e["better"] == "think" for e in wrong)
    other = examples_of(samples_of(len(levels), [0] * len(levels), per_mode=1), data_of(prompts), {"level": levels})
    assert [e["prompt_id"] for e in other] == [e["prompt_id"] for e in shown], "what a model chooses does not matter"


def test_the_order_of_the_data_does_not_matter() -> None:
    prompts = [f"prompt {n}" for n in range(30)]
    there, back = (
        examples_of(samples_of(30, [0] * 30), data_of(names), {"level": [1] * 30}) for names in (prompts, prompts[::-1])
    )
    assert [e["prompt"] for e in there] == [e["prompt"] for e in back]
    assert {e["prompt"] for e in there} != {*prompts[:PER_GROUP]}


def test_a_repeated_prompt_is_shown_once() -> None:
    found = examples_of(samples_of(6), data_of(["a", "b"] * 3), {"level": [1, 2] * 3})
    assert sorted(e["prompt"] for e in found) == ["a", "b"]


def test_groups_are_domains_and_levels() -> None:
    groups = {"domain": ["legs"] * 4 + ["sums"] * 4, "level": [1, 1, "hard", None] * 2, "subject": ["x"] * 8}
    found = examples_of(samples_of(8), data_of([f"{n}" for n in range(8)]), groups)
    labels = [(e["domain"], e["level"]) for e in found]
    assert labels == [(d, level) for d in ("legs", "sums") for level in (1, 1, "hard", None)]


# --- what ------------------------------------------------------------------------------------------------------


def test_an_example_by_hand() -> None:
    (found,) = examples_of(samples_of(1), data_of(["2 + 2?"]), {})
    assert found == {
        "prompt_id": 0,
        "domain": None,
        "level": None,
        "prompt": "2 + 2?",
        "reference": "4",
        "prob_think": 0.25,
        "chosen": "no_think",
        "better": "think",
        "chosen_for_its_wrong_choice": False,
        "responses": {
            "think": {
                "reasoning": "2 + 2 = 4",
                "answer": "4",
                "score": 1.0,
                "num_tokens": 9,
                "truncated": False,
                "faults": [],
                "mean_score": 1.0,
                "mean_tokens": 9.5,
            },
            "no_think": {
                "reasoning": "",
                "answer": "5",
                "score": 0.0,
                "num_tokens": 3,
                "truncated": False,
                "faults": [],
                "mean_score": 0.0,
                "mean_tokens": 3.5,
            },
        },
    }


def test_the_choice_is_the_reports() -> None:
    """With its margin and its bias; without a valid score no mode is the better one."""
    data = data_of(["2 + 2?"])
    (biased,) = examples_of(samples_of(1), data, {}, decision_bias=2.0)
    assert (biased["chosen"], biased["better"]) == ("think", "think")
    assert biased["prob_think"] > 0.5
    (close,) = examples_of(samples_of(1), data, {}, margin=1.5)
    assert close["better"] == "no_think"
    (neither,) = examples_of(samples_of(1, [-1]), data, {})
    assert neither["chosen"] == "neither"
    (unscored,) = examples_of(samples_of(1, reward=math.nan), data, {})
    assert unscored["better"] is None
    assert math.isnan(unscored["responses"]["think"]["mean_score"])


def test_a_malformed_response_is_shown_whole() -> None:
    (found,) = examples_of(samples_of(1, completion="<think> no end", faults=["unclosed"]), data_of(["q"]), {})
    for response in found["responses"].values():
        assert (response["reasoning"], response["answer"]) == ("", "<think> no end")
        assert response["faults"] == ["unclosed"]


def test_prompts_of_every_kind() -> None:
    plain = Dataset.from_dict({"prompt": ["Q: 2 + 2?"]})
    (found,) = examples_of(samples_of(1), plain, {})
    assert (found["prompt"], found["reference"]) == ("Q: 2 + 2?", None)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    (found,) = examples_of(samples_of(1), Dataset.from_dict({"prompt": [turns], "answer": [None]}), {})
    assert (found["prompt"], found["reference"]) == ("system: Be brief.\n\nuser: 2 + 2?", None)


@given(text=st.text(max_size=60), longest=st.integers(4, 50))
def test_a_shortened_text_keeps_its_beginning_and_its_end(text: str, longest: int) -> None:
    found = shortened(text, longest)
    if len(text) <= longest:
        assert found == text
        return
    start, note, end = found.partition(f"\n[… {len(text) - longest} characters left out …]\n")
    assert note
    assert text.startswith(start)
    assert text.endswith(end)
    assert len(start) + len(end) == longest


def test_the_size_is_bounded() -> None:
    prompts = [f"{n} {'x' * 50_000}" for n in range(100)]
    long = f"<think> {'y' * 50_000} </think> {'z' * 50_000}"
    found = examples_of(samples_of(100, completion=long), data_of(prompts, prompts), {"level": list(range(100))})
    assert len(found) == LIMIT + WRONG_CHOICES
    assert len(json.dumps(found)) < 7 * (LONGEST + 500) * len(found) < 2_000_000


# --- in the report -----------------------------------------------------------------------------------------------


class Texts(HTMLParser):
    """What a page shows, and its tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def example(**changes: Any) -> dict[str, Any]:
    (found,) = examples_of(samples_of(1), data_of(["2 + 2?"]), {"level": [3], "domain": ["sums"]})
    return nan_to_null(found | changes)


def report(tmp_path: Path, *examples: dict[str, Any], **others: list) -> tuple[str, str]:
    names = [*others, "hgpo"]
    found = {**others, "hgpo": list(examples)}
    path = write_report({name: evaluation(name) for name in names}, tmp_path, examples=found)
    return path.read_text(encoding="utf-8"), path.with_suffix(".html").read_text(encoding="utf-8")


def test_both_responses_are_shown_with_their_verdicts(tmp_path: Path) -> None:
    text, page = report(tmp_path, example())
    section = page[page.index('<section class="example">') : page.index("</section>")]
    shown = " ".join(Texts(section).texts)
    for part in (
        "sums, level 3, prompt 0", "2 + 2?", "Reference: 4",
        "The model thinks with probability 25.0\u00a0% and chooses to answer at once. The choice is wrong:",
        "2 + 2 = 4", "9 tokens", "on average score 1.00, 9.5 tokens", "3 tokens", "on average score 0.00, 3.5 tokens",
    ):  # fmt: skip
        assert part in shown
    think, no_think = section.split('<div class="response ')[1:]
    assert think.startswith("right")
    assert no_think.startswith("wrong")
    assert '<span class="badge">better</span>' in think
    assert '<span class="badge">chosen</span>' in no_think
    assert "<details open>" in think
    assert "<details" not in no_think
    assert "### sums, level 3, prompt 0" in text
    assert "```\n2 + 2 = 4\n\n4\n```" in text
    assert "Not thinking, chosen: wrong, 3 tokens, on average score 0.00, 3.5 tokens" in text


def test_what_a_model_wrote_is_never_markup(tmp_path: Path) -> None:
    """Neither in the page nor in Markdown, whatever it is."""
    evil = "</div></section><script>alert(1)</script>\n```\n# Heading\n````\n<b>&amp;"
    one = example(prompt=evil, reference=evil)
    for response in one["responses"].values():
        response |= {"reasoning": evil, "answer": evil}
    text, page = report(tmp_path, one)
    parsed = Texts(page[page.index("<body>") :])
    assert not {"script", "b"} & {tag for tag, _ in parsed.tags}
    assert parsed.texts.count(evil) == 5
    assert page.count("<section") == page.count("</section>") == 1
    assert text.count(f"`````\n{evil}") == 3
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "# Heading" not in [line.strip() for line in outside.splitlines()]
    assert "<script>" not in outside.replace(r"\<script>", "")


def test_a_long_reasoning_is_folded_and_markdown_is_shorter(tmp_path: Path) -> None:
    one = example()
    one["responses"]["think"]["reasoning"] = "start " + "x" * 2000 + " end"
    text, page = report(tmp_path, one)
    assert "<details><summary>Reasoning, 2,010 characters</summary>" in page
    assert "x" * 2000 in page
    assert "x" * 300 not in text
    assert re.search(r"start x+ \[…\] x+ end", text)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"score": None}, "not scored"),
        ({"score": 0.73}, "score 0.73"),
        ({"truncated": True}, "cut off at the length limit"),
        ({"faults": ["unclosed", "nested"]}, "malformed (unclosed, nested)"),
        ({"mean_score": None}, "on average score –"),
    ],
)
def test_notes(tmp_path: Path, changes: dict[str, Any], shown: str) -> None:
    one = example()
    one["responses"]["think"] |= changes
    for content in report(tmp_path, one):
        assert shown in content


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"chosen": "neither"}, "chooses neither mode. The choice is wrong: it is better to think."),
        ({"chosen": "think"}, "chooses to think. The choice is right."),
        ({"better": None}, "chooses to answer at once. Which mode is better is not known"),
    ],
)
def test_choices(tmp_path: Path, changes: dict[str, Any], shown: str) -> None:
    assert shown in report(tmp_path, example(**changes))[0]


def test_wrong_choices_are_apart_and_the_other_models_choices_are_named(tmp_path: Path) -> None:
    wrong = example(prompt_id=7, prompt="9 + 9?", chosen_for_its_wrong_choice=True)
    before = [example(prob_think=0.9, chosen="think"), example(prompt="another prompt of that number")]
    text, page = report(tmp_path, example(), wrong, hft=before[::-1])
    for content in (text, page):
        places = [content.index(part) for part in ("Responses of hgpo", "2 + 2?", "Wrong choices of hgpo", "9 + 9?")]
        assert places == sorted(places)
        assert content.count("“hft” thinks with probability 90.0\u00a0% and chooses to think.") == 1
    assert "another prompt" not in text


def test_the_command_shows_what_the_evaluations_folders_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation of an earlier version has no examples."""
    for name in ("old", "new"):
        write_json(tmp_path / name / "report.json", evaluation(name))
    write_json(tmp_path / "new" / "examples.json", [example()])
    for names in (["old", "new"], ["new", "old"], ["old"]):
        words = ["--evaluations", *(f"{name}={tmp_path / name}" for name in names)]
        monkeypatch.setattr("sys.argv", ["hgpo-trl", "report", *words, "--output_dir", str(tmp_path / "out")])
        main()
        text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        assert ("## Responses of new" in text) == ("new" in names)
        assert "Responses of old" not in text


def test_without_examples_there_is_no_section(tmp_path: Path) -> None:
    path = write_report({"hgpo": evaluation()}, tmp_path, examples={})
    assert "Responses of" not in path.read_text(encoding="utf-8")
    text, _ = report(tmp_path, copy.deepcopy(example()))
    assert "Wrong choices" not in text
