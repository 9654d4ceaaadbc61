"""Answers for benchmarks that are scored by their own tools: EvalPlus, AlpacaEval and Arena-Hard-Auto.

Each tool has a file of prompts and reads a file of responses; a `Harness` describes both. A tool gets only the answer
part of a response, the text after `</think>` or within `<no_think>`, as in the paper (arXiv 2505.14631, section 3.1).
Prompts and field names are those of each tool's own code, which is named beside them.
"""

import gzip
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import make_folder, write_atomically
from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.inference.generate import AUTO, Generation, HybridModel
from hgpo_trl.modes import MODES, Mode

Row = Mapping[str, Any]  # a prompt of a tool's file


@dataclass(frozen=True)
class Answer:
    """One response to one prompt of a tool."""

    id: str
    thought: bool
    reasoning: str
    answer: str  # the part that a tool gets; empty where the response was cut off while thinking
    num_tokens: int  # of the whole response
    truncated: bool  # ran out of tokens before its end
    time: float  # when it ended, in seconds since 1970


# --- the tools ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Harness:
    """The files that a tool reads and writes."""

    fields: Sequence[str]  # text that every prompt must have
    key: str | None  # the field that names a prompt; None: its number
    message: Callable[[Row], str]  # the user's message
    file: str  # of the responses, below `output_dir`; {name} is the model's
    row: Callable[[Row, Answer, str], dict[str, Any]]  # a response as the tool reads it, of (prompt, answer, name)
    lines: bool  # JSON lines, or one JSON list
    next_step: str  # commands to run on the file


def evalplus_message(row: Row) -> str:
    """As EvalPlus asks chat models (evalplus/codegen.py: instruction_prefix; evalplus/provider/openai.py: codegen)."""
    return (
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
        f"\n```python\n{row['prompt'].strip()}\n```"
    )


def alpaca_eval_row(row: Row, answer: Answer, name: str) -> dict[str, Any]:
    """As `alpaca_eval` joins it with its reference by `instruction` (src/alpaca_eval/annotators/pairwise_evaluator.py)
    and names it (src/alpaca_eval/main.py)."""
    kept = {key: row[key] for key in ("dataset", "instruction") if key in row}
    return {**kept, "output": answer.answer, "generator": name}


def arena_hard_row(row: Row, answer: Answer, name: str) -> dict[str, Any]:
    """As version 2 of Arena-Hard-Auto writes (gen_answer.py: get_answer) and judges it (gen_judgment.py).

    Its `metadata`, lengths and Markdown counted with GPT-4o's tokenizer for style control, is added by the tool's own
    utils/add_markdown_info.py.
    """
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": {"answer": answer.answer}}]
    return {
        "uid": row["uid"],
        "ans_id": f"{name}-{row['uid']}",
        "model": name,
        "messages": messages,
        "tstamp": answer.time,
    }


HARNESSES = {
    "evalplus": Harness(
        fields=("task_id", "prompt"),
        key="task_id",
        message=evalplus_message,
        file="samples.jsonl",
        # evalplus/data/utils.py: load_solutions. The answer is Markdown; evalplus/sanitize.py takes the code out of it.
        row=lambda row, answer, name: {"task_id": row["task_id"], "solution": answer.answer},
        lines=True,
        next_step="evalplus.sanitize --samples {file}, then evalplus.evaluate on the sanitized file",
    ),
    "alpaca_eval": Harness(
        fields=("instruction",),
        key=None,
        message=lambda row: row["instruction"],
        file="model_outputs.json",
        row=alpaca_eval_row,
        lines=False,
        next_step="alpaca_eval --model_outputs {file}",
    ),
    "arena_hard": Harness(
        fields=("uid", "prompt"),
        key="uid",
        message=lambda row: row["prompt"],
        file="model_answer/{name}.jsonl",
        row=arena_hard_row,
        lines=True,
        next_step="utils/add_markdown_info.py of Arena-Hard-Auto on the folder of {file}, then its gen_judgment.py",
    ),
}


