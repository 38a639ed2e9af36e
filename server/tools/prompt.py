"""Tools for models whose chat template does not know of them: written as text, in the form that Hermes models use.

The functions go into the system message, calls made earlier into the assistant's messages, results into user
messages. The texts are part of what the outside depends on; docs/api.md shows them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

PREAMBLE = """You can call functions. These are their signatures, each a line of JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON, between tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


def with_tools_as_text(messages: Sequence[Json], tools: Sequence[Json]) -> list[Json]:
    """The messages with `tools` in the system message, and calls and results as text."""
    plain: list[Json] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("results"):  # results that follow each other are one message
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "user", "content": result, "results": True})
        elif message.get("tool_calls"):
            calls = [_call_text(call) for call in message["tool_calls"]]
            texts = [message["content"], *calls] if message["content"] else calls
            plain.append({"role": message["role"], "content": "\n".join(texts)})
        else:
            plain.append(message)
    if tools:
        plain = _in_system(plain, PREAMBLE.format(tools="\n".join(map(_dumped, tools))))
    return [{key: value for key, value in message.items() if key != "results"} for message in plain]


def _in_system(messages: list[Json], text: str) -> list[Json]:
    if messages and messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _call_text(call: Json) -> str:
    function = call["function"]
    body = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{_dumped(body)}\n</tool_call>"


def _dumped(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)
