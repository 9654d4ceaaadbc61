"""Sources whose rows are generated: task modules and data sets of reasoning-gym."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from test_data_pipeline import chunks_of_both_starts, contents, removed_of, rows_of

from hgpo_trl.cli import main
from hgpo_trl.common.errors import MissingPackageError, UserError
from hgpo_trl.data import generators
from hgpo_trl.data.build import Build, Deduplication
from hgpo_trl.data.classifier import ReasoningQueryClassifier, no_reasoning_queries
from hgpo_trl.data.filters import quality
from hgpo_trl.data.pipeline import build_dataset, claim
from hgpo_trl.data.planning import plan, resolve
from hgpo_trl.modes import split_response
from hgpo_trl.rewards import reasoning_gym_reward
from hgpo_trl.verification import reasoning_gym
from hgpo_trl.verification.reasoning_gym import dataset_names, open_dataset, score

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "reasoning_gym"
SLOW = {"acre", "futoshiki", "intermediate_integration", "knight_swap", "quantum_lock", "sokoban", "zebra_puzzles"}
TASK = """
from hgpo_trl.tasks.embedded import Query

LEVELS = {2: 2, 3: 1, 10: 1}
PATTERNS = {
    "seen": "What is {}?",
    "unseen": "Please add up all of these numbers for me, one after the other, and then write down their total as a "
    "single number, without any other words before it or after it and without a full stop: {}",
}


def sample(level, rng, patterns="seen", most=99):
    numbers = [rng.randint(0, most) for _ in range(level)]
    total, lines = numbers[0], []
    for number in numbers[1:]:
        lines.append(f"{total} + {number} = {total + number}")
        total += number
    prompt = PATTERNS[patterns].format(" + ".join(map(str, numbers)))
    return Query(prompt, "\\n".join(lines), str(total), level, domain="shopping" if level == 10 else "")
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "sums.py"
    path.write_text(TASK)
    return str(path)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "UNIT_ROWS", 40)


def build(recipe: list[dict[str, Any]], out: Path, stage: str = "hft", seed: int = 0, processes: int = 1) -> Any:
    """A build as `scripts.building.run` makes it, with the filters that judge short texts."""
    steps = [("quality", quality())]
    if stage == "hft":
        steps.append(("reasoning_queries", no_reasoning_queries(ReasoningQueryClassifier.load(None))))
    sources = resolve(recipe, stage, seed)
    planned = Build(stage, sources, steps=steps, deduplication=Deduplication(), seed=seed)
    units = plan(sources, planned.max_row_bytes)
    description = {"sources": recipe, "seed": seed}
    return claim(out, description, units) or build_dataset(planned, units, out, description, processes)


