"""Split a response while it arrives: text in, reasoning and content out.

The conventions are `hgpo_trl.modes.split_response`'s, with one difference: text after `</no_think>`, a fault, is
content here, because a server should not swallow what its model wrote. The open tag and the first close tag of its mode
are taken out; every other tag stays in the text.
"""

from typing import Literal

from hgpo_trl.modes import LHRM, Mode, ModeFormat

Field = Literal["reasoning", "content"]


class ResponseSplitter:
    """Splits one response. It works on text, so a tag may arrive in any number of pieces.

    `feed` and `finish` return the text whose field is known by then: `{field: text}`, reasoning before content. A field
    is there from the moment it begins, with "" if need be, and each field's texts add up to the stripped whole, however
    the response is cut. A response without thinking never has reasoning; one cut off while thinking never has content.

    Args:
        mode: the mode that the prompt forces by ending with its opening; the response then begins after that.
        mode_format: of the model.
    """

    def __init__(self, mode: Mode | None = None, mode_format: ModeFormat = LHRM) -> None:
        self.mode_format = mode_format
        self.mode = mode  # None until it is known, and if the response does not begin with a mode tag
        self._field: Field | None = None  # what the next text belongs to; None as long as the mode is not known
        self._close = ""  # the tag to watch for, if any
        self._held = ""  # blanks that may turn out to be the last, and what may become a tag
        self._given: set[Field] = set()
        self._lead = True  # only blanks so far in this field
        if mode is not None:
            self._enter(mode)

    def feed(self, text: str) -> dict[Field, str]:
        """Take the next piece of a response."""
        return self._advance(text, final=False)

    def finish(self) -> dict[Field, str]:
        """Return the text held back, at the end of a response."""
        return self._advance("", final=True)

    def _advance(self, text: str, final: bool) -> dict[Field, str]:
        self._held += text
        if self._field is None:
            self._decide(final)
        pieces: dict[Field, str] = {}
        if self._field is None:
            return pieces
        if self._close and self._close in self._held:
            before, _, after = self._held.partition(self._close)
            self._close = ""
            if self._field == "reasoning":
                self._give(pieces, before.rstrip())
                self._field, self._held, self._lead = "content", after, True
            else:
                self._held = before + after
        end = len(self._held if final else _without_partial(self._held, self._close))
        end = len(self._held[:end].rstrip())
        self._give(pieces, self._held[:end])
        self._held = "" if final else self._held[end:]
        return pieces

    def _decide(self, final: bool) -> None:
        """Find out the mode, unless the text so far may still become an opening."""
        opened, body = self.mode_format.opened(self._held), "".join(self._held.split())
        for mode in self.mode_format.by_length:  # the shorter opening may be the beginning of the longer one
            if opened is not None and opened[0] is mode:
                self.mode, self._held = mode, self._held[opened[1] :]
                self._enter(mode)
                return
            if "".join(self.mode_format.opening(mode).split()).startswith(body) and not final:
                return
        self._field = "content"

    def _enter(self, mode: Mode) -> None:
        self._field = "reasoning" if mode is Mode.THINK else "content"
        self._close = self.mode_format.end(mode)

    def _give(self, pieces: dict[Field, str], text: str) -> None:
        """Add text of the current field to `pieces`, without the field's leading blanks."""
        assert self._field is not None
        if self._lead:
            text = text.lstrip()
            self._lead = not text
        if text or self._field not in self._given:
            self._given.add(self._field)
            pieces[self._field] = pieces.get(self._field, "") + text


def _without_partial(text: str, tag: str) -> str:
    """`text` without the beginning of `tag` that it ends with, if it does."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return text[:-size]
    return text


def split_whole(text: str, mode: Mode | None = None, mode_format: ModeFormat = LHRM) -> dict[Field, str]:
    """`ResponseSplitter` on a whole response: `{field: text}` with the fields that began."""
    splitter = ResponseSplitter(mode, mode_format)
    pieces = splitter.feed(text)
    for field, rest in splitter.finish().items():
        pieces[field] = pieces.get(field, "") + rest
    return pieces
