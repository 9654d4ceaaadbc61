"""`hgpo-trl evaluate --compare`: paired bootstrap against scipy and enumeration, Holm by definition, the command."""

import copy
import itertools
import json
import math
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from hgpo_trl.cli import main
from hgpo_trl.common.files import nan_to_null, write_json
from hgpo_trl.evaluation.comparison import (
    COMPARED,
    EvaluationOutput,
    compare,
    holm,
    paired_difference,
    write_comparison,
)
from hgpo_trl.evaluation.metrics import prompt_table, report_on
from hgpo_trl.modes.hybrid_accuracy import column_means

LEVELS = [1, 2, 3, 4] * 10
FILES = {"comparison.json", "comparison.md", "comparison.html", "differences.png"}


def samples_of(seed: int, accuracy: float = 0.5, prompts: int = 40, samples: int = 4) -> pd.DataFrame:
    """Scored samples of a made-up model, rows in no order."""
    rng = np.random.default_rng(seed)
    think = rng.uniform(0.05, 0.9, prompts)
    rows = [
        {
            "prompt_id": prompt,
            "mode": mode,
            "sample": sample,
            "completion": "",
            "num_tokens": int(rng.integers(2, 10 if mode == "no_think" else 90)),
            "truncated": False,
            "faults": [],
            "prob_think": think[prompt],
            "prob_no_think": 0.95 - think[prompt],
            "picked": int(rng.integers(-1, 2)) if sample == 0 and mode == "think" else None,
            "reward": float(rng.random() < accuracy),
        }
        for prompt, mode, sample in itertools.product(range(prompts), ("think", "no_think"), range(samples))
    ]
    table = pd.DataFrame(rows)
    table["picked"] = table.groupby("prompt_id")["picked"].transform("max").astype(int)
    return table.sample(frac=1, random_state=seed)


def evaluation(seed: int, decision_bias: float = 0.0, **model: Any) -> EvaluationOutput:
    samples = samples_of(seed, **model)
    report = report_on(samples, margin=0.1, levels=LEVELS, decision_bias=decision_bias)
    return EvaluationOutput({"model": f"model-{seed}", "dataset": "eval.parquet", **report}, samples)


def at(nested: Any, path: str) -> Any:
    for key in path.split("."):
        nested = nested[key]
    return nested


# --- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_the_prompts_figures_are_those_of_the_report(bias: float) -> None:
    one = evaluation(0, bias)
    table = prompt_table(one.samples, 0.1, bias)
    means = column_means(table)
    for path in COMPARED:
        assert means[path.replace(".", "/")] == pytest.approx(at(one.report, path), abs=1e-12)


def test_the_interval_is_scipys_of_the_pairs() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=150)  # what both models share: unpaired, the interval would be four times as wide
    first, second = hard + 0.2 * rng.normal(size=150), hard + 0.1 + 0.2 * rng.normal(size=150)
    expected = scipy.stats.bootstrap(
        (first, second),
        lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=1,
    )
    found = paired_difference(first, second)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert found.interval == pytest.approx(tuple(expected.confidence_interval), abs=0.12 * expected.standard_error)
    assert found.interval[1] - found.interval[0] < 0.3 * 4 * math.sqrt(2 / 150)


def test_interval_and_p_value_by_enumerating_all_resamples() -> None:
    """With four prompts there are only 4^4 resamples, all as likely."""
    first, second = np.array([0.0, 1.0, 0.25, 0.5]), np.array([1.0, 1.0, 0.0, 1.0])
    means = np.array([np.mean(draw) for draw in itertools.product(second - first, repeat=4)])
    found = paired_difference(first, second, resamples=100_000)
    assert found.p_value == pytest.approx(2 * min((means <= 1e-9).mean(), (means >= -1e-9).mean()), abs=0.01)
    assert found.interval == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.07)  # steps of 1/16


def test_p_values_under_no_difference_are_about_uniform() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(400):
        hard = rng.random(60)
        first, second = ((rng.random((8, 60)) < hard).mean(axis=0) for _ in range(2))
        p_values.append(paired_difference(first, second, resamples=500).p_value)
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.09
    assert scipy.stats.kstest(p_values, "uniform").statistic < 0.08  # 0.068 is the 5 % point


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(50):
        hard = rng.uniform(0, 0.8, 200)
        first, second = ((rng.random((8, 200)) < hard + gain).mean(axis=0) for gain in (0.0, 0.05))
        found += paired_difference(first, second, resamples=500).p_value < 0.05
    assert found >= 45