def read_prompts(tool: str, path: Path) -> dict[str, Row]:
    """Read a tool's own file of prompts, by their names: JSON lines (`.gz` or not) or a JSON list.

    Raises:
        UserError: there is no such file, it is not JSON, an entry lacks a field, or two have the same name.
    """
    if not path.is_file():
        raise UserError(f"prompts={str(path)!r}: there is no such file. Name the file of prompts that {tool} has.")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = _parse(path, content.decode("utf-8"))
    harness = HARNESSES[tool]
    found: dict[str, Row] = {}
    for number, row in enumerate(rows):
        missing = [field for field in harness.fields if field not in row]
        if missing:
            raise UserError(
                f"prompts={str(path)!r}: entry {number} has no field {missing[0]!r}, which {tool} has; it has "
                f"{', '.join(row) or 'none'}. Name {tool}'s own file of prompts (docs/harnesses.md says which)."
            )
        for field in harness.fields:
            if not isinstance(row[field], str) or not row[field].strip():
                raise UserError(f"prompts={str(path)!r}: entry {number}: {field} must be a text; got {row[field]!r}.")
        key = str(number if harness.key is None else row[harness.key])
        if key in found:
            raise UserError(f"prompts={str(path)!r}: {harness.key} {key!r} is there twice. Remove one of them.")
        found[key] = row
    if not found:
        raise UserError(f"prompts={str(path)!r} has no entries. Give it at least one.")
    return found


def _parse(path: Path, text: str) -> list[Row]:
    """Parse a JSON list or JSON lines; UserError unless all entries are objects."""
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"prompts={str(path)!r} is neither a JSON list nor JSON lines: {error}.") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"prompts={str(path)!r}: every entry must be an object with fields.")
    return rows


def write_for(
    tool: str, prompts: Mapping[str, Row], answers: Mapping[str, Answer], name: str, output_dir: Path
) -> Path:
    """Write the file that the tool reads, one response per prompt, in the prompts' order.

    Args:
        prompts: of `read_prompts`.
        answers: by the names of all prompts.
        name: name of the model, as the tool shows it.
    """
    harness = HARNESSES[tool]
    rows = [harness.row(row, answers[key], name) for key, row in prompts.items()]
    path = output_dir / harness.file.format(name=name)
    if harness.lines:
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    else:
        text = f"{json.dumps(rows, ensure_ascii=False, indent=2)}\n"
    write_atomically(path, text.encode())
    return path


# --- answers, kept through interruptions ----------------------------------------------------------------------


