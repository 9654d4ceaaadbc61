"""Ask a served hybrid-reasoning model with the `openai` client: auto, forced and biased, whole and streamed.

hgpo-trl serve --model runs/chain-sum/hgpo --port 8000
python examples/openai_client.py "a = 3 b = 6 sum mod 10 ?" --base-url http://127.0.0.1:8000/v1
"""

import argparse
from typing import Any

from openai import OpenAI

WAYS: dict[str, dict[str, Any]] = {
    "the model picks": {},
    "think": {"chat_template_kwargs": {"thinking_mode": "think"}},
    "no think": {"chat_template_kwargs": {"enable_thinking": False}},
    "think more": {"vllm_xargs": {"decision_bias": 2.0}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.base_url, api_key="none")
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": arguments.question}]

    for name, extra in WAYS.items():
        message = client.chat.completions.create(model=model, messages=messages, extra_body=extra).choices[0].message
        reasoning = getattr(message, "reasoning", None)  # None: it answered at once; "": a thought without words
        print(f"{name}: {'no think' if reasoning is None else 'think'}")
        print(f"  reasoning: {reasoning!r}\n  content:   {message.content!r}")

    print("streamed:")
    field = None
    for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
        for choice in chunk.choices:
            reasoning = getattr(choice.delta, "reasoning", None)
            for name, text in (("reasoning", reasoning), ("content", choice.delta.content)):
                if text is None or choice.delta.role:  # the first chunk has a role, and content "" in either mode
                    continue
                if name != field:
                    print(f"\n  {name}: ", end="")
                    field = name
                print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
