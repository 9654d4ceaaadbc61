"""`hgpo-trl chat`: in a process of its own with input from a pipe, and `Chat` with a model that answers to order."""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers_zoo import qwen2, tiny_qwen2
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hgpo_trl.inference.generate import HybridModel
from hgpo_trl.modes import LHRM, PRESETS, add_mode_tokens
from hgpo_trl.scripts.chat import COMMANDS, Chat, ChatArguments, main

THINK, NO_THINK = "<think>\nfirst this, then that\n</think>\n\nfive", "<no_think>\nfour\n</no_think>"


class Parrot:
    """A model that answers with given texts, a few letters at a time, and keeps what it was asked."""

    mode_format = LHRM

    def __init__(self, *responses: str) -> None:
        self.responses = list(responses)
        self.asked: list[tuple[list[dict[str, str]], str, float]] = []
        self.closed = 0

    def stream(
        self, messages: list[dict[str, str]], *, mode: str, decision_bias: float, **settings: Any
    ) -> Generator[str, None, None]:
        self.asked.append((messages, mode, decision_bias))
        response = self.responses.pop(0)
        try:
            for start in range(0, len(response), 4):
                piece = response[start : start + 4]
                if "^C" in piece:
                    raise KeyboardInterrupt
                yield piece
        finally:
            self.closed += 1


