"""An OpenAI chat message -> its plain form, which every chat template can write."""

from __future__ import annotations

import json
from typing import Any

from rest_mega.data.rows import expect


def plain_message(place: str, key: str, message: object) -> dict[str, Any]:
    """The message with absent fields left out, text parts joined and arguments as objects.

    `place` and `key` name it in the RowError for one that is none.
    """
    expect(isinstance(message, dict), place, key, message, 'an object {"role", "content"}')
    assert isinstance(message, dict), message
    plain = {k: v for k, v in message.items() if v is not None}
    if "function_call" in plain:
        rule = "written as tool_calls"
        expect(False, place, f"{key}.function_call", plain["function_call"], rule)
    plain["content"] = _text(place, f"{key}.content", message.get("content"))
    calls = plain.pop("tool_calls", None) or []
    expect(isinstance(calls, list), place, f"{key}.tool_calls", calls, "a list of calls")
    if calls:
        plain["tool_calls"] = [
            _call(place, f"{key}.tool_calls[{n}]", c) for n, c in enumerate(calls)
        ]
    return plain


def _text(place: str, key: str, content: Any) -> Any:
    """Content as one string; OpenAI's text parts are joined."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    good = all(isinstance(text, str) for text in texts)
    expect(good, place, key, content, "text, or a list of text parts")
    return "".join(str(text) for text in texts)


def _call(place: str, key: str, call: Any) -> dict[str, Any]:
    """{"function": {"name", "arguments"}, ...} with the arguments as an object: templates that
    write JSON would quote a string once more."""
    function = call.get("function") if isinstance(call, dict) else None
    rule = '{"function": {"name": string, "arguments": an object or its JSON}}'
    name = function.get("name") if isinstance(function, dict) else None
    arguments = _arguments(function.get("arguments")) if isinstance(function, dict) else None
    expect(isinstance(name, str) and arguments is not None, place, key, call, rule)
    return {**call, "function": {"name": name, "arguments": arguments}}


def _arguments(value: object) -> dict[str, Any] | None:
    """Arguments as an object; None where they are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None
