"""`hgpo_trl.reporting.report`: the files, what they say for numbers that exist and for those that do not; errors."""

import copy
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from hgpo_trl.common.files import write_json
from hgpo_trl.reporting.report import write_report
from hgpo_trl.reporting.training_log import load_training_log
from hgpo_trl.scripts.report import main

NO_BREAK = "\u00a0"
PNG = b"\x89PNG\r\n\x1a\n"
POLICIES = ("auto", "sampled", "think", "no_think", "oracle")
ACCURACY = {"auto": 0.9617, "sampled": 0.9302, "think": 0.9812, "no_think": 0.7023, "oracle": 0.9851}
TOKENS = {"auto": 1210.4, "sampled": 1302.5, "think": 2501.6, "no_think": 88.7, "oracle": 1190.8}

WORDS = {"no_think": 0.1234, "think_answer": 0.0, "reasoning": 4.5}
PARTS = {"thinking_gains": 0.7561, "no_gain": 0.9323}

Evaluation = dict[str, Any]


def around(value: float, width: float) -> list[float]:
    return [value - width, value + width]


def figures(hybrid_accuracy: float = 0.8914, thinking_ratio: float = 0.4137) -> Evaluation:
    """The part of an evaluation that is repeated for every level."""
    return {
        "num_prompts": 270,
        "hybrid_accuracy": hybrid_accuracy,
        "hybrid_accuracy_where": dict(PARTS),
        "balanced_hybrid_accuracy": 0.8442,
        "unsolved": 0.0778,
        "reflection_words": dict(WORDS),
        "answer_length_ratio": 1.1551,
        "thinking_ratio": thinking_ratio,
        "off_mode_mass": 0.0213,
        "accuracy": dict(ACCURACY),
        "mean_tokens": dict(TOKENS),
        "intervals": {
            "hybrid_accuracy": around(hybrid_accuracy, 0.0211),
            "hybrid_accuracy_where": {part: around(value, 0.02) for part, value in PARTS.items()},
            "balanced_hybrid_accuracy": around(0.8442, 0.0333),
            "unsolved": [0.0555, 0.1001],
            "reflection_words": {of: around(value, 0.05) for of, value in WORDS.items()},
            "answer_length_ratio": [1.05, 1.25],
            "thinking_ratio": around(thinking_ratio, 0.0311),
            "off_mode_mass": [0.0123, 0.0321],
            "accuracy": {policy: around(ACCURACY[policy], 0.0111) for policy in POLICIES},
            "mean_tokens": {policy: around(TOKENS[policy], 31.0) for policy in POLICIES},
        },
    }


def evaluation(name: str = "hgpo", levels: tuple[Any, ...] = (1, 2, 3), **changes: Any) -> Evaluation:
    by_level = [{"level": level, **figures(thinking_ratio=0.1 * (i + 1))} for i, level in enumerate(levels)]
    return {
        "model": f"runs/chain-sum/{name}",
        "dataset": "runs/chain-sum/data/eval.parquet",
        "samples_per_mode": 8,
        "margin": 0.05,
        "format_faults": {"think": 0.0471, "no_think": 0.0127},
        "truncated": {"think": 0.0333, "no_think": 0.0},
        "by_level": by_level,
        **figures(),
        **changes,
    }


def hgpo_log(steps: int = 60) -> list[dict[str, float]]:
    metrics = ("reward", "length", "prob")
    log: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        entry = {f"hgpo/{metric}/{mode}": 0.5 for metric in metrics for mode in ("think", "no_think")}
        entry |= {"hgpo/off_mode_mass": 0.01, "hgpo/think_win_rate": 0.4, "hgpo/no_signal": 0.1}
        log.append({"step": step, "loss": 0.1, **entry})
    return [*log, {"step": steps, "eval_hgpo/hybrid_accuracy": 0.9}, {"step": steps, "train_runtime": 3.0}]


HFT_LOG = [{"step": step, "loss": 3.0 / step} for step in range(10, 500, 10)]


def read(path: Path) -> tuple[str, str]:
    """report.md, and report.html without its pictures."""
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    return path.read_text(encoding="utf-8"), re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", page)


