"""HFT-RFT and HFT-DPO: the data against a loop-by-loop reference, and both trainings from end to end."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from hgpo_trl import cli
from hgpo_trl.evaluation.baselines import as_dataset, best_responses, preference_pairs
from hgpo_trl.reporting.model_card import STAGES
from hgpo_trl.scripts import baselines, evaluate
from hgpo_trl.scripts.evaluate import EvaluateArguments
from tests.refusals import refused

ROOT = Path(__file__).parents[1]


def row(prompt: int, mode: str, sample: int, reward: float, fault: bool = False, cut: bool = False) -> dict[str, Any]:
    return {
        "prompt_id": prompt,
        "mode": mode,
        "sample": sample,
        "completion": f"{prompt} {mode} {sample}",
        "truncated": cut,
        "faults": ["unclosed"] if fault else [],
        "reward": reward,
    }


def table(think: list[float], no_think: list[float]) -> pd.DataFrame:
    """Samples of one query."""
    rewards = (("think", think), ("no_think", no_think))
    return pd.DataFrame([row(0, mode, i, reward) for mode, column in rewards for i, reward in enumerate(column)])


def one(rows: pd.DataFrame) -> tuple[str, ...]:
    """What was made of a single query, without its number."""
    assert len(rows) == 1
    return tuple(text.removeprefix("0 ") for text in rows.drop(columns="prompt_id").iloc[0])


def test_the_best_response_is_imitated() -> None:
    assert one(best_responses(table([0.2, 0.9], [0.5, 0.8]), [False])) == ("think 1",)


def test_the_margin_is_given_to_no_think() -> None:
    assert one(best_responses(table([0.2, 0.9], [0.5, 0.8]), [False], margin=0.2)) == ("no_think 1",)
    assert one(preference_pairs(table([0.9, 0.8], [0.8, 0.7]), [False])) == ("think 0", "no_think 1")
    assert one(preference_pairs(table([0.9, 0.8], [0.8, 0.7]), [False], margin=0.2)) == ("no_think 0", "think 1")


def test_the_winner_is_of_the_mode_with_the_higher_mean_not_the_best_of_all() -> None:
    assert one(preference_pairs(table([1.0, 0.0], [0.8, 0.7]), [False])) == ("no_think 0", "think 1")


def test_equals_go_by_lot() -> None:
    """Over many seeds each of them is taken about as often, in both baselines."""
    equal = table([1.0, 1.0], [1.0, 1.0])
    best = [one(best_responses(equal, [True], seed=seed))[0] for seed in range(200)]
    assert {name: best.count(name) > 25 for name in set(best)} == dict.fromkeys(
        ["think 0", "think 1", "no_think 0", "no_think 1"], True
    )
    winners = [one(preference_pairs(equal, [True], seed=seed))[0].split()[0] for seed in range(200)]
    assert 60 < winners.count("think") < 140


def test_what_is_wrong_faulty_or_cut_off_is_not_taught() -> None:
    samples = pd.DataFrame(
        [
            row(0, "think", 0, 0.0), row(0, "no_think", 0, 0.0),  # wrong by the rule
            row(1, "think", 0, 1.0, fault=True), row(1, "no_think", 0, 0.5),
            row(2, "think", 0, 1.0, cut=True), row(2, "no_think", 0, 0.0),
            row(3, "think", 0, 0.0), row(3, "no_think", 0, -1.0),  # a reward model's: no answer to be wrong about
            row(4, "think", 0, np.nan), row(4, "no_think", 0, 1.0),  # a mode without a score
        ]
    )  # fmt: skip
    has_answer = [True, True, True, False, True]
    assert best_responses(samples, has_answer)["completion"].tolist() == ["1 no_think 0", "3 think 0", "4 no_think 0"]
    pairs = preference_pairs(samples, has_answer)
    assert pairs.values.tolist() == [[3, "3 think 0", "3 no_think 0"]]


@given(
    st.lists(
        st.tuples(*[st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, np.nan]), min_size=3, max_size=3)] * 2),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0.0, 0.2]),
    st.booleans(),
)
def test_against_a_reference(queries: list[tuple[list[float], list[float]]], margin: float, by_rule: bool) -> None:
    """Eq. 17 to 21 in loops: what is chosen is one of the equals that the equations allow."""
    tables = [table(*query).assign(prompt_id=i) for i, query in enumerate(queries)]
    samples = pd.concat(tables).assign(completion=lambda rows: rows["completion"].str.removeprefix("0 "))
    has_answer = [by_rule] * len(queries)
    best = best_responses(samples, has_answer, margin).set_index("prompt_id")["completion"].to_dict()
    pairs = preference_pairs(samples, has_answer, margin).set_index("prompt_id").to_dict("index")
    for i, query in enumerate(queries):
        fit = {
            f"{mode} {n}": r + margin * (mode == "no_think")
            for mode, column in zip(("think", "no_think"), query, strict=True)
            for n, r in enumerate(column)
            if not np.isnan(r) and (r > 0 or not by_rule)
        }
        assert (i in best) == bool(fit)
        if fit:
            assert fit[best[i]] == pytest.approx(max(fit.values()))
        means = [np.mean([r for r in column if not np.isnan(r)] or [np.nan]) for column in query]
        if np.isnan(means).any():
            assert i not in pairs
            continue
        gain = means[0] - means[1] - margin
        may_win = [0, 1] if abs(gain) < 1e-9 else [int(gain < 0)]
        if i not in pairs:
            assert any(max(r for r in query[m] if not np.isnan(r)) == 0 and by_rule for m in may_win)
            continue
        chosen, rejected = (pairs[i][name].split() for name in ("chosen", "rejected"))
        winner = ("think", "no_think").index(chosen[0])
        assert winner in may_win
        assert rejected[0] != chosen[0]
        assert query[winner][int(chosen[1])] == max(r for r in query[winner] if not np.isnan(r))
        assert query[1 - winner][int(rejected[1])] == min(r for r in query[1 - winner] if not np.isnan(r))


def test_a_seed_gives_the_same_data_and_the_queries_keep_their_order() -> None:
    samples = pd.concat([table([1.0, 0.0], [0.0, 1.0]).assign(prompt_id=i) for i in range(20)], ignore_index=True)
    for choose in (best_responses, preference_pairs):
        found, again, other = (choose(samples, [True] * 20, seed=seed) for seed in (1, 1, 2))
        assert found.equals(again)
        assert not found.equals(other)
        assert list(choose(samples[::-1], [True] * 20)["prompt_id"]) == list(range(20))


def test_a_plain_text_query_stays_plain_text() -> None:
    queries = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", "2"]})
    rows = pd.DataFrame({"prompt_id": [1], "chosen": ["x"], "rejected": ["y"]})
    assert as_dataset(rows, queries).to_list() == [{"prompt": "b", "chosen": "x", "rejected": "y"}]


# --- from end to end ------------------------------------------------------------------------------------------


SMALL = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}


def argv(kind: str, fields: dict[str, Any]) -> list[str]:
    config = ["--config", str(ROOT / "recipes" / "chain-sum" / f"baselines_{kind}.yaml")]
    return [kind, *config, *(text for key, value in fields.items() for text in (f"--{key}", str(value)))]


@pytest.mark.parametrize("kind", ["rft", "dpo"])
def test_the_recipe_trains(kind: str, hft_samples: dict[str, str], model_dir: str, prompts: Dataset) -> None:
    baselines.main(argv(kind, {**SMALL, **hft_samples, "model_name_or_path": model_dir, "margin": 0.2}))
    out = Path(hft_samples["output_dir"])
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model_dir, out))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (run["stage"], run["margin"]) == (kind, 0.2)
    assert STAGES[kind][0] in (out / "README.md").read_text(encoding="utf-8")
    built = load_dataset("parquet", data_files=str(out / "train.parquet"), split="train")
    assert built["prompt"] == prompts["prompt"]
    column = "completion" if kind == "rft" else "chosen"
    modes = [turns[0]["content"].startswith("<no_think>") for turns in built[column]]
    assert modes == [i % 2 == 0 for i in range(len(prompts))]


def test_dpo_with_lora(hft_samples: dict[str, str], model_dir: str) -> None:
    fields = {**SMALL, **hft_samples, "model_name_or_path": model_dir, "use_peft": True, "lora_r": 2}
    baselines.main([*argv("dpo", fields), "--lora_target_modules", "q_proj", "v_proj"])
    assert (Path(hft_samples["output_dir"]) / "adapter_model.safetensors").is_file()


def test_the_reference_of_dpo_is_the_hft_model(
    hft_samples: dict[str, str], model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[DPOTrainer] = []
    monkeypatch.setattr(baselines, "train_and_save", lambda trainer, checkpoint: found.append(trainer))
    baselines.main(argv("dpo", {**SMALL, **hft_samples, "model_name_or_path": model_dir}))
    hft = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert all(torch.equal(hft[name], weight) for name, weight in found[0].ref_model.state_dict().items())
    assert (
        found[0].args.learning_rate
        == yaml.safe_load((ROOT / "recipes" / "chain-sum" / "baselines_dpo.yaml").read_text(encoding="utf-8"))[
            "learning_rate"
        ]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": "nowhere"}, "samples='nowhere': there is no report.json in it. Run `hgpo-trl evaluate"),
        ({"train_data": "other.parquet"}, "not of train_data='other.parquet'"),
        ({"margin": "inf"}, "margin must be a finite number"),
    ],
)
def test_bad_input(
    change: dict[str, str], message: str, hft_samples: dict[str, str], model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**SMALL, **hft_samples, "model_name_or_path": model_dir, **change}
    monkeypatch.setattr(sys, "argv", ["hgpo-trl", "baselines", *argv("rft", fields)])
    with refused(re.escape(message)):
        cli.main()


def test_samples_of_which_none_is_fit(hft_samples: dict[str, str], model_dir: str) -> None:
    path = Path(hft_samples["samples"]) / "samples.parquet"
    pd.read_parquet(path).assign(reward=0.0).to_parquet(path)
    with pytest.raises(ValueError, match="no query has a response that is well-formed and not wrong"):
        baselines.main(argv("dpo", {**SMALL, **hft_samples, "model_name_or_path": model_dir}))


def test_samples_of_more_prompts_than_there_are(hft_samples: dict[str, str], model_dir: str, prompts: Dataset) -> None:
    prompts.select(range(31)).to_parquet(hft_samples["train_data"])
    with pytest.raises(ValueError, match="are of 32 prompts, but train_data has only 31 rows"):
        baselines.main(argv("rft", {**SMALL, **hft_samples, "model_name_or_path": model_dir}))


def test_samples_of_other_prompts_under_the_same_name(
    hft_samples: dict[str, str], model_dir: str, prompts: Dataset
) -> None:
    """Built anew with another seed: every response would belong to another query."""
    prompts.select(range(32)[::-1]).to_parquet(hft_samples["train_data"])
    with pytest.raises(ValueError, match=r"are not of the prompts that train_data=.* the data has been built anew"):
        baselines.main(argv("rft", {**SMALL, **hft_samples, "model_name_or_path": model_dir}))


def test_samples_of_the_first_prompts(hft_samples: dict[str, str], model_dir: str, prompts: Dataset) -> None:
    """`num_prompts` of the evaluation, as the evaluation itself notes it."""
    folder = Path(hft_samples["samples"])
    samples = pd.read_parquet(folder / "samples.parquet").query("prompt_id < 3")
    samples.to_parquet(folder / "samples.parquet")
    claimed = EvaluateArguments(model_dir, hft_samples["train_data"], output_dir=str(folder.with_name("again")))
    first = prompts.select(range(3))
    evaluate._claim(claimed, first, evaluate._settings(claimed, first), None)
    (folder / "samples.json").write_bytes((folder.with_name("again") / "samples.json").read_bytes())
    args = baselines.BaselineArguments(hft_samples["samples"], hft_samples["train_data"])
    found, queries = baselines._load_samples(args)
    assert (found["prompt_id"].nunique(), len(queries)) == (3, 32)


def test_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        baselines.main(["sft"])
    assert "unknown kind 'sft'; there are rft, dpo" in capsys.readouterr().err
