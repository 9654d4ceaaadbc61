"""Talk to a hybrid-reasoning model in the terminal, with Transformers.

    hgpo-trl chat --model runs/chain-sum/hgpo

Each response begins with its mode; reasoning is dim. Commands: /auto, /think and /no_think set the mode from here on,
/bias B the decision bias, /clear forgets the conversation, /quit or the end of input ends the program. Ctrl-C stops a
response.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from rich.console import Console

from hgpo_trl.common.errors import run_stage
from hgpo_trl.inference.generate import AUTO, CHOICES, HybridModel, TooLongError, check_settings
from hgpo_trl.inference.limits import LIMITS, MAX_NO_THINK_HELP, MAX_THINK_HELP, THINK_BUDGET_HELP, Limits
from hgpo_trl.modes import Mode
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.serving.splitter import Field, ResponseSplitter
from hgpo_trl.training.model_dir import check_model_path

COMMANDS = "/auto, /think, /no_think, /bias B, /clear, /quit"
_CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})  # a model must not move the cursor


@dataclass
class ChatArguments:
    """The model, and how it answers."""

    model: str = field(metadata={"help": "Hybrid-reasoning model: path or hub id."})
    system: str | None = field(default=None, metadata={"help": "System prompt."})
    mode: str = field(default=AUTO, metadata={"help": "auto: the model picks; think, no_think: for every response."})
    decision_bias: float = field(default=0.0, metadata={"help": "Added to the log-odds of thinking in mode auto."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature (paper: 0.6); 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling (paper: 0.95)."})
    max_new_tokens: int = field(default=35_000, metadata={"help": "Tokens per response (paper: 35,000)."})
    max_think_tokens: int | None = field(default=None, metadata={"help": MAX_THINK_HELP})
    max_no_think_tokens: int | None = field(default=None, metadata={"help": MAX_NO_THINK_HELP})
    think_budget: int | None = field(default=None, metadata={"help": THINK_BUDGET_HELP})
    seed: int | None = field(default=None, metadata={"help": "Seed of the sampling; null draws another one each time."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32, bfloat16."})

    def __post_init__(self) -> None:
        check_settings(self.mode, self.decision_bias, self.max_new_tokens, self.temperature, self.top_p)
        Limits(self.max_new_tokens, self.max_think_tokens, self.max_no_think_tokens, self.think_budget)


class Chat:
    """One conversation. It keeps only the answers of earlier responses: no turn sees the reasoning of another."""

    def __init__(self, model: HybridModel, args: ChatArguments, console: Console) -> None:
        self.model = model
        self.console = console
        self.mode = args.mode
        self.bias = args.decision_bias
        self.settings = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "max_new_tokens": args.max_new_tokens,
            **{name: getattr(args, name) for name in LIMITS},
        }
        self.system = [{"role": "system", "content": args.system}] if args.system else []
        self.turns: list[dict[str, str]] = []

    def loop(self, lines: Iterator[str]) -> None:
        """Answer every line until /quit or the last one."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/"):
                self._command(*text.split())
            elif text:
                self._respond(text)

    def _note(self, text: str) -> None:
        self.console.out(text, style="dim", highlight=False)

    def _command(self, name: str, *arguments: str) -> None:
        match name.removeprefix("/"), arguments:
            case mode, () if mode in CHOICES:
                self.mode = mode
                self._note(f"mode: {mode}")
            case "bias", (word,) if _is_number(word):
                self.bias = float(word)
                self._note(f"decision bias: {self.bias:+g}")
            case "bias", _:
                self._note(f"/bias takes one number, such as /bias -2; it is {self.bias:+g}")
            case "clear", ():
                self.turns = []
                self._note("a new conversation")
            case _:
                self._note(f"unknown command {' '.join([name, *arguments])}; there are {COMMANDS}")

    def _respond(self, text: str) -> None:
        question = {"role": "user", "content": text}
        messages = [*self.system, *self.turns, question]
        pieces = self.model.stream(messages, mode=self.mode, decision_bias=self.bias, **self.settings)
        try:
            with closing(pieces):
                answer = self._show(pieces)
        except KeyboardInterrupt:
            self._note("\n(stopped; this question is not part of the conversation)")
        except TooLongError as error:
            self._note(f"{error} /clear begins a new one.")
        else:
            self.turns += [question, {"role": "assistant", "content": answer}]

    def _show(self, pieces: Iterator[str]) -> str:
        """Print a response while it arrives; returns its answer."""
        splitter = ResponseSplitter(mode_format=self.model.mode_format)
        answer = ""
        last: Field | None = None
        for parts in _split(splitter, pieces):
            for part, text in parts.items():
                if last is None:
                    self._note(f"[{splitter.mode or 'neither mode'}]")
                elif part != last:
                    self.console.out("\n")
                last = part
                style = "dim" if part == "reasoning" else None
                self.console.out(text.translate(_CONTROL), style=style, highlight=False, end="")
                answer += text if part == "content" else ""
        self.console.out("")
        if splitter.mode is Mode.THINK and last != "content":
            self._note("(no answer: out of tokens)")
        return answer


def _split(splitter: ResponseSplitter, pieces: Iterator[str]) -> Iterator[dict[Field, str]]:
    for piece in pieces:
        yield splitter.feed(piece)
    yield splitter.finish()


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _lines(console: Console) -> Iterator[str]:
    """Yield the user's lines until the end of input."""
    while True:
        try:
            yield console.input("[bold]>[/bold] ")
        except KeyboardInterrupt:
            console.out(f"\n/quit ends the program; {COMMANDS}", style="dim", highlight=False)
        except EOFError:
            console.out("")
            return


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(ChatArguments, prog="hgpo-trl chat").parse_recipe(argv)
    check_model_path("model", args.model)
    model = HybridModel.from_pretrained(args.model, dtype=args.dtype)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    console = Console()
    if console.is_terminal:
        import readline  # noqa: F401  # input() edits its line and remembers earlier ones
    console.out(
        f"{args.model}, mode {args.mode}. Commands: {COMMANDS}. Ctrl-C stops a response.", style="dim", highlight=False
    )
    Chat(model, args, console).loop(_lines(console))


if __name__ == "__main__":
    run_stage(main, "chat", sys.argv[1:])
