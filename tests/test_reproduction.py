"""The verdicts of `benchmarks/reproduction.py`, from evaluations that are made up."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from made_up import write_evaluation

from hgpo_trl.modes.hybrid_accuracy import bootstrap_intervals
from hgpo_trl.reporting.documents import Bullets, Paragraph

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import pages
import reproduction
from pages import Runs

Write = Callable[[str, Sequence[float]], Runs]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write evaluations of two seeds."""

    def write(model: str, ratios: Sequence[float]) -> Runs:
        write_evaluation(tmp_path, model, ratios)
        return Runs(tmp_path, [0, 1])

    return write


def paragraph(blocks: Sequence[object]) -> str:
    return " ".join(block.text for block in blocks if isinstance(block, Paragraph))


def test_copies_of_a_query_are_no_further_queries() -> None:
    """Ten copies of each give the interval of one of each."""
    x = np.random.default_rng(0).random(40)
    x[3] = np.nan
    once, level = np.arange(40), np.zeros(40)
    alone = pages.intervals({"x": x}, level, once)["x"]
    copies = pages.intervals({"x": np.tile(x, 10)}, np.tile(level, 10), np.tile(once, 10))["x"]
    assert copies == pytest.approx(alone)
    assert alone == pytest.approx(bootstrap_intervals({"x": x})["x"], abs=0.01)
    apart = pages.intervals({"x": np.tile(x, 10)}, np.tile(level, 10), np.arange(400))["x"]
    assert apart[1] - apart[0] < 0.5 * (alone[1] - alone[0])


def test_levels_keep_their_shares() -> None:
    """What depends on the level alone has no spread."""
    level = np.repeat([1, 2], [10, 30])
    found = pages.intervals({"x": level.astype(float)}, level, np.arange(40))["x"]
    assert found == pytest.approx((1.75, 1.75))
    assert np.isnan(pages.intervals({"x": np.full(40, np.nan)}, level, np.arange(40))["x"]).all()


def test_prompts_of_all_seeds_are_told_apart(write: Write) -> None:
    pooled = write("grpo", [0.1, 0.3]).pooled("grpo")
    assert pooled["num_prompts"] == 8
    assert pooled["thinking_ratio"] == pytest.approx(0.2)
    assert [(entry["level"], entry["num_prompts"], entry["thinking_ratio"]) for entry in pooled["by_level"]] == [
        (1, 4, pytest.approx(0.1)),
        (2, 4, pytest.approx(0.3)),
    ]


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.1, 0.2, 0.9], "goes from 10.0 % to 90.0 % over the levels; at every step up it rises: holds"),
        ([0.9, 0.2, 0.1], "goes from 90.0 % to 10.0 % over the levels; at every step up it rises: does not hold"),
        ([0.5, 0.5, 0.5], "goes from 50.0 % to 50.0 % over the levels; at every step up it rises: does not hold"),
    ],
)
def test_thinking_by_difficulty(write: Write, ratios: list[float], verdict: str) -> None:
    write("hft", [0.6] * 3)
    assert verdict in paragraph(reproduction._difficulty(write("grpo", ratios)))


@pytest.mark.parametrize(("larger", "verdict"), [(0.2, "holds"), (0.4, "does not hold"), (0.6, "does not hold")])
def test_thinking_by_margin(write: Write, larger: float, verdict: str) -> None:
    write("margin-0.45", [larger])
    text = paragraph(reproduction._margins(write("grpo", [0.4]), ["0.45"]))
    assert f"a larger δ gives less thinking. Here this {verdict}" in text


def test_every_verdict_of_the_table(write: Write) -> None:
    """No think is better everywhere (as good, as long) and picked, so that all models are alike: nothing is apart."""
    for model in reproduction.TABLE:
        runs = write(model, [0.4])
    text = " ".join(item for block in reproduction._table_1(runs) if isinstance(block, Bullets) for item in block.items)
    assert text.count("does not hold") == len(reproduction.TABLE) - len(reproduction.ESTIMATORS)
    assert "holds" not in text
    assert "0.0 % of the tokens of always thinking, at 100.0 % accuracy for 100.0 %" in text


def test_every_verdict_on_rejection_fine_tuning(write: Write) -> None:
    """Alike from every start; then HGPO picks no think, the better mode, and RFT does not."""
    for prefix in reproduction.STARTS:
        for model in ("hft", "rft-margin", "grpo"):
            runs = write(prefix + model, [0.4])
    verdicts = 3 * len(reproduction.STARTS)
    assert paragraph(reproduction._rejection(runs)).count("does not hold") == verdicts
    write("small-rft-margin", [0.9])
    text = paragraph(reproduction._rejection(runs))
    assert text.count("does not hold") == verdicts - 1
    assert "smaller: hybrid accuracy holds, accuracy of the own choice does not hold" in text


@pytest.mark.parametrize(
    ("after", "verdicts"),
    [
        ([0.1, 0.3, 0.9], ("holds", "holds", "holds")),  # no think, as good as thinking, is picked more often
        ([0.6, 0.7, 0.6], ("does not hold", "does not hold", "does not hold")),
    ],
)
def test_a_domain_that_stage_ii_has_not_seen(after: list[float], verdicts: tuple[str, ...], tmp_path: Path) -> None:
    domains = ("chain_sum", "riddles")
    write_evaluation(tmp_path, "other-hft", [0.6] * 3, domains=domains)
    write_evaluation(tmp_path, "other-grpo", after, domains=domains)
    blocks = reproduction._domains(Runs(tmp_path, [0, 1]), {"other-": ("riddles", "riddles")})
    expected = [
        f"{claim} {verdict}"
        for claim, verdict in zip(
            ("more thinking at the hardest", "a rise at every step", "a higher hybrid accuracy than HFT's"),
            verdicts,
            strict=True,
        )
    ]
    assert ", ".join(expected) in paragraph(blocks)
