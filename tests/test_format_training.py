"""Training, evaluation and use of models with a format of their own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOTrainer

from hgpo_trl.common.errors import UserError
from hgpo_trl.evaluation.transformers_backend import sample_both_modes
from hgpo_trl.inference.generate import HybridModel
from hgpo_trl.modes import MODES, OTHER, PRESETS, Mode, format_of, mode_tokens, split_response
from hgpo_trl.modes.chat_template import settle_format
from hgpo_trl.modes.decision import read_decision
from hgpo_trl.reporting.model_card import write_model_card
from hgpo_trl.rewards.functions import split_completions
from hgpo_trl.tasks.embedded import build_model, build_tokenizer, load_task
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.trainer import HGPOTrainer

TASK = load_task("hgpo_trl.tasks.chain_sum")
OWN = [name for name in PRESETS if name != "lhrm"]


@pytest.fixture(params=OWN)
def untrained(request: Any, tmp_path: Path) -> str:
    """An untrained model with a format of its own, and its tokenizer."""
    tokenizer = build_tokenizer(TASK, mode_format=PRESETS[request.param])
    build_model(tokenizer, hidden_size=16, num_heads=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def lottery(completions: list, **kwargs: Any) -> list[float]:
    """A reward by the text alone, so that both modes win now and then."""
    return [float(sum(map(ord, completion[0]["content"])) % 5) for completion in completions]


def make_trainer(model: str, prompts: Dataset, folder: Path, **settings: Any) -> HGPOTrainer:
    config = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "beta": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 0,
    }
    return HGPOTrainer(model, reward_funcs=lottery, args=HGPOConfig(**config | settings), train_dataset=prompts)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every rollout, as the loss gets it."""
    kept: list[dict[str, Any]] = []
    score = HGPOTrainer._generate_and_score_completions

    def keep(self: HGPOTrainer, inputs: list) -> dict[str, Any]:
        output = score(self, inputs)
        decided = self._rollout.decided
        kept.append({**output, "decided": [] if decided is None else decided.repeat_interleave(4).tolist()})
        return output

    monkeypatch.setattr(HGPOTrainer, "_generate_and_score_completions", keep)
    return kept


@pytest.mark.parametrize("lazy", [False, True])
def test_rollouts_begin_with_the_openings(
    untrained: str, prompts: Dataset, tmp_path: Path, batches: list, lazy: bool
) -> None:
    settings = {"lazy_thinking": True} if lazy else {}
    trainer = make_trainer(untrained, prompts, tmp_path / "out", **settings)
    if lazy:
        trainer.reward_funcs = [lambda completions, **_: [0.9] * len(completions)]
    tokens = trainer.mode_tokens
    place = len(tokens.prefix)
    trainer.train()
    assert batches
    for batch in batches:
        lengths = batch["completion_mask"].sum(dim=1).tolist()
        rows = zip(batch["completion_ids"].tolist(), batch["advantages"].tolist(), lengths, strict=True)
        for number, (ids, advantages, length) in enumerate(rows):
            mode = int(number % 4 >= 2)
            opening = tokens.openings[mode]
            assert tuple(ids[: len(opening)]) == opening
            assert tokens.chosen(ids) is MODES[mode], "also where the mode is any token but the other's"
            assert length <= 12
            forced = [*range(place), *range(place + 1, len(opening))]
            assert all(advantages[token] == advantages[place] for token in forced), "the action is the whole opening"
            if lazy and mode == 0:
                assert (length == tokens.forced[0]) == batch["decided"][number], "no-think has won: nothing is sampled"
    assert any(batch["advantages"][:, place].abs().sum() > 0 for batch in batches)
    logged = [entry for entry in trainer.state.log_history if "hgpo/off_mode_mass" in entry]
    assert all(0 <= entry["hgpo/off_mode_mass"] <= 1 for entry in logged)
    if OTHER in tokens.decision and len(tokens.openings[1]) == 1:
        assert all(entry["hgpo/off_mode_mass"] < 1e-6 for entry in logged)