def test_the_p_value_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(2)
    for shift in np.linspace(0, 0.5, 25):
        found = paired_difference(np.zeros(40), rng.normal(shift, 1, 40), resamples=2000)
        excludes = found.interval[0] > 0 or found.interval[1] < 0
        assert excludes == (found.p_value < 0.05) or abs(found.p_value - 0.05) < 0.005


def test_a_difference_takes_memory_for_a_block_of_resamples_alone() -> None:
    """However many prompts and resamples."""
    rng, prompts, resamples = np.random.default_rng(0), 50_000, 1000
    first, second = rng.random((2, prompts))
    tracemalloc.start()
    paired_difference(first, second, resamples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * prompts * resamples / 2


def test_the_order_changes_the_sign_alone() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(30), rng.random(30)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert back.difference == -there.difference
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))
    assert back.p_value == there.p_value


def test_prompts_without_a_valid_number_count_for_neither() -> None:
    first, second = np.array([0.0, np.nan, 0.5, 1.0]), np.array([1.0, 1.0, np.nan, 0.0])
    assert paired_difference(first, second) == paired_difference(first[[0, 3]], second[[0, 3]])
    assert paired_difference(first, second).num_prompts == 2
    nothing = paired_difference(np.full(3, np.nan), np.ones(3))
    assert nothing.num_prompts == 0
    assert np.isnan([nothing.difference, *nothing.interval, nothing.p_value]).all()
    assert paired_difference(np.zeros(1), np.ones(1)) == (1.0, (1.0, 1.0), 1.0, 1)


def test_a_balanced_difference_by_enumerating_all_resamples() -> None:
    """Each model has its own two parts of the same prompts; a resample without one of them has no value."""
    nan = math.nan
    first = np.array([[1.0, nan, nan, nan, 0.0], [nan, 0.0, 1.0, 1.0, nan]])
    second = np.array([[1.0, 1.0, nan, nan, nan], [nan, nan, 1.0, 0.0, nan]])
    drawn = []
    for draw in itertools.product(range(4), repeat=4):  # the last prompt does not count for the second model
        parts = [rows[:, list(draw)] for rows in (first, second)]
        if not any(np.isnan(rows).all(axis=1).any() for rows in parts):
            one, other = (np.nanmean(rows, axis=1).mean() for rows in parts)
            drawn.append(other - one)
    values = np.array(drawn)
    found = paired_difference(first, second, resamples=100_000)
    assert found.num_prompts == 4
    assert found.difference == pytest.approx((1.0 + 0.5) / 2 - (1.0 + 2 / 3) / 2)
    assert found.p_value == pytest.approx(2 * min((values <= 1e-9).mean(), (values >= -1e-9).mean()), abs=0.01)
    assert found.interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.02)


def test_p_values_of_balanced_differences_under_no_difference_are_about_uniform() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(300):
        hard = rng.random(120)
        models = []
        for _ in range(2):
            gains = rng.random(120) < 0.2 + 0.4 * hard
            right = (rng.random(120) < 0.4 + 0.5 * hard).astype(float)
            models.append(np.stack([np.where(gains, right, np.nan), np.where(gains, np.nan, right)]))
        p_values.append(paired_difference(*models, resamples=400).p_value)
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.09
    assert scipy.stats.kstest(p_values, "uniform").statistic < 0.08


def test_strata_are_each_models_own() -> None:
    """The differences are those of the figures side by side, though thinking gains for each model elsewhere."""
    models = {"a": evaluation(0), "b": evaluation(1, accuracy=0.7)}
    found = compare(models, resamples=200)
    tables = {name: prompt_table(one.samples, 0.1) for name, one in models.items()}
    gains = "hybrid_accuracy_where/thinking_gains"
    assert not np.array_equal(*(np.isnan(table[gains]) for table in tables.values()))
    for path in ("hybrid_accuracy_where.thinking_gains", "hybrid_accuracy_where.no_gain", "balanced_hybrid_accuracy"):
        of = found["differences"]["b"][path]
        assert of["difference"] == pytest.approx(at(models["b"].report, path) - at(models["a"].report, path))
        assert of["num_prompts"] == 40
        assert of["interval"][0] < of["difference"] < of["interval"][1]


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_holm_is_the_closure_of_bonferronis_test(p_values: list[float]) -> None:
    """A hypothesis is rejected where Bonferroni rejects every set of hypotheses that it is in."""
    indices = range(len(p_values))
    subsets = [set(s) for size in indices for s in itertools.combinations(indices, size + 1)]
    expected = [
        max(min(1.0, len(subset) * min(p_values[i] for i in subset)) for subset in subsets if index in subset)
        for index in indices
    ]
    assert holm(p_values) == pytest.approx(expected)
    with_nan = holm([math.nan, *p_values])
    assert math.isnan(with_nan[0])
    assert with_nan[1:] == pytest.approx(expected)


