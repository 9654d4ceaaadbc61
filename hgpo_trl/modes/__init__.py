"""The two modes: their format, chat template, decision and hybrid accuracy."""

from hgpo_trl.modes.format import (
    MODES,
    TAGS,
    TRACE_FIELDS,
    Fault,
    Mode,
    ModeTokens,
    Response,
    add_mode_tokens,
    check_embeddings,
    completion_text,
    format_response,
    mode_tokens,
    split_response,
    trace_mark,
)

__all__ = [
    "MODES",
    "TAGS",
    "TRACE_FIELDS",
    "Fault",
    "Mode",
    "ModeTokens",
    "Response",
    "add_mode_tokens",
    "check_embeddings",
    "completion_text",
    "format_response",
    "mode_tokens",
    "split_response",
    "trace_mark",
]