@pytest.mark.parametrize("budget", [None, 3])
def test_prompts_that_are_sampled_as_one_are_equal(
    untrained: str, prompts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    """vLLM in server mode samples n responses to every n-th prompt, whatever the others are."""
    sampled: list[tuple[list[list[int]], int]] = []
    generate = GRPOTrainer._generate_single_turn

    def keep(self: GRPOTrainer, prompt_ids: list, images: Any, fields: Any, same: int, *args: Any) -> Any:
        sampled.append((prompt_ids, same))
        return generate(self, prompt_ids, images, fields, same, *args)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", keep)
    make_trainer(untrained, prompts, tmp_path / "run", num_generations=8, think_budget=budget, max_steps=1).train()
    assert sampled
    for prompt_ids, same in sampled:
        assert prompt_ids == [prompt for prompt in prompt_ids[::same] for _ in range(same)]


def test_a_budget_closes_reasoning_in_the_marks_of_the_format(
    untrained: str, prompts: Dataset, tmp_path: Path, batches: list
) -> None:
    budget = 3
    trainer = make_trainer(untrained, prompts, tmp_path / "out", think_budget=budget, max_completion_length=20)
    tokens, tokenizer = trainer.mode_tokens, trainer.processing_class
    closing = tokenizer(tokens.mode_format.end_reasoning, add_special_tokens=False)["input_ids"]
    trainer.train()
    cut = sampled = 0
    for batch in batches:
        lengths = batch["completion_mask"].sum(dim=1).tolist()
        rows = zip(batch["completion_ids"].tolist(), batch["tool_mask"].tolist(), lengths, strict=True)
        for number, (ids, own, length) in enumerate(rows):
            mode = int(number % 4 >= 2)
            begin = tokens.forced[mode]
            end = begin + budget
            forced = 0
            if mode == 0 and not {tokens.end_think, tokenizer.eos_token_id} & set(ids[begin:end]):
                forced = len(closing)
                assert ids[end : end + forced] == closing
                assert length > end + forced, "the model answers"
            assert length <= 20
            assert own[:length] == [int(not end <= place < end + forced) for place in range(length)]
            cut += forced > 0
            sampled += length - begin - forced
    assert cut
    logged = [entry["hgpo/rollout_tokens"] for entry in trainer.state.log_history if "hgpo/rollout_tokens" in entry]
    queries = sum(len(batch["completion_ids"]) for batch in batches) / 4
    assert sum(logged) / len(logged) == pytest.approx(sampled / queries)


def test_adaptthink_acts_on_the_decision(untrained: str, prompts: Dataset, tmp_path: Path, batches: list) -> None:
    data = prompts.add_column("reference_reward", [0.25] * len(prompts))
    settings = {"mode_rule": "adaptthink", "importance_sampling_level": "sequence", "loss_type": "grpo"}
    if mode_tokens(AutoTokenizer.from_pretrained(untrained)).decision[0] == OTHER:
        with pytest.raises(
            UserError, match=r"mode_rule=adaptthink sets .* in the format r1 one mode has no such token"
        ):
            make_trainer(untrained, data, tmp_path / "out", **settings)
        return
    trainer = make_trainer(untrained, data, tmp_path / "out", **settings)
    place = len(trainer.mode_tokens.prefix)
    trainer.train()
    for batch in batches:
        old, advantages = batch["old_per_token_logps"], batch["advantages"]
        at_half = (old == torch.tensor(math.log(0.5))).nonzero()[:, 1]
        assert at_half.tolist() == [place] * len(old), "the decision alone, in every row"
        assert torch.equal(advantages, advantages[:, :1] * batch["completion_mask"]), "one for a whole response"
    assert any(batch["advantages"].any() for batch in batches)


@pytest.mark.parametrize("rule", ["grpo", "thinkless", "stable_adaptive"])
def test_rules_that_sample_the_mode_need_the_own_format(
    untrained: str, prompts: Dataset, tmp_path: Path, rule: str
) -> None:
    loss_type = "dapo" if rule == "grpo" else "dr_grpo"
    with pytest.raises(UserError, match=f"mode_rule={rule} lets the policy sample the mode, .* the format lhrm alone"):
        make_trainer(untrained, prompts, tmp_path / "out", mode_rule=rule, loss_type=loss_type)


def test_forced_and_sampled_responses_of_one_text_score_the_same(
    untrained: str, prompts: Dataset, tmp_path: Path
) -> None:
    trainer = make_trainer(untrained, prompts, tmp_path / "out")
    tokenizer, tokens = trainer.processing_class, trainer.mode_tokens
    words = tokenizer.convert_tokens_to_ids(["4", "2"])
    for mode in MODES:
        opening = list(tokens.openings[MODES.index(mode)])
        ids = [*opening, words[0], tokens.end_think, words[1]] if mode is Mode.THINK else [*opening, words[1]]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        (response,) = split_completions([[{"role": "assistant", "content": text}]], tokens.mode_format)
        assert response == split_response(text, tokens.mode_format)
        assert (response.mode, response.answer, response.faults) == (mode, "2", ())


def test_the_decision_in_evaluation_and_generation(untrained: str, prompts: Dataset) -> None:
    hybrid = HybridModel.from_pretrained(untrained, dtype="float32", device_map="cpu")
    tokens = mode_tokens(hybrid.tokenizer)
    conversations = prompts["prompt"][:6]
    samples = sample_both_modes(
        hybrid.model, hybrid.tokenizer, conversations, samples_per_mode=2, max_new_tokens=10, seed=0
    )
    assert len(samples) == 24
    assert (samples["num_tokens"] <= 10).all()
    for text, mode in zip(samples["completion"], samples["mode"], strict=True):
        opening = tokens.mode_format.opening(Mode(mode))
        assert "".join(text.split()).startswith("".join(opening.split()))
    answers = hybrid(conversations, max_new_tokens=10, seed=0)
    for row, answer in enumerate(answers):
        of_prompt = samples[samples["prompt_id"] == row].iloc[0]
        assert answer.prob_think == pytest.approx(of_prompt["prob_think"], abs=1e-5)
        assert answer.num_tokens <= 10
    for mode in MODES:
        found = hybrid(conversations, mode=mode, max_new_tokens=10, seed=0)
        opening = "".join(tokens.mode_format.opening(mode).split())
        assert all("".join(answer.text.split()).startswith(opening) for answer in found)
        assert all(answer.reasoning_tokens + answer.answer_tokens <= 10 for answer in found)
    biased = hybrid(conversations, max_new_tokens=10, decision_bias=80.0, seed=0)
    if not tokens.prefix:  # where the openings share a beginning, an untrained model hardly ever gets to the decision
        assert {answer.mode for answer in biased} == {Mode.THINK}
    streamed = "".join(hybrid.stream(conversations[0], mode="no_think", max_new_tokens=10, temperature=0))
    assert streamed.strip() == hybrid(conversations[0], mode="no_think", max_new_tokens=10, temperature=0).text.strip()


def test_the_bias_moves_the_decision_behind_a_shared_beginning(prompts: Dataset, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TASK, mode_format=PRESETS["qwen3"])
    model = build_model(tokenizer, hidden_size=16, num_heads=2)
    with torch.no_grad():
        model.lm_head.weight[mode_tokens(tokenizer).prefix[0]] *= 60  # tied: it is written wherever it can be
    hybrid = HybridModel(model, tokenizer)
    settle_format(tokenizer)
    for bias, mode in ((200.0, Mode.THINK), (-200.0, Mode.NO_THINK)):
        found = hybrid(prompts["prompt"][:8], decision_bias=bias, max_new_tokens=8, temperature=0)
        written = [answer.text.replace(" ", "") for answer in found if answer.text.startswith("<think>")]
        assert written
        end = "\n" if mode is Mode.THINK else "\n\n"
        assert all(text.startswith(f"<think>{end}") for text in written)
        assert all(not text.startswith("<think>\n\n") for text in written if mode is Mode.THINK)


def test_a_template_that_opens_a_mode_is_refused_with_the_remedy(prompts: Dataset, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = build_tokenizer(TASK, mode_format=PRESETS["qwen3"])
    settle_format(tokenizer, "qwen3")
    tokenizer.chat_template += "{{ '<think>\n' if add_generation_prompt and enable_thinking is not defined }}"
    build_model(tokenizer, hidden_size=16, num_heads=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"opened_mode.*the chat template adds the tag itself"):
        make_trainer(str(tmp_path / "model"), prompts, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"opens a mode by itself.*settle_format"):
        HybridModel(model, tokenizer)("1 + 1")
    assert "which is left to the model" in settle_format(tokenizer)
    HybridModel(model, tokenizer)("1 + 1", max_new_tokens=6)


def test_a_mode_without_mass_is_warned_of(prompts: Dataset, tmp_path: Path, caplog: Any) -> None:
    tokenizer = build_tokenizer(TASK, mode_format=PRESETS["deepseek-v3.1"])
    model = build_model(tokenizer, hidden_size=16, num_heads=2)
    end = mode_tokens(tokenizer).no_think
    with torch.no_grad():
        model.lm_head.weight[end] *= 1e3
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make_trainer(str(tmp_path / "model"), prompts, tmp_path / "out", max_steps=1)
    ids = torch.tensor([tokenizer.apply_chat_template(prompts["prompt"][0], add_generation_prompt=True)["input_ids"]])
    masses = read_decision(trainer.model, ids, torch.ones_like(ids), trainer.mode_tokens).mode_probs[0].tolist()
    trainer.train()
    for mode, mass in zip(MODES, masses, strict=True):
        warned = f"begins with the mode {mode} with" in caplog.text
        if mass < 1e-6:
            assert warned
    assert "docs/formats.md" in caplog.text


def test_a_format_is_found_declared_and_kept(untrained: str, prompts: Dataset, tmp_path: Path) -> None:
    trainer = make_trainer(untrained, prompts, tmp_path / "out", max_steps=1)
    line = settle_format(trainer.processing_class)
    assert line == f"mode_format: {trainer.mode_tokens.mode_format.name} (the chat template shows it)" or (
        "which is left to the model here" in line
    )
    trainer.save_model()
    card = write_model_card(tmp_path / "out").read_text(encoding="utf-8")
    assert f"in the marks of its base model ({trainer.mode_tokens.mode_format.name})" in card
    assert "thinking_mode" not in card
    kept = HybridModel.from_pretrained(str(tmp_path / "out"), device_map="cpu")
    assert format_of(kept.tokenizer) == trainer.mode_tokens.mode_format


def of_no_think(completions: list, response: list, **kwargs: Any) -> list[float]:
    return [float(parts.mode is not Mode.THINK) for parts in response]


def of_think(completions: list, response: list, **kwargs: Any) -> list[float]:
    return [float(parts.mode is Mode.THINK) for parts in response]


SAMPLE = HGPOTrainer._generate_single_turn


def faultless(self: HGPOTrainer, *args: Any) -> Any:
    """Rollouts without a fault: the opening, a word, the end of the reasoning, a word."""
    ids, log_probs = SAMPLE(self, *args)
    tokens, tokenizer = self.mode_tokens, self.processing_class
    word, eos = tokenizer.convert_tokens_to_ids("4"), tokenizer.eos_token_id
    repaired = []
    for row in ids:
        mode = MODES.index(tokens.chosen(row))
        begun = row[: tokens.forced[mode]]
        repaired.append([*begun, word, tokens.end_think, word, eos] if mode == 0 else [*begun, word, eos])
    return repaired, log_probs


@pytest.mark.parametrize(("reward", "winner"), [(of_think, 0), (of_no_think, 1)])
def test_the_decision_moves_to_the_mode_that_wins(
    untrained: str, prompts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: Any, winner: int
) -> None:
    monkeypatch.setattr(HGPOTrainer, "_generate_single_turn", faultless)
    settings = {"max_steps": 12, "learning_rate": 2e-2, "logging_steps": 100, "margin": 0.1}
    trainer = make_trainer(untrained, prompts, tmp_path / "out", **settings)
    trainer.reward_funcs = [reward]
    ids = [tokenizer_ids(trainer.processing_class, prompt) for prompt in prompts["prompt"][:4]]
    width = max(map(len, ids))
    batch = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])

    def odds() -> torch.Tensor:
        """Log-odds of the winner at the token where the openings part."""
        tokens = trainer.mode_tokens
        prefix = torch.tensor(tokens.prefix, dtype=torch.long).expand(len(batch), -1)
        with torch.no_grad():
            logits = trainer.model(
                input_ids=torch.cat([batch, prefix], dim=1),
                attention_mask=torch.cat([mask, torch.ones_like(prefix)], dim=1),
            ).logits[:, -1]
        log_probs = logits.log_softmax(-1)
        of_modes = [
            torch.log1p(-log_probs[:, other].exp()) if token == OTHER else log_probs[:, token]
            for token, other in zip(tokens.decision, reversed(tokens.decision), strict=True)
        ]
        return of_modes[winner] - of_modes[1 - winner]

    before = odds()
    trainer.train()
    assert (odds() > before + 1).all()


def tokenizer_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