def test_identical_models_do_not_differ() -> None:
    one = evaluation(0)
    of = compare({"a": one, "b": one}, resamples=200)["differences"]["b"]
    assert {
        path: (of[path]["difference"], of[path]["p_value"], of[path]["p_holm"]) for path in COMPARED
    } == dict.fromkeys(COMPARED, (0.0, 1.0, 1.0))
    assert all(of[path]["interval"] == pytest.approx((0.0, 0.0), abs=1e-12) for path in COMPARED)


def test_three_models() -> None:
    models = {"base": evaluation(0), "same": evaluation(1), "better": evaluation(2, accuracy=0.9)}
    found = compare(models, resamples=500)
    assert list(found["differences"]) == ["same", "better"]
    for name, of in found["differences"].items():
        for path in COMPARED:
            gain = at(models[name].report, path) - at(models["base"].report, path)
            assert of[path]["difference"] == pytest.approx(gain, abs=1e-12)
            assert at(found["models"][name], path) == pytest.approx(at(models[name].report, path), abs=1e-12)
            pair = [of[path]["p_value"] for of in found["differences"].values()]
            assert of[path]["p_holm"] == holm(pair)[list(found["differences"]).index(name)]
    better = found["differences"]["better"]["accuracy.think"]
    assert better["p_holm"] < 0.01 < better["interval"][0]
    assert found["models"]["better"]["intervals"] == {
        key: models["better"].report["intervals"][key]
        if isinstance(policies, tuple)
        else {policy: models["better"].report["intervals"][key][policy] for policy in policies}
        for key, policies in found["models"]["better"]["intervals"].items()
    }


# --- what does not fit together -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"dataset": "other.parquet"}, "dataset is 'eval.parquet' and 'other.parquet'"),
        ({"num_prompts": 39}, "num_prompts is 40 and 39"),
        ({"margin": 0.0}, "margin is 0.1 and 0.0"),
        ({"by_level": []}, "prompts per level"),
    ],
)
def test_other_prompts_are_refused(changed: dict[str, Any], names: str) -> None:
    one, other = evaluation(0), evaluation(1)
    other = other._replace(report={**other.report, **changed})
    with pytest.raises(ValueError, match=f"'a' and 'b' were not evaluated alike: {names}.*run `hgpo-trl evaluate`"):
        compare({"a": one, "b": other})


def test_other_prompt_ids_and_unscored_samples_are_refused() -> None:
    one, other = evaluation(0), evaluation(1)
    moved = other._replace(samples=other.samples.assign(prompt_id=other.samples["prompt_id"] + 1))
    with pytest.raises(ValueError, match="prompt ids is '40 from 0 to 39' and '40 from 1 to 40'"):
        compare({"a": one, "b": moved})
    with pytest.raises(ValueError, match="'b' have no column 'reward'"):
        compare({"a": one, "b": other._replace(samples=other.samples.drop(columns="reward"))})
    hashed = one._replace(prompts="ab")
    with pytest.raises(ValueError, match="hash of the prompts is 'ab' and 'cd'"):
        compare({"a": hashed, "b": other._replace(prompts="cd")})
    for same in (other._replace(prompts="ab"), other):  # or not known
        assert compare({"a": hashed, "b": same}, resamples=100)["num_prompts"] == 40
    with pytest.raises(ValueError, match="name at least two"):
        compare({"a": one})


# --- files and command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, one in {"hft": evaluation(0), "hgpo": evaluation(1, accuracy=0.8), "other": evaluation(2)}.items():
        found[name] = tmp_path_factory.mktemp(name)
        write_json(found[name] / "report.json", nan_to_null(dict(one.report)))
        one.samples.to_parquet(found[name] / "samples.parquet", index=False)
    return found


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["hgpo-trl", "evaluate", *words])
    main()


