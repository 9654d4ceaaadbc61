"""Adapters for the sources of the paper (section 2, Stage I and II), by their ids on the hub."""

import ast
import json
from collections.abc import Mapping
from typing import Any

import xxhash

from hgpo_trl.data.adapter import Adapter
from hgpo_trl.data.conversations import last_answer, messages_of
from hgpo_trl.data.rows import Fault, Parts, Row, brief, items_of, optional_text, text_of, user_message
from hgpo_trl.data.traces import thought
from hgpo_trl.modes import Mode

# --- Stage I, no think ----------------------------------------------------------------------------------------


def _wildchat(row: Row) -> Parts:
    """The first question and its answer."""
    for flag in ("toxic", "redacted"):
        if row.get(flag):
            raise Fault(flag)
    messages = messages_of(row, "conversation")
    first = 1 if messages[0]["role"] == "system" else 0
    prompt, answer = last_answer(messages[: first + 2])
    return {"prompt": prompt, "answer": answer.strip(), "id": optional_text(row, "conversation_hash") or ""}


def _oasst(row: Row) -> Parts:
    """A tree of messages: from its root along the best reply of each message, up to the last answer."""
    node = row.get("prompt")
    if not isinstance(node, Mapping):
        raise Fault("missing_field", field="prompt", hint="a tree of messages: read a file *.trees.jsonl.gz")
    path: list[Mapping[str, Any]] = []
    while node is not None:
        path.append(node)
        replies = [reply for reply in items_of(node.get("replies")) if isinstance(reply, Mapping)]
        kept = [reply for reply in replies if not reply.get("deleted") and reply.get("review_result") is not False]
        node = min(kept, key=_rank, default=None)
    messages = [{"role": message.get("role"), "content": message.get("text")} for message in path]
    prompt, answer = last_answer(messages_of({"tree": messages}, "tree"))
    return {"prompt": prompt, "answer": answer.strip(), "id": optional_text(row, "message_tree_id") or ""}


def _rank(reply: Mapping[str, Any]) -> float:
    """0 is the one that people liked best; the unranked come last, in the file's order."""
    rank = reply.get("rank")
    return rank if isinstance(rank, (int, float)) and rank == rank else float("inf")


# --- Stage I, think -------------------------------------------------------------------------------------------

_TASK_DOMAINS = {"verifiable_math": "maths", "verifiable_code": "code", "code_output_prediction": "code"}
_DOMAINS = {"math": "maths", "maths": "maths", "code": "code"}


def _synthetic(row: Row) -> Parts:
    """A verified response to a task; of the raw data set, or of its edition for fine-tuning, which has messages."""
    score = row.get("score")
    if not isinstance(score, (int, float)) or not score >= 1:
        raise Fault("not_verified", score=brief(score))
    if "messages" in row:
        prompt, response = last_answer(messages_of(row, "messages"))
    else:
        prompt, response = user_message(text_of(row, "prompt")), text_of(row, "llm_response")
    domain = _TASK_DOMAINS.get(text_of(row, "task_type"), "other")
    reference = _ground_truth(row.get("verification_info")) if domain == "maths" else None
    identity: Parts = {"id": optional_text(row, "response_id") or "", "domain": domain, "reference": reference}
    return {"prompt": prompt, **thought(response), **identity}


def _ground_truth(info: Any) -> str | None:
    """The reference answer in SYNTHETIC-1's verification_info: a mapping, or one written as JSON or in Python."""
    if isinstance(info, str):
        for read in (json.loads, ast.literal_eval):
            try:
                info = read(info)
                break
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what literal_eval may raise
                continue
    return optional_text(info, "ground_truth") if isinstance(info, Mapping) else None


def _openr1(row: Row) -> Parts:
    """The first generation that is complete and was verified; without generations, the conversation."""
    prompt, identity = user_message(text_of(row, "problem")), optional_text(row, "uuid") or ""
    if row.get("generations") is None:
        _, response = last_answer(messages_of(row, "messages"))
    else:
        response = _first_verified(row)
    return {"prompt": prompt, **thought(response), "reference": optional_text(row, "answer"), "id": identity}


def _first_verified(row: Row) -> str:
    generations = items_of(row["generations"])
    verdicts = [row.get("correctness_math_verify"), row.get("correctness_llama")]
    for i, generation in enumerate(generations):
        finished = (
            _at(row.get("is_reasoning_complete"), i) is not False and _at(row.get("finish_reasons"), i) != "length"
        )
        if finished and any(_at(verdict, i) is True for verdict in verdicts):
            if not isinstance(generation, str):
                raise Fault("not_text", field="generations", type=type(generation).__name__)
            return generation
    raise Fault("not_verified", generations=len(generations))


def _at(values: Any, index: int) -> Any:
    items = items_of(values)
    return items[index] if index < len(items) else None


def _openthoughts(row: Row) -> Parts:
    """Columns of the subset "metadata", else the conversation of "default", whose system prompt asks for its marks."""
    if "deepseek_reasoning" not in row:
        messages = [message for message in messages_of(row, "conversations") if message["role"] != "system"]
        prompt, response = last_answer(messages)
        return {"prompt": prompt, **thought(response)}
    problem, code = text_of(row, "problem"), optional_text(row, "starter_code")
    return {
        "prompt": user_message(f"{problem}\n\n{code}" if code else problem),
        "reasoning": text_of(row, "deepseek_reasoning").strip(),
        "answer": text_of(row, "deepseek_solution").strip(),
        "domain": _DOMAINS.get(optional_text(row, "domain") or "", "other"),
    }


