"""The parts of a message, and the forms in which templates accept a message. No torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpokit.data.messages import SAYINGS, Messages, UnusableError

OPEN, CLOSE = "<think>", "</think>"
# Roles that not every template knows, and the roles that say the same.
OTHER_ROLES = {"developer": "system", "function": "tool", "ipython": "tool"}


def find_forms(messages: Messages) -> Iterator["MessageForm"]:
    """Yields the forms in which published rows and templates write the same messages, the usual form first.

    The arguments of a tool call are a mapping or JSON; a call without text has "" or None; reasoning is part of the
    text, or of `reasoning_content`; and a role has another name.
    """
    has_calls = any(message.get("tool_calls") for message in messages)
    has_reasoning = any(CLOSE in read_content(message) for message in messages)
    has_other_role = any(message["role"] in OTHER_ROLES for message in messages)
    for rename in (False, True)[: 1 + has_other_role]:
        for is_apart in (False, True)[: 1 + has_reasoning]:
            for empty in ("", None)[: 1 + has_calls]:
                for as_json in (False, True)[: 1 + has_calls]:
                    yield MessageForm(empty=empty, as_json=as_json, is_apart=is_apart, renames_roles=rename)


@dataclass(frozen=True)
class MessageForm:
    """A form in which a message is written.

    Attributes:
        empty: the content of a tool call without text.
        as_json: whether the arguments of a tool call are JSON; else a mapping.
        is_apart: whether reasoning has a key of its own; else it is part of the text.
        renames_roles: whether the roles of OTHER_ROLES are renamed.
    """

    empty: str | None
    as_json: bool
    is_apart: bool
    renames_roles: bool

    def write(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the message in this form. Raises: UnusableError for arguments of a tool call that are no JSON."""
        if self.renames_roles and message["role"] in OTHER_ROLES:
            message = {**message, "role": OTHER_ROLES[message["role"]]}
        text = read_content(message)
        if self.is_apart and message["role"] == "assistant" and CLOSE in text and not message.get("reasoning_content"):
            reasoning, _, text = text.partition(CLOSE)
            reasoning = reasoning.rpartition(OPEN)[2].strip("\n")
            message = {**message, "content": text.lstrip("\n"), "reasoning_content": reasoning}
        if not message.get("tool_calls"):
            return message
        calls = []
        for call in message["tool_calls"]:
            function = dict(call.get("function") or call)
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except ValueError:
                    raise UnusableError("bad_arguments") from None
            function["arguments"] = json.dumps(arguments, ensure_ascii=False) if self.as_json else arguments
            calls.append({**call, "function": function} if "function" in call else function)
        return {**message, "content": message.get("content") or self.empty, "tool_calls": calls}


def read_content(message: Mapping[str, Any]) -> str:
    """Returns the text of a message; empty if it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has a text, a tool call or reasoning."""
    return bool(read_content(message).strip()) or any(map(message.get, SAYINGS))


def read_reasoning(message: Mapping[str, Any], begin: str = OPEN, close: str = CLOSE) -> str:
    """Returns the reasoning of a message, from its own key or from its text between `begin` and `close`."""
    apart = next((message[key] for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)), "")
    text = read_content(message)
    return str(apart) or (text.partition(close)[0].rpartition(begin)[2] if close in text else "")
