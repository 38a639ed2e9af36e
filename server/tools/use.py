"""Which functions a chat may call and how: `tools`, `tool_choice` and `parallel_tool_calls` made into one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peqa_runtime.errors import InvalidRequest
from peqa_server.fields.chat_schemas import AllowedToolChoice, AllowedTools, ChatFields, Tool, ToolChoice

Json = dict[str, Any]

_DEFINITIONS = ("$defs", "definitions")

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class ToolUse:
    """The functions of a request. `named`: the one that must be called; `required`: one at least must be.

    `parallel`: an answer may hold several calls.
    """

    tools: tuple[Tool, ...]
    required: bool = False
    named: str | None = None
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions."""
        return frozenset(tool.function.name for tool in self.tools)

    def templated(self) -> list[Json]:
        """The tools as chat templates read them, `parameters` always there."""
        return [_templated(tool) for tool in self.tools]

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.required or self.named is not None

    def answer_schema(self) -> Json:
        """The JSON schema that a forced answer must match.

        A named function: its arguments. Else an array of calls, or one call where only one is allowed.
        """
        if self.named is not None:
            return self._arguments(self.named)
        definitions: Json = {}
        calls = [self._call(tool.function.name, str(i), definitions) for i, tool in enumerate(self.tools)]
        call = calls[0] if len(calls) == 1 else {"anyOf": calls}
        schema = {"type": "array", "items": call, "minItems": 1} if self.parallel else call
        return {**schema, "$defs": definitions} if definitions else schema

    def _call(self, name: str, prefix: str, definitions: Json) -> Json:
        arguments = moved(self._arguments(name), prefix, definitions)
        return {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }

    def _arguments(self, name: str) -> Json:
        tool = next(tool for tool in self.tools if tool.function.name == name)
        return dict(tool.function.parameters or ANY_OBJECT)


def tool_use(wanted: ChatFields, parallel: bool | None = None) -> ToolUse | None:
    """The request's use of tools; None when it has none to call. Raises `InvalidRequest`."""
    choice = wanted.tool_choice
    if not wanted.tools:
        if choice not in (None, "none"):
            raise InvalidRequest("tool_choice needs tools to choose from", param="tool_choice")
        return None
    if choice == "none":
        return None
    if isinstance(choice, AllowedToolChoice):
        tools, required = (
            _allowed(wanted.tools, choice.allowed_tools),
            choice.allowed_tools.mode == "required",
        )
        return ToolUse(tools, required=required, parallel=parallel is not False)
    use = ToolUse(tuple(wanted.tools), required=choice == "required", parallel=parallel is not False)
    if not isinstance(choice, ToolChoice):
        return use
    named = choice.function.name
    if named not in use.names:
        raise InvalidRequest(
            f"tool_choice names the function {named!r}, which is not among tools", param="tool_choice"
        )
    return ToolUse(use.tools, named=named, parallel=use.parallel)


def _allowed(tools: Sequence[Tool], allowed: AllowedTools) -> tuple[Tool, ...]:
    """Those of `tools` that may be called; the model is not told of the others. Raises `InvalidRequest`.

    An allowed one may be given by its name alone, or as it stands in `tools`.
    """
    offered = {tool.function.name: tool.function for tool in tools}
    names = set()
    for tool in allowed.tools:
        name = tool.function.name
        if name not in offered:
            raise InvalidRequest(
                f"tool_choice allows the function {name!r}, which is not among tools", param="tool_choice"
            )
        for field, value in tool.function.model_dump(exclude_none=True).items():
            if value != getattr(offered[name], field):
                raise InvalidRequest(
                    f"tool_choice allows the function {name!r} with another {field} than it has among tools; "
                    "its name is enough",
                    param="tool_choice",
                )
        names.add(name)
    return tuple(tool for tool in tools if tool.function.name in names)


def moved(schema: Json, prefix: str, definitions: Json) -> Json:
    """A schema that was whole, as part of another one: what its references point to goes to `definitions`.

    "#/$defs/city" becomes "#/$defs/PREFIX.city", any other place in it a place in "#/$defs/PREFIX".
    """
    root = False

    def there(reference: str) -> str:
        nonlocal root
        for place in _DEFINITIONS:
            if reference.startswith(f"#/{place}/"):
                return f"#/$defs/{prefix}.{reference.removeprefix(f'#/{place}/')}"
        root = True
        return f"#/$defs/{prefix}{reference[1:]}"

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        return {
            key: there(value)
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else walk(value)
            for key, value in node.items()
        }

    rest = walk({key: value for key, value in schema.items() if key not in _DEFINITIONS})
    for place in _DEFINITIONS:
        found = schema.get(place)
        for name, definition in found.items() if isinstance(found, dict) else ():
            definitions[f"{prefix}.{name}"] = walk(definition)
    if root:
        definitions[prefix] = rest
    return dict(rest)


def _templated(tool: Tool) -> Json:
    function = tool.function
    described: Json = {"name": function.name}
    if function.description is not None:
        described["description"] = function.description
    described["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": described}