def talk(model: Any, *lines: str, color: bool = False, **arguments: Any) -> str:
    """What is printed on these lines."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=color, width=80, color_system="standard" if color else None)
    Chat(model, ChatArguments("model", **arguments), console).loop(iter(lines))
    return output.getvalue()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# --- one conversation ---------------------------------------------------------


def test_modes_of_another_format_are_shown() -> None:
    parrot = Parrot("<think>\nthis\n</think>\n\nfive", "<think>\n\n</think>\n\nfour", "<think>\n\nlong")
    parrot.mode_format = PRESETS["qwen3"]
    text = talk(parrot, "a", "b", "c")
    assert text == "[think]\nthis\n\nfive\n[no_think]\nfour\n[think]\nlong\n(no answer: out of tokens)\n"


def test_mode_reasoning_and_answer_are_shown() -> None:
    text = talk(Parrot(THINK, NO_THINK, "as I\nlike", "<think>\nendless"), "a", "b", "c", "d")
    assert text == (
        "[think]\nfirst this, then that\n\nfive\n"
        "[no_think]\nfour\n"
        "[neither mode]\nas I\nlike\n"
        "[think]\nendless\n(no answer: out of tokens)\n"
    )


def test_reasoning_is_dim_and_the_answer_is_not() -> None:
    text = talk(Parrot(THINK), "a", color=True)
    dim, reset = "\x1b[2m", "\x1b[0m"
    assert text.startswith(f"{dim}[think]{reset}\n{dim}")
    assert text.endswith("\nfive\n")  # no colour in it
    assert text.replace(dim, "").replace(reset, "") == "[think]\nfirst this, then that\n\nfive\n"


def test_only_answers_are_remembered_and_the_system_prompt_stays() -> None:
    model = Parrot(THINK, NO_THINK, "so", NO_THINK)
    talk(model, "a", "b", "  c ", "/clear", "d", system="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    history = [user("a"), assistant("five"), user("b"), assistant("four")]
    assert [messages for messages, _, _ in model.asked] == [
        [system, user("a")],
        [system, *history[:2], user("b")],
        [system, *history, user("c")],
        [system, user("d")],
    ]


def test_commands_hold_from_then_on() -> None:
    model = Parrot(*["x"] * 6)
    talk(model, "a", "/think", "b", "/bias -2.5", "c", "/auto", "d", "", "/no_think", "/bias 1", "e", "f")
    assert [(mode, bias) for _, mode, bias in model.asked] == [
        ("auto", 0.0),
        ("think", 0.0),
        ("think", -2.5),
        ("auto", -2.5),
        ("no_think", 1.0),
        ("no_think", 1.0),
    ]


def test_quit_and_what_is_no_command() -> None:
    model = Parrot("x")
    text = talk(model, "/bias", "/bias much", "/bias inf", "/bias 1 2", "/quiet", "/think hard", "/", "/quit", "a")
    assert text.count("/bias takes one number") == 4
    assert text.count(f"there are {COMMANDS}") == 3
    assert "unknown command /think hard" in text
    assert not model.asked


def test_an_interrupt_stops_the_response_and_the_question_is_forgotten() -> None:
    model = Parrot("<no_think>\nfour ^C", NO_THINK)
    text = talk(model, "a", "b")
    assert "(stopped; this question is not part of the conversation)" in text
    assert model.asked[1][0] == [user("b")]
    assert model.closed == 2


def test_a_model_cannot_write_escape_sequences() -> None:
    text = talk(Parrot("a\x1b[2Jb\r\x07c\n\x9bd [bold]e[/bold]"), "a")
    assert text == "[neither mode]\na[2Jbc\nd [bold]e[/bold]\n"


# --- the embedded model -------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works, also where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_a_real_generation(
    model_dir: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    steps, original = 0, model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            os.kill(os.getpid(), signal.SIGINT)
        output = original(*args, **kwargs)
        if steps < 40:
            output.logits[..., tokenizer.eos_token_id] = -float("inf")
        return output

    monkeypatch.setattr(model, "forward", forward)
    text = talk(HybridModel(model, tokenizer), "a = 3 sum mod 10 ?", "/think", "b = 3 sum mod 10 ?", temperature=1.0)
    assert text.count("(stopped;") == 1
    assert text.count("[think]") >= 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hgpo_trl.stream")]


def test_a_conversation_that_becomes_too_long(model_dir: str) -> None:
    hybrid = HybridModel.from_pretrained(model_dir)
    text = talk(hybrid, "a " * 200, "/clear", "a", max_new_tokens=4)
    assert "nothing is left for a response. Shorten the conversation. /clear begins a new one." in text
    assert text.rstrip().splitlines()[-1] != "a new conversation"


def test_the_command_answers_until_the_end_of_its_input(
    model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "a = 3 sum mod 10 ?"
    printed = []
    for seed in ("3", "3", "4"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n/think\n{question}\n/no_think\n{question}"))
        main(["--model", model_dir, "--seed", seed, "--max_new_tokens", "6", "--system", "sum"])
        printed.append(capsys.readouterr().out)
    text = printed[0]
    assert text.replace("\n", " ").startswith(f"{model_dir}, mode auto. Commands: {COMMANDS}.")
    assert "> mode: think\n> [think]\n" in text
    assert "> mode: no_think\n> [no_think]\n" in text
    assert text.endswith("\n> \n")
    assert "\x1b" not in text
    assert printed[1] == text != printed[2]


@pytest.mark.processes
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_at_the_prompt_does_not_end_the_program(model_dir: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-u", "-m", "hgpo_trl.cli", "chat", "--model", model_dir, "--max_new_tokens", "4"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert program.stdout is not None
    seen = ""
    while not seen.endswith("> "):
        seen += program.stdout.read(1)
    program.send_signal(signal.SIGINT)
    while "/quit ends the program" not in seen:
        seen += program.stdout.read(1)
    out, err = program.communicate("/think\na\n/quit\nb\n")
    assert program.returncode == 0, err
    assert "mode: think" in out
    assert out.count("[think]") == 1


# --- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--mode", "fast"], "mode must be one of auto, think, no_think; got 'fast'"),
        (["--decision_bias", "nan"], "decision_bias must be a finite number; got nan"),
        (["--max_new_tokens", "1"], "max_new_tokens must be at least 2"),
        (["--temperature", "-1"], "temperature must be a finite number of at least 0"),
        (["--top_p", "0"], "top_p must lie in"),
    ],
)
def test_bad_arguments(change: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "m", *change])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_model_that_is_not_hybrid(tmp_path: Path) -> None:
    tokenizer = qwen2()
    model = tiny_qwen2(len(tokenizer))
    for path in ("plain", "tagged"):
        model.save_pretrained(tmp_path / path)
        tokenizer.save_pretrained(tmp_path / path)
        add_mode_tokens(tokenizer, model)
    with pytest.raises(ValueError, match=r"The tag <think> is not a token of the tokenizer.*add_mode_tokens"):
        main(["--model", str(tmp_path / "plain")])
    with pytest.raises(ValueError, match=r"chat template takes no thinking_mode.*hgpo-trl hft"):
        main(["--model", str(tmp_path / "tagged")])
    with pytest.raises(ValueError, match=r"model='runs/a/nowhere': there is no such folder"):
        main(["--model", "runs/a/nowhere"])