def table(text: str, first_header: str) -> dict[str, list[str]]:
    """A table of report.md: first cell of the row -> the others, with plain spaces."""
    block = next(b for b in text.split("\n\n") if b.startswith(f"| {first_header}"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return {row[0]: [cell.replace(NO_BREAK, " ") for cell in row[1:]] for row in rows}


def null(entry: Evaluation) -> None:
    """Every number that an evaluation without valid samples lacks becomes null, in place."""
    for key, value in entry.items():
        if key in ("accuracy", "mean_tokens", "hybrid_accuracy_where", "reflection_words"):
            entry[key] = dict.fromkeys(value)
        elif key == "intervals":
            null(value)
        elif key in ("hybrid_accuracy", "balanced_hybrid_accuracy", "unsolved", "thinking_ratio", "off_mode_mass") or (
            key == "answer_length_ratio"
        ):
            entry[key] = None if isinstance(value, float) else [None, None]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it."""
    return write_report(
        {"hft": evaluation("hft", thinking_ratio=0.5001), "hgpo": evaluation()},
        tmp_path_factory.mktemp("report"),
        training_logs={"hft": HFT_LOG, "hgpo": hgpo_log()},
        margin_sweep={
            0.4: evaluation("d4", thinking_ratio=0.2222),
            0.0: evaluation("d0", thinking_ratio=0.6666),
        },
        title="Chain sum",
    )


def test_files(full: Path) -> None:
    names = ["accuracy_vs_tokens", "margin_sweep", "thinking_ratio_by_level", "training_curves"]
    expected = {f"{name}.png" for name in names} | {"report.md", "report.html", "report.json"}
    assert full.name == "report.md"
    assert {path.name for path in full.parent.iterdir()} == expected
    for name in names:
        content = full.with_name(f"{name}.png").read_bytes()
        assert content.startswith(PNG)
        assert int.from_bytes(content[16:20]) == 1620  # pixels wide: 9 in at 180 per inch
        assert f"({name}.png)" in full.read_text(encoding="utf-8")


def test_page_is_self_contained_and_says_the_same(full: Path) -> None:
    text, page = read(full)
    assert "http" not in page
    assert "<script" not in page
    assert "<link" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources == ["data:image/png;base64,"] * 4
    assert "<h1>Chain sum</h1>" in page
    words = html.unescape(re.sub(r"<[^>]*>", "", page[page.index("<body>") :]))
    text = re.sub(r"!\[.*|^\| :--.*|^(#+|>|-) |[|`\\]", "", text, flags=re.MULTILINE)
    assert re.sub(r"\s", "", words) == re.sub(r"\s", "", text)


def test_json_is_the_input_and_every_file_is_reproducible(full: Path, tmp_path: Path) -> None:
    data = json.loads(full.with_name("report.json").read_text(encoding="utf-8"))
    sweep = data.pop("margin_sweep")
    assert data == {"hft": evaluation("hft", thinking_ratio=0.5001), "hgpo": evaluation()}
    assert sweep == [
        {"train_margin": 0.0, **evaluation("d0", thinking_ratio=0.6666)},
        {"train_margin": 0.4, **evaluation("d4", thinking_ratio=0.2222)},
    ]
    again = write_report(
        {name: data[name] for name in ("hft", "hgpo")},
        tmp_path,
        training_logs={"hft": HFT_LOG, "hgpo": hgpo_log()},
        margin_sweep={e.pop("train_margin"): e for e in sweep},
        title="Chain sum",
    )
    for path in full.parent.iterdir():
        assert path.read_bytes() == again.with_name(path.name).read_bytes(), path.name


def test_numbers_of_the_model_table(full: Path) -> None:
    rows = table(read(full)[0], " |")
    assert rows[""] == ["hft", "hgpo"]
    assert rows["Hybrid accuracy"][1] == "89.1 % [87.0, 91.2]"
    assert rows["Hybrid accuracy, balanced"][1] == "84.4 % [81.1, 87.8]"
    assert rows["Right choice where thinking gains"][1] == "75.6 % [73.6, 77.6]"
    assert rows["Right choice where it does not"][1] == "93.2 % [91.2, 95.2]"
    assert rows["Solved by neither mode"][1] == "7.8 % [5.5, 10.0]"
    assert rows["Thinking ratio"] == ["50.0 % [38.3, 44.5]", "41.4 % [38.3, 44.5]"]
    assert rows["Off-mode mass"][1] == "2.1 % [1.2, 3.2]"
    assert rows["Reflection words: answers without thinking"][1] == "0.12 [0.07, 0.17]"
    assert rows["Reflection words: reasoning"][1] == "4.50 [4.45, 4.55]"
    assert rows["Length of answers without thinking, relative"][1] == "1.16 [1.05, 1.25]"
    assert rows["Format faults, thinking"][1] == "4.7 %"
    assert rows["Format faults, not thinking"][1] == "1.3 %"
    assert rows["Truncated, thinking"][1] == "3.3 %"
    labels = ("own choice", "own choice, sampled", "always thinking", "never thinking", "oracle")
    for label, policy in zip(labels, POLICIES, strict=True):
        low, high = (f"{100 * bound:.1f}" for bound in around(ACCURACY[policy], 0.0111))
        assert rows[f"Accuracy: {label}"][1] == f"{100 * ACCURACY[policy]:.1f} % [{low}, {high}]"
    assert rows["Tokens: own choice"][1] == "1,210 [1,179, 1,241]"
    assert rows["Tokens: never thinking"][1] == "88.7 [57.7, 119.7]"


def test_tables_by_level_and_by_margin(full: Path) -> None:
    text, _ = read(full)
    lines = [line.replace(NO_BREAK, " ") for line in text.splitlines()]
    level_rows = [line.split(" | ")[:7] for line in lines if re.match(r"\| \d \| h", line)]
    assert [row[:2] for row in level_rows] == [[f"| {k}", name] for k in (1, 2, 3) for name in ("hft", "hgpo")]
    assert level_rows[4][2:] == [
        "270",
        "89.1 % [87.0, 91.2]",
        "84.4 % [81.1, 87.8]",
        "7.8 % [5.5, 10.0]",
        "30.0 % [26.9, 33.1]",
    ]
    rows = table(text, "Training margin")
    assert list(rows)[2:] == ["0", "0.4"]
    assert rows["0.4"][1:3] == ["84.4 % [81.1, 87.8]", "22.2 % [38.3, 44.5]"]


def test_sentences_are_computed(full: Path) -> None:
    text = read(full)[0].replace(NO_BREAK, " ")
    assert (
        "> `hgpo` answers 96.2 % correctly with 48 % of the tokens of always thinking and picks the better "
        "mode for 89.1 % [87.0, 91.2] of the prompts (75.6 % of those where thinking gains, 93.2 % of the others)."
        in text
    )
    assert "against the same model always thinking: accuracy −1.9 points, tokens −52 %." in text
    assert "against the same model never thinking: accuracy +25.9 points, tokens +1265 %." in text
    assert "`hgpo` against `hft`, both by their own choice: hybrid accuracy +0.0 points, balanced +0.0 points" in text
    assert "7.8 % of the prompts are solved by neither mode of `hgpo`." in text
    assert "`hft` thinks with probability 10.0 % [6.9, 13.1] at level 1 and 30.0 % [26.9, 33.1] at level 3." in text
    assert "Note:" not in text


def test_a_worse_model_is_not_praised(tmp_path: Path) -> None:
    worse = evaluation("hgpo", hybrid_accuracy=0.5)
    text = read(write_report({"hft": evaluation("hft"), "hgpo": worse}, tmp_path))[0].replace(NO_BREAK, " ")
    assert "hybrid accuracy −39.1 points, balanced +0.0 points, accuracy +0.0 points, tokens +0 %." in text


def test_reports_of_earlier_versions_are_shown_without_the_later_metrics(tmp_path: Path) -> None:
    old = evaluation("hft")
    for part in (old, *old["by_level"]):
        for name in (
            "hybrid_accuracy_where",
            "balanced_hybrid_accuracy",
            "unsolved",
            "reflection_words",
            "answer_length_ratio",
        ):
            del part[name], part["intervals"][name]
    text = read(write_report({"new": evaluation(), "hft": old}, tmp_path))[0].replace(NO_BREAK, " ")
    rows = table(text, " |")
    assert rows["Hybrid accuracy, balanced"] == ["84.4 % [81.1, 87.8]", "–"]
    assert rows["Solved by neither mode"] == ["7.8 % [5.5, 10.0]", "–"]
    assert "picks the better mode for 89.1 % [87.0, 91.2] of the prompts.\n" in text
    assert "solved by neither mode of" not in text


def test_domains_have_a_table_where_there_are_several(tmp_path: Path) -> None:
    domains = [{"domain": name, **figures(thinking_ratio=share)} for name, share in (("legs", 0.2), ("sums", 0.7))]
    text = read(write_report({"hgpo": evaluation(by_domain=domains)}, tmp_path / "two"))[0].replace(NO_BREAK, " ")
    rows = table(text, "Domain")
    assert [rows[name][0:2] for name in ("legs", "sums")] == [["hgpo", "270"]] * 2
    assert rows["sums"][5].startswith("70.0 %")
    one = read(write_report({"hgpo": evaluation(by_domain=domains[:1])}, tmp_path / "one"))[0]
    assert "| Domain" not in one


def curve(*biases: float) -> list[dict[str, Any]]:
    """Of one model, as report.json has it; numbers that do not exist are null."""
    points = enumerate(biases)
    return [
        {"bias": bias, "accuracy": {"auto": 0.7 + 0.05 * i}, "mean_tokens": {"auto": 88.0 + 600 * i}}
        for i, bias in points
    ]


@pytest.mark.filterwarnings("error")
def test_a_decision_bias_curve_is_drawn(tmp_path: Path) -> None:
    swept = evaluation("hft", decision_bias_curve=curve(-3.0, 0.0, 1.5, 4.0))
    plain = write_report({"hft": evaluation("hft"), "hgpo": evaluation()}, tmp_path / "plain")
    assert not plain.with_name("decision_bias.png").exists()
    one = write_report({"hft": swept, "hgpo": evaluation()}, tmp_path / "one")
    assert "(decision_bias.png)" in read(one)[0]
    both = {"hft": swept, "hgpo": evaluation(decision_bias_curve=curve(-1.0, 0.0, 2.0))}
    two = write_report(both, tmp_path / "two")
    pictures = [path.with_name("decision_bias.png").read_bytes() for path in (one, two)]
    assert all(picture.startswith(PNG) for picture in pictures)
    assert pictures[0] != pictures[1]
    null = curve(0.0)
    null[0]["accuracy"]["auto"] = None
    write_report({"hft": evaluation(decision_bias_curve=null)}, tmp_path / "null")


def test_a_decision_bias_is_said(tmp_path: Path) -> None:
    biased = evaluation("hft", decision_bias=-1.5)
    text = read(write_report({"hft": biased, "hgpo": evaluation(decision_bias=0.0)}, tmp_path))[0]
    assert "margin 0.05, decision bias -1.5." in text
    assert text.count("decision bias") == 1


@pytest.mark.parametrize(
    ("declared", "said"),
    [("qwen3", ", mode format `qwen3`."), ({"name": "mine", "think": "<a>"}, ", mode format `mine`.")],
)
def test_a_mode_format_is_said(declared: Any, said: str, tmp_path: Path) -> None:
    text = read(write_report({"own": evaluation(), "other": evaluation(mode_format=declared)}, tmp_path))[0]
    assert said in text
    assert text.count("mode format") == 1
    assert text.count("<no_think>") == 1  # where the glossary has it as this library's own


def test_one_evaluation_without_levels(tmp_path: Path) -> None:
    path = write_report({"hgpo": evaluation(levels=())}, tmp_path)
    text, page = read(path)
    pictures = [file.name for file in tmp_path.glob("*.png")]
    assert pictures == ["accuracy_vs_tokens.png"]
    assert page.count("<img") == 1
    assert "| Level" not in text
    assert "at level" not in text
    assert "margin_sweep" not in json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("error")
def test_null_is_a_dash(tmp_path: Path) -> None:
    empty = evaluation(levels=(1, 2))
    null(empty["by_level"][0])
    text, page = read(write_report({"hgpo": empty}, tmp_path / "level"))
    assert text.count(f"| 1 | hgpo | 270 |{' – |' * 10}") == 1
    assert "at level 1" not in text

    null(empty)
    text, page = read(write_report({"hft": evaluation(), "hgpo": empty}, tmp_path / "all", margin_sweep={0.1: empty}))
    assert "> `hgpo` has no valid samples." in text
    assert table(text, " |")["Hybrid accuracy"][1] == "–"
    assert not re.search(r"\bnan\b|\bNone\b", text + page)


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    write_report({"hgpo": evaluation(hybrid_accuracy=math.nan)}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["hgpo"]["hybrid_accuracy"] is None


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (
            "accuracy",
            "`hgpo` takes 48 % of the tokens of always thinking and picks the better mode for 89.1 % ",
        ),
        ("mean_tokens", "`hgpo` answers 96.2 % correctly and picks the better mode for 89.1 % "),
        ("hybrid_accuracy", "`hgpo` answers 96.2 % correctly with 48 % of the tokens of always thinking."),
    ],
)
def test_headline_leaves_out_what_is_null(tmp_path: Path, missing: str, sentence: str) -> None:
    partial = evaluation()
    partial[missing] = dict.fromkeys(POLICIES) if isinstance(partial[missing], dict) else None
    assert sentence in read(write_report({"hgpo": partial}, tmp_path))[0].replace(NO_BREAK, " ")


def test_levels_may_be_text_and_differ_between_evaluations(tmp_path: Path) -> None:
    first = evaluation("hft", levels=("counting & probability", "algebra"))
    text, page = read(write_report({"hft": first, "hgpo": evaluation(levels=(2, "algebra"))}, tmp_path))
    rows = [line.split(" | ")[:2] for line in text.splitlines() if "| 270 |" in line]
    assert rows == [
        ["| 2", "hgpo"],
        ["| algebra", "hft"],
        ["| algebra", "hgpo"],
        ["| counting & probability", "hft"],
    ]
    assert "<td>counting &amp; probability</td>" in page


def test_notes_say_where_evaluations_differ(tmp_path: Path) -> None:
    other = evaluation("hft", dataset="math500", margin=0.2)
    text, _ = read(write_report({"hft": other, "hgpo": evaluation()}, tmp_path))
    notes = [line for line in text.splitlines() if line.startswith("Note:")]
    assert len(notes) == 2
    assert "data set (`hft` math500, `hgpo` runs/chain-sum/data/eval.parquet)" in notes[0]
    assert "margin of hybrid accuracy (`hft` 0.2, `hgpo` 0.05)" in notes[1]


def limited(budget: int | None, accuracy: float = 0.5, **changes: Any) -> Evaluation:
    """An evaluation under a budget of reasoning."""
    found = evaluation(**changes)
    found["accuracy"] = found["accuracy"] | {"think": accuracy}
    return found | {"settings": {"temperature": 0.6, "think_budget": budget}}


def test_accuracy_over_budgets(tmp_path: Path) -> None:
    evaluations = {"hft": evaluation("hft"), "hgpo": limited(None, 0.9812)}
    budgets = {"hgpo": [limited(24, 0.8765), limited(8, 0.4321)]}
    path = write_report(evaluations, tmp_path, budget_sweep=budgets)
    text, page = read(path)
    assert (tmp_path / "accuracy_over_budgets.png").read_bytes().startswith(PNG)
    assert 'alt="Accuracy under a budget of reasoning"' in page
    assert table(text, "Model")["Model"][:2] == ["Budget", "Accuracy: always thinking"]
    rows = [line.replace(NO_BREAK, " ").split(" | ")[:3] for line in text.splitlines() if line.startswith("| hgpo")]
    assert [[budget, accuracy.partition(" [")[0]] for _, budget, accuracy in rows] == [
        ["8", "43.2 %"],
        ["24", "87.6 %"],
        ["none", "98.1 %"],
    ]
    assert "margin 0.05, budget of reasoning 24 tokens." in text
    assert "Note: the evaluations differ" not in text
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [entry["settings"]["think_budget"] for entry in data["budget_sweep"]["hgpo"]] == [8, 24]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"hft": [limited(8)]}, r"'hft' is none of the evaluations \(hgpo\)"),
        ({"hgpo": [limited(8), limited(None)]}, "'hgpo' has an evaluation without think_budget"),
        ({"hgpo": [limited(8), limited(8)]}, "'hgpo' has an evaluation too many with think_budget=8"),
        (
            {"hgpo": [limited(8, name="other")]},
            "'hgpo' is the model 'runs/chain-sum/hgpo', but .* of 'runs/chain-sum/o",
        ),
    ],
)
def test_budgets_that_do_not_belong_together(tmp_path: Path, budgets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_report({"hgpo": evaluation()}, tmp_path, budget_sweep=budgets)


def test_folders_of_budgets(tmp_path: Path) -> None:
    def write(folder: str, found: Evaluation) -> None:
        write_json(tmp_path / folder / "report.json", found)

    write("hgpo", limited(None))
    words = [f"--evaluations=hgpo={tmp_path}/hgpo", f"--budget_sweep=hgpo={tmp_path}/budgets", "--output_dir"]
    with pytest.raises(ValueError, match=r"budgets' has no folder with a report\.json.*--think_budget K"):
        main([*words, str(tmp_path / "report")])
    write("budgets/16", limited(16))
    write("budgets/8", limited(8))
    main([*words, str(tmp_path / "report")])
    data = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert [entry["settings"]["think_budget"] for entry in data["budget_sweep"]["hgpo"]] == [8, 16]


def test_evaluations_under_another_budget_are_noted(tmp_path: Path) -> None:
    text, _ = read(write_report({"free": limited(None), "hgpo": limited(8)}, tmp_path))
    assert "Note: the evaluations differ in the budget of reasoning (`free` none, `hgpo` 8)." in text


def test_names_are_escaped(tmp_path: Path) -> None:
    text, page = read(write_report({"a|b<i>$x_1$": evaluation()}, tmp_path, title="<b> & *c*"))
    assert r"|  | a\|b\<i>$x_1$ |" in text
    assert r"# \<b> & \*c\*" in text
    assert '<th class="number">a|b&lt;i&gt;$x_1$</th>' in page
    assert "<h1>&lt;b&gt; &amp; *c*</h1>" in page


def test_logs_with_nothing_to_draw_give_no_figure(tmp_path: Path) -> None:
    write_report({"hgpo": evaluation()}, tmp_path, training_logs={"empty": [], "summary": [{"step": 1, "epoch": 1.0}]})
    assert not (tmp_path / "training_curves.png").exists()


def test_no_temporary_file_is_left_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError, match=r"report\.json"):
        write_report({"hgpo": evaluation()}, tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "report.md").exists()


def test_no_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluations is empty.*hgpo-trl evaluate"):
        write_report({}, tmp_path)


@pytest.mark.parametrize("name", ["margin_sweep", "budget_sweep"])
def test_reserved_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is taken.*Choose another"):
        write_report({name: evaluation()}, tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "dataset",
        "accuracy.oracle",
        "intervals.mean_tokens.auto",
        "truncated.think",
        "by_level",
        "by_level[1].thinking_ratio",
    ],
)
def test_missing_keys_are_named(tmp_path: Path, path: str) -> None:
    broken = copy.deepcopy(evaluation())
    *parents, last = re.findall(r"\w+", path)
    part: Any = broken
    for key in parents:
        part = part[int(key) if key.isdigit() else key]
    del part[last]
    remedy = r"Pass the whole report\.json that `hgpo-trl evaluate` writes"
    with pytest.raises(ValueError, match=rf"'hgpo' lacks '{re.escape(path)}'.*{remedy}"):
        write_report({"hft": evaluation(), "hgpo": broken}, tmp_path)
    with pytest.raises(ValueError, match=rf"margin_sweep\[0\.2\]' lacks '{re.escape(path)}'"):
        write_report({"hft": evaluation()}, tmp_path, margin_sweep={0.2: broken})
    assert not list(tmp_path.iterdir())


def write_state(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    log = {"log_history": [{"step": step, "loss": 1.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(log), encoding="utf-8")


def test_training_log_of_the_run_or_of_its_newest_checkpoint(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-900", 900)
    write_state(tmp_path / "checkpoint-1200", 1200)
    (tmp_path / "checkpoint-1500").mkdir()  # interrupted before its state was written
    (tmp_path / "checkpoint-best").mkdir()
    assert load_training_log(tmp_path) == [{"step": 1200, "loss": 1.0}]
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}', encoding="utf-8")
    assert load_training_log(str(tmp_path)) == []


def test_training_log_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_dir='.*nowhere' has no trainer_state.*Pass the output_dir"):
        load_training_log(tmp_path / "nowhere")