def query_of(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"]


# --- task modules ---------------------------------------------------------------------------------------------


def test_rows_of_a_task(task: str, tmp_path: Path) -> None:
    entry = {"path": task, "adapter": "task", "rows": 400, "config": {"patterns": "unseen", "most": 10**6}}
    recipe = [entry | {"name": "think", "mode": "think"}, entry | {"name": "at once", "mode": "no_think"}]
    manifest = build(recipe, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert Counter(row["domain"] for row in rows) == {"sums": 600, "shopping": 200}
    for row in rows:
        response = split_response(row["completion"][0]["content"])
        numbers = [int(word) for word in query_of(row).split(": ")[1].split(" + ")]
        assert response.answer == str(sum(numbers))
        assert (response.mode, response.well_formed) == (row["mode"], True)
        assert response.reasoning.count("=") == (len(numbers) - 1 if row["mode"] == "think" else 0)
    assert manifest["sources"]["think"]["licence"] is None
    questions = {row["source"]: {query_of(r) for r in rows if r["source"] == row["source"]} for row in rows}
    assert not questions["think"] & questions["at once"], "each mode has questions of its own"


def test_levels_have_their_weights_exactly(task: str, tmp_path: Path) -> None:
    entry: dict[str, Any] = {"path": task, "adapter": "task", "rows": 400, "config": {"most": 10**6}}
    build([entry], tmp_path / "own", "hgpo")
    assert Counter(row["level"] for row in rows_of(tmp_path / "own")) == {"2": 200, "3": 100, "10": 100}
    build([entry | {"config": {"levels": {2: 3, 3: 1}, "most": 10**6}}], tmp_path / "other", "hgpo")
    assert Counter(row["level"] for row in rows_of(tmp_path / "other")) == {"2": 300, "3": 100}


@pytest.mark.parametrize("patterns", ["seen", "unseen"])
def test_templated_questions_are_duplicates_only_if_they_are_the_same(task: str, tmp_path: Path, patterns: str) -> None:
    """3,000 questions of one short or one long pattern, of which some repeat: all different ones are kept, once."""
    entry = {"path": task, "adapter": "task", "rows": 3000, "config": {"patterns": patterns, "most": 30}}
    (source,) = resolve([entry], "hgpo")
    generator = source[1].generator
    assert generator is not None
    drawn = [generator(index)["prompt"] for index in range(3000)]
    manifest = build([entry], tmp_path / "out", "hgpo")
    kept = [query_of(row) for row in rows_of(tmp_path / "out")]
    assert sorted(kept) == sorted(set(drawn))
    assert manifest["duplicates"] == {"exact": 3000 - len(kept), "near": 0}
    assert len(kept) < 3000


def test_text_that_only_signs_tell_apart_is_not_a_duplicate(tmp_path: Path) -> None:
    """Elsewhere case and punctuation do not count; a generated question may ask for just these."""
    path = tmp_path / "signs.py"
    path.write_text(
        "from hgpo_trl.tasks.embedded import Query\nLEVELS = {0: 1, 1: 1, 2: 1}\n"
        "def sample(level, rng):\n"
        "    return Query('Which one is it: ' + ('a.', 'A.', 'a!')[level], '', str(level), level)\n"
    )
    build([{"path": str(path), "adapter": "task", "rows": 3}], tmp_path / "out", "hgpo")
    assert len(rows_of(tmp_path / "out")) == 3


def test_stages_seeds_and_entries_ask_other_questions(task: str) -> None:
    entry = {"path": task, "adapter": "task", "rows": 50, "config": {"most": 10**9}}
    asked = []
    for stage, seed, more in [
        ("hft", 0, {"mode": "think"}),
        ("hft", 1, {"mode": "think"}),
        ("hgpo", 0, {}),
        ("hgpo", 1, {}),
        ("hgpo", 0, {"seed": 1}),
        ("hgpo", 0, {"name": "other"}),
    ]:
        ((_, adapter),) = resolve([entry | more], stage, seed)
        assert adapter.generator is not None
        asked.append({adapter.generator(index)["prompt"] for index in range(50)})
    assert len(set().union(*asked)) == 6 * 50


def test_a_build_that_was_interrupted_goes_on_with_the_same_rows(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = [{"path": task, "adapter": "task", "rows": 300, "mode": "think"}]
    build(recipe, tmp_path / "whole" / "out")
    made = chunks_of_both_starts(lambda: build(recipe, tmp_path / "cut" / "out"), monkeypatch)
    assert made == list(range(8))
    assert contents(tmp_path / "cut" / "out") == contents(tmp_path / "whole" / "out")
    monkeypatch.setattr(generators, "UNIT_ROWS", 7)
    build(recipe, tmp_path / "other" / "out")
    assert rows_of(tmp_path / "other" / "out") == rows_of(tmp_path / "whole" / "out"), "units do not matter"


def test_a_task_that_changed_in_the_middle_of_a_build_is_noticed(task: str, tmp_path: Path) -> None:
    recipe = [{"path": task, "adapter": "task", "rows": 300, "mode": "think"}]
    sources = resolve(recipe, "hft")
    claim(tmp_path / "out", {}, plan(sources, 2**20))
    Path(task).write_text(f"{TASK}\n# changed")
    with pytest.raises(UserError, match="the sources' files have changed since"):
        claim(tmp_path / "out", {}, plan(sources, 2**20))


def test_an_error_of_the_task_names_source_and_row(tmp_path: Path) -> None:
    path = tmp_path / "faulty.py"
    path.write_text(
        "from hgpo_trl.tasks.embedded import Query\nLEVELS = {1: 1}\ncalls = []\n"
        "def sample(level, rng):\n"
        "    calls.append(1)\n    return Query('a b', 'c', str(1 // (6 - len(calls))), level)\n"
    )
    with pytest.raises(ZeroDivisionError) as caught:
        build([{"path": str(path), "adapter": "task", "rows": 50}], tmp_path / "out", "hgpo")
    assert caught.value.__notes__ == [f"Raised while row 3 of the source {str(path)!r} was generated."]


# --- reasoning-gym --------------------------------------------------------------------------------------------


def test_every_data_set_that_is_fast_gives_rows_that_its_own_verifier_accepts() -> None:
    """The same again, another with another seed, and its own answer scored 1 from the column alone."""
    names = [name for name in dataset_names() if name not in SLOW]
    assert len(names) == 105 - len(SLOW)
    unanswered = set()
    for name in names:
        generator = generators.ReasoningGymGenerator(name, name, {}, 5, 3, None, None)
        row = generator(1)
        assert reasoning_gym.from_column(row["reasoning_gym"]) == (name, {}, open_dataset(name, {}, size=3, seed=5)[1])
        reasoning_gym._open.cache_clear()
        assert generator(1) == row, name
        assert replace(generator, seed=6)(1)["prompt"] != row["prompt"], name
        if row["answer"] is None:
            unanswered.add(name)
        else:
            assert score(row["reasoning_gym"], row["answer"]) == 1, name
    assert unanswered == {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.mark.processes
def test_rows_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """But for those that the builder refuses without PYTHONHASHSEED."""
    code = (
        "import sys, json\nfrom hgpo_trl.data.generators import ReasoningGymGenerator as G\n"
        "rows = {n: [G(n, n, {}, 9, 6, None, None)(i) for i in range(6)] for n in sys.argv[2:]}\n"
        "open(sys.argv[1], 'w').write(json.dumps(rows))"  # the data sets print, too
    )
    names = [name for name in dataset_names() if name not in SLOW]
    outputs = []
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed), *names],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        )
        outputs.append(json.loads((tmp_path / seed).read_text(encoding="utf-8")))
    assert {name for name in names if outputs[0][name] != outputs[1][name]} == set(generators._UNORDERED)


@pytest.mark.processes
def test_processes_do_not_matter(task: str, tmp_path: Path) -> None:
    recipe = [
        {"path": task, "adapter": "task", "rows": 200},
        {"path": "reasoning_gym/gsm_symbolic", "rows": 100},
        {"path": "reasoning_gym/rearc", "rows": 5},
    ]
    for processes in (1, 2):
        build(recipe, tmp_path / str(processes) / "out", "hgpo", processes=processes)
    assert contents(tmp_path / "1" / "out") == contents(tmp_path / "2" / "out")


def test_the_examples_are_built_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/data.md has them: both stages, and an evaluation set without any question of them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(ROOT)
    questions = {}
    for kind, name in (("hft", "hft"), ("hgpo", "hgpo"), ("hgpo", "evaluation"), ("hgpo", "gsm_symbolic")):
        recipe = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
        recipe["output_dir"] = str(tmp_path / name)
        for benchmark in recipe.get("decontamination", []):
            benchmark["path"] = str(tmp_path / Path(benchmark["path"]).name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe | {"num_processes": 1}))
        monkeypatch.setattr(sys, "argv", ["hgpo-trl", "data", kind, "--config", str(file)])
        main()
        questions[name] = {query_of(row) for row in rows_of(tmp_path / name)}
    assert len(questions["gsm_symbolic"]) == 100
    assert not questions["evaluation"] & (questions["hft"] | questions["hgpo"])
    steps = Counter((row["step"], row["reason"]) for row in removed_of(tmp_path / "evaluation"))
    assert steps.keys() <= {("decontamination", "contaminated"), ("duplicates", "exact")}
    assert steps["decontamination", "contaminated"] > 5

    rows = rows_of(tmp_path / "evaluation")
    assert {row["domain"] for row in rows} == {"leg_counting", "chain_sum", "gsm_symbolic", "letter_counting"}
    assert all(row["level"] for row in rows)
    columns = [row["reasoning_gym"] for row in rows]
    right = [f"<no_think> {row['answer']} </no_think>" for row in rows]
    assert reasoning_gym_reward(right, reasoning_gym=columns) == [1.0] * len(rows)

    thought = [row for row in rows_of(tmp_path / "hft") if row["mode"] == "think"]
    assert len(thought) > 1300
    for row in thought:
        response = split_response(row["completion"][0]["content"])
        assert "####" not in response.reasoning
        if row["domain"] != "gsm_symbolic":
            assert response.reasoning.endswith(f"= {response.answer}")


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "entry", "message"),
    [
        ("hft", {"path": "{task}", "adapter": "task", "rows": 5}, r"needs `mode`: think or no_think"),
        ("hft", {"path": "{task}", "adapter": "task", "rows": 5, "mode": "fast"}, r"mode must be think or no_think"),
        ("hgpo", {"path": "{task}", "adapter": "task"}, r"needs `rows`, how many to generate.*got None"),
        ("hgpo", {"path": "{task}", "adapter": "task", "rows": 0}, r"needs `rows`.*got 0"),
        ("hgpo", {"path": "{task}", "adapter": "task", "rows": {"maths": 3}}, r"needs `rows`"),
        ("hgpo", {"path": "nowhere.py", "adapter": "task", "rows": 5}, r"There is no file nowhere\.py"),
        ("hgpo", {"path": "json", "adapter": "task", "rows": 5}, r"lacks LEVELS, sample"),
        ("hgpo", {"path": "{task}", "adapter": "task", "rows": 5, "split": "train"}, r"a task takes no `split`"),
        ("hgpo", {"path": "{task}", "adapter": "task", "rows": 5, "level": "x"}, r"a task takes no `level`"),
        (
            "hgpo",
            {"path": "{task}", "adapter": "task", "rows": 5, "config": {"pattern": "seen"}},
            r"config has the unknown key 'pattern'; did you mean 'patterns'\? The keys are levels, patterns, most\.",
        ),
        (
            "hgpo",
            {"path": "{task}", "adapter": "task", "rows": 5, "config": {"patterns": "sene"}},
            r"sample\(2, rng, patterns='sene'\) failed: KeyError: 'sene'",
        ),
        (
            "hgpo",
            {"path": "{task}", "adapter": "task", "rows": 5, "config": {"levels": {2: 0.5}}},
            r"config\.levels must map at least one level to a whole number above 0; got \{2: 0\.5\}",
        ),
        ("hgpo", {"path": "reasoning_gym/leg_countin", "rows": 5}, r"no data set 'leg_countin'; did you mean 'leg_c"),
        ("hgpo", {"path": "reasoning_gym/composite", "rows": 5}, r"no data set 'composite'"),
        ("hgpo", {"path": "reasoning_gym/leg_counting"}, r"needs `rows`"),
        ("hgpo", {"path": "reasoning_gym/leg_counting", "rows": 5, "fields": {"prompt": "q"}}, r"takes no `fields`"),
        (
            "hgpo",
            {"path": "reasoning_gym/leg_counting", "rows": 5, "config": {"max_animal": 3}},
            r"leg_counting has no setting 'max_animal'; did you mean 'max_animals'\?",
        ),
        (
            "hgpo",
            {"path": "reasoning_gym/leg_counting", "rows": 5, "config": {"min_animals": 5, "max_animals": 3}},
            r"leg_counting refuses it: AssertionError: max_animals must be >= min_animals",
        ),
        (
            "hgpo",
            {"path": "reasoning_gym/leg_counting", "rows": 5, "level": "num_animal"},
            r"level: the metadata have no field 'num_animal'; did you mean 'num_animals'\?",
        ),
        ("hgpo", {"path": "{task}", "adapter": "task", "rows": 5, "mode": "think"}, r"Stage II samples .* both modes"),
        ("hft", {"path": "reasoning_gym/leg_counting", "rows": 5, "mode": "think"}, r"mode think needs `reasoning`"),
        (
            "hft",
            {"path": "reasoning_gym/leg_counting", "rows": 5, "mode": "think", "reasoning": "{task}:trace"},
            r"reasoning: '.*' .*has no function 'trace'|has no function 'trace'",
        ),
        ("hft", {"path": "reasoning_gym/boxnet", "rows": 5, "mode": "no_think"}, r"its rows have no answer, without"),
        ("hgpo", {"path": "data.jsonl", "fields": {"prompt": "q"}, "config": {"a": 1}}, r"only generated sources take"),
        ("hgpo", {"path": "{task}", "adapter": "tasks", "rows": 5}, r"no adapter 'tasks'; did you mean 'task'\?"),
    ],
)
def test_bad_entries_are_refused_before_any_work(stage: str, entry: dict, message: str, task: str) -> None:
    entry = {key: value.format(task=task) if isinstance(value, str) else value for key, value in entry.items()}
    with pytest.raises(UserError, match=rf"(?s)sources\[0\].*({message})"):
        resolve([entry], stage)


def test_texts_ordered_by_hashes_need_a_fixed_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"path": "reasoning_gym/ransom_note", "rows": 5}
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match="Start the command with PYTHONHASHSEED=0 in its environment"):
        resolve([entry], "hgpo")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    resolve([entry], "hgpo")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoning_gym._open.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'hgpo-trl\[reasoning-gym\]'"):
        resolve([{"path": "reasoning_gym/leg_counting", "rows": 5}], "hgpo")


def test_nested_metadata_and_functions_name_parts() -> None:
    ((_, adapter),) = resolve([{"path": "reasoning_gym/coin_flip", "rows": 3, "level": "rational.denominator"}], "hgpo")
    assert adapter.generator is not None
    row = adapter.generator(0)
    assert row["level"] == str(
        reasoning_gym.from_column(row["reasoning_gym"])[2]["metadata"]["rational"]["denominator"]
    )
    level = "hgpo_trl.data.generators.gsm_level"
    ((_, adapter),) = resolve([{"path": "reasoning_gym/gsm_symbolic", "rows": 3, "level": level}], "hgpo")
    assert adapter.generator is not None
    assert asdict(adapter.generator)["level"] == level  # type: ignore[call-overload]