def test_the_command_writes_the_same_bytes_twice(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"{name}={folder}" for name, folder in folders.items()]
    for out in ("one", "two"):
        run(monkeypatch, "--compare", *named, "--output_dir", str(tmp_path / out), "--resamples", "200")
    assert f"Comparison: {tmp_path / 'two' / 'comparison.md'}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "one").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    found = json.loads((tmp_path / "one" / "comparison.json").read_text())
    text, page = ((tmp_path / "one" / f"comparison.{suffix}").read_text() for suffix in ("md", "html"))
    of = found["differences"]["hgpo"]["accuracy.think"]
    shown = f"{100 * of['difference']:+.1f} [{100 * of['interval'][0]:+.1f},\u00a0{100 * of['interval'][1]:+.1f}]"
    row = f"| Accuracy: always thinking, % | hgpo | {shown} | "
    assert row.replace("-", "−") in text.replace(" -", " −")
    assert shown.replace("-", "−") in page
    assert "<img" in page
    assert "http" not in page.replace("http-equiv", "")

    run(monkeypatch, "--compare", *named, "--output_dir", str(tmp_path / "three"), "--resamples", "200", "--seed", "1")
    assert (tmp_path / "one" / "comparison.json").read_bytes() != (tmp_path / "three" / "comparison.json").read_bytes()


def test_a_figure_without_valid_numbers_is_a_dash(tmp_path: Path) -> None:
    one = evaluation(0)
    unscored = one._replace(samples=one.samples.assign(reward=math.nan))
    found = compare({"a": one, "b": unscored}, resamples=100)
    text = write_comparison(found, tmp_path).read_text()
    assert "| Accuracy: own choice, % | b | – [–,\u00a0–] | – | – |" in text
    assert (
        json.loads((tmp_path / "comparison.json").read_text())["differences"]["b"]["hybrid_accuracy"]["p_value"] is None
    )


def test_samples_that_were_drawn_otherwise_are_noted(tmp_path: Path) -> None:
    one, other = (
        one._replace(report={**one.report, "settings": {"temperature": temperature, "top_p": 0.95, "seed": seed}})
        for seed, (one, temperature) in enumerate([(evaluation(0), 0.6), (evaluation(1), 1.0)])
    )
    text = write_comparison(compare({"a": one, "b": other}, resamples=100), tmp_path).read_text()
    assert "Note: the evaluations differ in the temperature (`a` 0.6, `b` 1.0)." in text
    assert text.count("differ in the") == 1
    assert "differ in the" not in write_comparison(compare({"a": one, "b": one}, resamples=100), tmp_path).read_text()


def test_bad_commands(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hft, hgpo = f"hft={folders['hft']}", f"hgpo={folders['hgpo']}"
    out = ("--output_dir", str(tmp_path / "out"))
    for pattern, words in {
        "two evaluations or more": (hft,),
        "'runs' is not NAME=FOLDER": (hft, "runs"),
        "the name 'hft' is given twice": (hft, hft),
        "compare: there is no .*nowhere/report.json. Run `hgpo-trl evaluate": (hft, f"b={tmp_path}/nowhere"),
        "resamples must be at least 100": (hft, hgpo, "--resamples", "1"),
        "unknown argument '--model'": (hft, hgpo, "--model", "x"),
    }.items():
        with refused(pattern):
            run(monkeypatch, "--compare", *words, *out)
    other = shutil.copytree(folders["hgpo"], tmp_path / "copy")
    report = json.loads((other / "report.json").read_text())
    write_json(other / "report.json", {**copy.deepcopy(report), "margin": 0.3})
    with refused(r"not evaluated alike: margin is 0\.1 and 0\.3"):
        run(monkeypatch, "--compare", hft, f"hgpo={other}", *out)
    write_json(other / "report.json", report)
    one = shutil.copytree(folders["hft"], tmp_path / "one")
    for folder, prompts in ((one, "ab"), (other, "cd")):
        write_json(folder / "samples.json", {"prompts": prompts})
    with refused("not evaluated alike: hash of the prompts is 'ab' and 'cd'"):
        run(monkeypatch, "--compare", f"hft={one}", f"hgpo={other}", *out)
    (other / "samples.parquet").unlink()
    with refused("compare: there is no .*samples.parquet"):
        run(monkeypatch, "--compare", hft, f"hgpo={other}", *out)
    assert not (tmp_path / "out").exists()


def test_help_mentions_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["hgpo-trl", "--help"])
    main()
    assert "--compare" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "--help", "--compare")
    assert "NAME=FOLDER" in capsys.readouterr().out