def load_answers(path: Path) -> dict[str, Answer]:
    """Read the answers of an earlier run; a last line that was written in part is cut off the file."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(path, whole)
    answers = [Answer(**json.loads(line)) for line in whole.decode("utf-8").split("\n") if line]
    return {answer.id: answer for answer in answers}


def answer_all(
    prompts: Mapping[str, str], path: Path, responses: Callable[[Mapping[str, str]], Iterable[Answer]]
) -> dict[str, Answer]:
    """Answer every prompt that has no answer in the file at `path`, and append the new answers to it.

    Args:
        prompts: the user's message, by the prompt's name.
        responses: answers prompts, as `local_answers` and `served_answers` do; called only if one has no answer.

    Returns:
        The answers to all prompts, old and new, by their names.
    """
    found = load_answers(path)
    pending = {key: prompt for key, prompt in prompts.items() if key not in found}
    if pending:
        fresh = responses(pending)
        make_folder(path.parent)
        with path.open("a", encoding="utf-8") as file:
            progress = tqdm(total=len(prompts), initial=len(prompts) - len(pending), desc="answering", unit="prompt")
            with progress:
                for answer in fresh:
                    file.write(f"{json.dumps(asdict(answer), ensure_ascii=False)}\n")
                    file.flush()
                    found[answer.id] = answer
                    progress.update()
    return {key: found[key] for key in prompts}


def local_answers(
    model: HybridModel, prompts: Mapping[str, str], *, batch_size: int, seed: int, total: int, **settings: Any
) -> Iterator[Answer]:
    """Answer prompts with Transformers, `batch_size` at a time.

    Args:
        seed: each batch has a seed derived from this one and from the number of the `total` prompts answered before, so
            that a run interrupted between two batches goes on with the same answers.
        settings: of `hgpo_trl.inference.generate.generate`.
    """
    keys = list(prompts)
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        done = total - len(keys) + start
        messages = [prompts[key] for key in batch]
        generations = model(messages, batch_size=batch_size, seed=derived_seed(seed, done), **settings)
        yield from (_answer(key, generation) for key, generation in zip(batch, generations, strict=True))


def _answer(key: str, generation: Generation) -> Answer:
    return Answer(
        id=key,
        thought=generation.mode is Mode.THINK,
        reasoning=generation.reasoning,
        answer=generation.answer,
        num_tokens=generation.num_tokens,
        truncated=generation.truncated,
        time=time.time(),
    )


def served_answers(
    client: Any,
    model: str,
    prompts: Mapping[str, str],
    *,
    mode: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
) -> Iterator[Answer]:
    """Answer prompts with a server of `hgpo-trl serve`, `batch_size` requests at a time, in the order of their ends.

    If a request fails, the requests under way are awaited and their answers yielded before the error is raised.

    Args:
        client: `openai.OpenAI`.
        model: its name on the server.
        seed: each prompt has a seed derived from this one and its name. With one seed for all, their first tokens, and
            so the modes, would be drawn with the same random numbers.
    """

    def ask(key: str) -> Answer:
        response = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompts[key]}],
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=derived_seed(seed, key),
            extra_body={"chat_template_kwargs": _choice(mode)},
        )
        (choice,) = response.choices
        reasoning = getattr(choice.message, "reasoning", None)
        return Answer(
            id=key,
            thought=reasoning is not None,
            reasoning=reasoning or "",
            answer=choice.message.content or "",
            num_tokens=response.usage.completion_tokens,
            truncated=choice.finish_reason == "length",
            time=time.time(),
        )

    with ThreadPoolExecutor(batch_size, thread_name_prefix="hgpo_trl.ask") as pool:
        futures = [pool.submit(ask, key) for key in prompts]
        try:
            failed: BaseException | None = None
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if (error := future.exception()) is None:
                    yield future.result()
                elif failed is None:
                    failed = error
                    _cancel(futures)
            if failed is not None:
                raise failed
        finally:
            _cancel(futures)


def _choice(mode: str) -> dict[str, Any]:
    """Variables of the chat template, this library's or a model's own, that ask for a mode."""
    if mode == AUTO:
        return {"thinking_mode": mode}
    thinks = mode == Mode.THINK
    return {"thinking_mode": mode, "enable_thinking": thinks, "thinking": thinks}


def _cancel(futures: Iterable[Future]) -> None:
    """Cancel the requests that have not begun."""
    for future in futures:
        future.cancel()


def check_chat_server(client: Any, base_url: str, model: str) -> None:
    """Raise UserError unless the server answers, has the model, and separates reasoning from answers."""
    from openai import APIConnectionError, NotFoundError

    try:
        names = [entry.id for entry in client.models.list()]
    except (APIConnectionError, NotFoundError) as error:
        raise UserError(
            f"base_url={base_url!r}: no such server answers there ({error}). Start one with `hgpo-trl serve`; the "
            "address ends with /v1."
        ) from error
    if model not in names:
        raise UserError(f"model={model!r}: the server at {base_url} has {', '.join(names)}. Name one of these.")
    probe = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "?"}],
        max_tokens=1,
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking_mode": AUTO}},
    )
    message = probe.choices[0].message
    if (message.content or "").strip() in [mode.open_tag for mode in MODES]:
        raise UserError(
            f"base_url={base_url!r}: the server leaves reasoning and answer in one text (its first token is "
            f"{message.content!r}). Start it with `hgpo-trl serve --model {model}`."
        )


def closing_message(tool: str, answers: Iterable[Answer], path: Path, mode: str = AUTO) -> str:
    """Count the responses that thought, were cut off or have no answer, and name the next command."""
    answers = list(answers)
    thought, truncated = sum(answer.thought for answer in answers), sum(answer.truncated for answer in answers)
    empty = sum(not answer.answer for answer in answers)
    return (
        f"{len(answers)} responses (mode {mode}), {thought} of them with thinking; {truncated} cut off, {empty} "
        f"without an answer (exported as an empty text) -> {path}\n"
        f"Next: {HARNESSES[tool].next_step.format(file=path)} (docs/harnesses.md)"
    )
