"""Split streamed deltas that hold reasoning and content: a client that reads only one field of each would lose text.

    --middleware hgpo_trl.serving.vllm_deltas.SplitDeltas

`hgpo-trl serve` sets it. Where a piece of a response holds the end of its reasoning and the beginning of its content,
vLLM's reasoning parsers return both in one message, and its server sends one chunk per message. A parser could hold the
content back until its next call, but the last piece of a response has none: only code behind the parser can split it.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
END = b"\n\n"  # of a server-sent event


def split_event(event: bytes) -> list[bytes]:
    """Split an event of a chat completion's stream in two, its reasoning and then all else, if it holds both."""
    if b'"reasoning":' not in event or b'"content":' not in event:  # most events; decoding each would cost time
        return [event]
    chunk = json.loads(event.removeprefix(b"data: "))
    reasoning = []
    for choice in chunk["choices"]:
        delta = choice["delta"]
        if delta.get("reasoning") is not None and delta.get("content") is not None:
            first = {name: delta.pop(name) for name in ("role", "reasoning") if name in delta}
            reasoning.append(dict.fromkeys(choice) | {"index": choice["index"], "delta": first})  # all else null
    if not reasoning:
        return [event]
    before = {name: value for name, value in chunk.items() if name != "usage"} | {"choices": reasoning}
    return [b"data: " + json.dumps(part, ensure_ascii=False).encode() for part in (before, chunk)]


class SplitDeltas:
    """ASGI middleware that puts `split_event` behind the streams of chat completions."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/chat/completions"):
            await self.app(scope, receive, send)
            return
        streams, rest = False, b""

        async def send_split(message: Message) -> None:
            nonlocal streams, rest
            if message["type"] == "http.response.start":
                streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            elif message["type"] == "http.response.body" and streams:
                *events, rest = (rest + message.get("body", b"")).split(END)
                parts = [part + END for event in events for part in split_event(event)]
                if not message.get("more_body", False):
                    parts.append(rest)
                message = {**message, "body": b"".join(parts)}
            await send(message)

        await self.app(scope, receive, send_split)
