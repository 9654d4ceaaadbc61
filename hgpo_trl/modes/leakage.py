"""Leakage: reasoning inside a no-think answer that carries no mark, told by the words that go with it.

A policy that is paid for right answers without `<think>` may learn to reason within the answer. `split_response` finds
a trace under a tag; without one there are two signs: words of somebody who is thinking, counted here, and an answer
longer than think responses give to the same query.

The English words are those by which the literature recognises reflection, without the ones that ordinary prose is full
of. Open-Reasoner-Zero (arXiv 2503.24290, section 3.1) calls a response reflective if it has "wait", "recheck", "retry",
"alternatively" or "however"; NoWait (arXiv 2506.08343) names the most frequent ones of QwQ-32B, among them "wait",
"alternatively", "hmm", "check", "double-check", "verify", "again", "but", "another", "now" and "oh". Left out are
"however", "but", "another", "other", "now", "again", "check", "maybe", "any", "oh" and "ah", and connectives such as
"therefore" or "first", which explanations need as well. Added are close relatives ("let me", "let's see", "hold on",
"reconsider") and "step by step". A word proves nothing by itself ("wait for the bus"): compare figures, before and
after training or with the answers of think.
"""

import re
from functools import cache

REFLECTION_WORDS = {  # language -> regular expressions of whole words in lower case; case does not count
    "en": (
        "wait",
        "hmm+",
        "hold on",
        "on second thought",
        "alternatively",
        "let me",
        "let(?:'|’)s (?:see|think|check|verify|re-?check|try)",
        "let us (?:see|think|check|verify|re-?check|try)",
        "double[- ]check(?:s|ed|ing)?",
        "re-?check(?:s|ed|ing)?",
        "check (?:it |this |that )?again",
        "retry(?:ing)?",
        "verify(?:ing)?",
        "reconsider(?:s|ed|ing)?",
        "rethink(?:ing)?",
        "step[- ]by[- ]step",
    ),
}


@cache
def _pattern(language: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(REFLECTION_WORDS[language])})\b")


def count_reflection_words(text: str, language: str = "en") -> int:
    """How many words of `REFLECTION_WORDS` a text has; a phrase counts as one."""
    return sum(1 for _ in _pattern(language).finditer(text.lower()))  # three times as fast as re.IGNORECASE