def _codeforces_cots(row: Row) -> Parts:
    if row.get("finish_reason") == "length":
        raise Fault("truncated", finish_reason="length")
    generation = text_of(row, "generation")
    problem = optional_text(row, "id") or ""  # the same for up to five generations
    return {
        "prompt": user_message(text_of(row, "prompt")),
        **thought(generation),
        "id": f"{problem}-{xxhash.xxh3_64_hexdigest(generation.encode(errors='surrogatepass'))}",
    }


def _kodcode_r1(row: Row) -> Parts:
    prompt, response = last_answer(messages_of(row, "conversations"))
    return {
        "prompt": prompt,
        **thought(response),
        "level": optional_text(row, "gpt_difficulty"),
        "id": optional_text(row, "question_id", "conversation_id") or "",
    }


# --- prompts --------------------------------------------------------------------------------------------------


def _aops(row: Row) -> Parts:
    return {
        "prompt": user_message(text_of(row, "problem", "question", "Question")),
        "reference": optional_text(row, "answer", "Answer"),
        "id": optional_text(row, "link", "id") or "",
    }


def _aime(row: Row) -> Parts:
    return {
        "prompt": user_message(text_of(row, "Question", "problem")),
        "reference": text_of(row, "Answer", "answer"),
        "level": optional_text(row, "Problem Number"),
        "id": optional_text(row, "ID") or "",
    }


def _codeforces(row: Row) -> Parts:
    """The prompt of the subsets that have one, else the statement."""
    prompt = optional_text(row, "prompt") or _statement(row)
    return {"prompt": user_message(prompt), "level": optional_text(row, "rating"), "id": optional_text(row, "id") or ""}


def _statement(row: Row) -> str:
    parts = [text_of(row, "description")]
    for title, name in (("Input", "input_format"), ("Output", "output_format"), ("Note", "note")):
        if text := optional_text(row, name):
            parts.append(f"{title}\n{text}")
    for example in items_of(row.get("examples")):
        if isinstance(example, Mapping):
            parts.append(f"Example\n{example.get('input', '')}\n{example.get('output', '')}")
    return "\n\n".join(parts)


def _kodcode(row: Row) -> Parts:
    return {
        "prompt": user_message(text_of(row, "question")),
        "level": optional_text(row, "gpt_difficulty"),
        "id": optional_text(row, "question_id") or "",
    }


def _deepscaler(row: Row) -> Parts:
    return {"prompt": user_message(text_of(row, "problem")), "reference": text_of(row, "answer")}


def _preference(row: Row) -> Parts:
    """The prompt of the preferred conversation."""
    prompt, _ = last_answer(messages_of(row, "chosen"))
    return {"prompt": prompt, "id": optional_text(row, "id") or ""}


_NO_TRACES = "Prompts alone: the paper's responses were generated with DeepSeek-R1. Give your own as a local file."


ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter("allenai/WildChat-1M", "odc-by", "hft", "general", Mode.NO_THINK, _wildchat),
        Adapter(
            "OpenAssistant/oasst1",
            "apache-2.0",
            "hft",
            "general",
            Mode.NO_THINK,
            _oasst,
            files="2023-04-12_oasst_ready.trees.jsonl.gz",
            note="One example per tree; the parquet files hold single messages, which no row-wise reader can join.",
        ),
        Adapter("PrimeIntellect/SYNTHETIC-1", "apache-2.0", "hft", "other", Mode.THINK, _synthetic),
        Adapter("PrimeIntellect/SYNTHETIC-1-SFT-Data", "apache-2.0", "hft", "other", Mode.THINK, _synthetic),
        Adapter("open-r1/OpenR1-Math-220k", "apache-2.0", "hft", "maths", Mode.THINK, _openr1),
        Adapter(
            "open-thoughts/OpenThoughts-114k",
            "apache-2.0",
            "hft",
            "other",
            Mode.THINK,
            _openthoughts,
            subset="metadata",
            note="The subset default has no domain: all its rows would be of the domain other.",
        ),
        Adapter(
            "open-r1/codeforces-cots",
            "cc-by-4.0",
            "hft",
            "code",
            Mode.THINK,
            _codeforces_cots,
            subset="solutions_py",
            note="Not filtered for correctness: about 84 % of the Python solutions pass the public tests.",
        ),
        Adapter(
            "KodCode/KodCode-V1-SFT-R1",
            "cc-by-nc-4.0",
            "hft",
            "code",
            Mode.THINK,
            _kodcode_r1,
            note="The split train holds the responses that passed their tests. Not for commercial use.",
        ),
        Adapter("di-zhang-fdu/AOPS", "not stated", "hgpo", "maths", None, _aops, note=_NO_TRACES),
        Adapter(
            "di-zhang-fdu/AIME_1983_2024",
            "mit",
            "hgpo",
            "maths",
            None,
            _aime,
            note=f"{_NO_TRACES} Its card calls it a benchmark; it holds problems of AIME 2024.",
        ),
        Adapter("open-r1/codeforces", "cc-by-4.0", "hgpo", "code", None, _codeforces, note=_NO_TRACES),
        Adapter(
            "KodCode/KodCode-V1",
            "cc-by-nc-4.0",
            "hgpo",
            "code",
            None,
            _kodcode,
            note="Prompts alone: DeepSeek-R1's responses are in KodCode/KodCode-V1-SFT-R1. Not for commercial use.",
        ),
        Adapter("agentica-org/DeepScaleR-Preview-Dataset", "mit", "hgpo", "maths", None, _deepscaler),
        Adapter(
            "allenai/llama-3.1-tulu-3-8b-preference-mixture",
            "odc-by",
            "hgpo",
            "general",
            None,
            _preference,
            note="Parts of it are under other licences, some of them not for commercial use.",
        ),
    )
}
