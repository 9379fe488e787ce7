"""Reads the messages, tool schemas and template arguments of a row, as Python values or as JSON text. No torch."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

Messages = list[dict[str, Any]]

# The names of roles in published data, and the names that chat templates know.
ROLE_NAMES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **{name: name for name in ("system", "developer", "tool", "function", "ipython")},
}
_TEMPLATE_ROLES = frozenset(ROLE_NAMES.values())
# Keys that say something beside the content; with one of them, a message needs no content.
SAYINGS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
# Arguments of `apply_chat_template` that a row must not set; all others are variables of the template.
_RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("return_assistant_tokens_mask", "processor_kwargs"),
    )
)
# Words that structure the prompts of today's models, by which a rendered prompt is recognised.
CONTROL_TOKENS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|begin_of_text|user|assistant|system|endoftext)\|>|"
    r"<(?:start|end)_of_turn>|\[/?INST\]|<\uff5c(?:User|Assistant)\uff5c>"
)
_MESSAGE_TEXT = re.compile(r"""\s*(?:\[\s*)?\{\s*["']\w+["']\s*:""")


class UnusableError(Exception):
    """A row that is not a preference pair.

    Args:
        reason: a key of `REASONS`.
        detail: the value that was seen, such as a role; few rows differ in it, because data.json counts each.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)


def is_turns(value: Any) -> bool:
    """Whether a value is one message, or a list of messages and not empty."""
    if isinstance(value, Mapping):
        return "role" in value or "from" in value
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(m, Mapping) and is_turns(m) for m in value)
    )


def parse_turns(text: Any) -> Any:
    """Returns the message or messages that a text holds as JSON or as Python's notation; None if it holds none."""
    if not isinstance(text, str) or not _MESSAGE_TEXT.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:  # `str` of a list, as a CSV of pandas has it
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if is_turns(value) else None


def describe_value(value: Any) -> str:
    """Returns the kind of a value, for an error."""
    if isinstance(value, bool):
        return "true or false"
    if is_turns(value):
        return "a list of messages" if isinstance(value, (list, tuple)) else "a message"
    kinds: dict[type, str] = {type(None): "null", int: "a number", float: "a number", str: "text", bytes: "bytes"}
    if isinstance(value, Mapping):
        return "an object without a role" if value else "an empty object"
    if isinstance(value, (list, tuple)):
        other = next((part for part in value if not is_turns(part)), None)
        return f"a list with {describe_value(other)}" if value else "an empty list"
    return kinds.get(type(value), type(value).__name__)


def read_turns(value: Any, column: str, *, padded: bool) -> str | Messages:
    """Returns a text as it is, and one message or a list of messages as messages with the roles of chat templates.

    Content parts of text are joined. A message keeps all further keys that have a value.

    Args:
        value: the value of the column.
        column: its name, for the reason.
        padded: whether the value is of an Arrow struct: its objects have the keys of all rows, with None for a missing
            value.

    Raises: UnusableError for another value, an unknown role, a missing content, or a content part that is no text.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise UnusableError("missing_text", f"{column} is {describe_value(value)}")
    return [message if _is_read(message) else _read_message(message, column, padded) for message in value]


def read_turns_text(text: Any, column: str) -> str | Messages:
    """Returns the messages of a text that holds them as JSON. Raises: UnusableError as `read_turns`."""
    value = parse_turns(text)
    if value is None and isinstance(text, str):
        raise UnusableError("bad_json", column)
    return read_turns(text if value is None else value, column, padded=False)


def read_tools(value: Any, column: str, *, padded: bool) -> list[dict[str, Any]] | None:
    """Returns the schemas of a row's tools; None without tools. Raises: UnusableError for a schema that is no JSON."""
    tools = _parse_json(value, column) if isinstance(value, str) else value
    padded = padded and tools is value
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)):
        raise UnusableError("bad_json", column)
    schemas = []
    for tool in tools:
        schema = _parse_json(tool, column) if isinstance(tool, str) else tool
        if not isinstance(schema, Mapping):
            raise UnusableError("bad_json", column)
        schemas.append(dict(_without_none(schema) if padded and schema is tool else schema))
    return schemas


def read_template_kwargs(value: Any, column: str) -> dict[str, Any]:
    """Returns a row's arguments for the chat template. Raises: UnusableError for other values and reserved names."""
    kwargs = _parse_json(value, column) if isinstance(value, str) else value
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise UnusableError("bad_json", column)
    for name in sorted(_RESERVED & kwargs.keys()):
        if kwargs[name] is not None:
            raise UnusableError("reserved_argument", name)
    return {name: value for name, value in kwargs.items() if value is not None}


def find_control_tokens(prompt: str) -> list[str]:
    """Returns the control tokens of chat templates in a rendered conversation; none for a text that mentions them."""
    tokens = CONTROL_TOKENS.findall(prompt)
    begins = CONTROL_TOKENS.match(re.sub(r"^(<s>|<bos>)\s*", "", prompt.lstrip())) is not None
    return tokens if begins and len(tokens) > 1 else []


def is_plain(message: Mapping[str, Any]) -> bool:
    """Whether a message has only a role and a text."""
    return len(message) == 2 and type(message.get("content")) is str


def _is_read(message: Any) -> bool:
    """Whether a message is as `_read_message` would return it; nearly every message is."""
    if type(message) is not dict or len(message) != 2 or type(message.get("content")) is not str:
        return False
    role = message.get("role")
    return type(role) is str and role in _TEMPLATE_ROLES


def _read_message(message: Any, column: str, padded: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UnusableError("missing_text", f"{column} has {describe_value(message)}")
    role, content = message.get("role"), message.get("content")
    names: tuple[str, ...] = ("role", "content")
    if role is None and message.get("from") is not None:
        role, content, names = message["from"], message.get("value"), ("from", "value", "role", "content")
    more = {key: value for key, value in message.items() if key not in names and value is not None}
    more = _without_none(more) if padded else more
    name = ROLE_NAMES.get(str(role).strip().lower())
    if name is None:
        raise UnusableError("unknown_role", str(role)[:40])
    if "function_call" in more:  # the older name of a single tool call
        [call] = _read_calls(more.pop("function_call"))
        more.setdefault("tool_calls", [{"type": "function", "function": call}])
    if "tool_calls" in more:
        calls = _read_calls(more.pop("tool_calls"))
        more |= {"tool_calls": calls} if calls else {}
    if isinstance(content, (list, tuple)):
        content = "".join(_read_part(part, column) for part in content)
    elif not isinstance(content, str) and (content is not None or not any(map(more.get, SAYINGS))):
        raise UnusableError("missing_text", f"{column} has a message whose content is {describe_value(content)}")
    return {"role": name, "content": content, **more}


def _read_part(part: Any, column: str) -> str:
    """Returns the text of a content part: templates of text models write it, and nothing between two parts."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else describe_value(part)
    text = part.get("text") if isinstance(part, Mapping) else None
    if isinstance(text, str) and kind in (None, "text", "input_text", "output_text"):
        return text
    raise UnusableError("missing_text", f"{column} has a part of type {str(kind)[:40]}")


def _read_calls(calls: Any) -> list[Any]:
    """Returns tool calls with their arguments as mappings: nearly every template fails on arguments as JSON text."""
    calls = _parse_json(calls, "tool_calls") if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise UnusableError("bad_json", "tool_calls")
    return [_read_call(call) for call in calls]


def _read_call(call: Mapping[str, Any]) -> dict[str, Any]:
    read = dict(call)
    if isinstance(call.get("function"), Mapping):
        read["function"] = _read_call(call["function"])
    if isinstance(call.get("arguments"), str):
        try:
            arguments = json.loads(call["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if isinstance(arguments, dict):
            read["arguments"] = arguments
    return read


def _parse_json(text: str, column: str) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError("bad_json", column) from error


def _without_none(value: Any) -> Any:
    """Returns a value without the keys that have None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(part) for part in value]
    return value


def find_texts(value: Any) -> Iterator[str]:
    """Yields each text in nested lists and mappings; the keys of mappings are not texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from find_texts(part)


def count_letters(value: Any) -> int:
    """Counts the characters of all texts in nested lists and mappings; of messages, without their roles."""
    if isinstance(value, str):
        return len(value)
    count = 0
    for part in value:  # the usual case is fast: a message that has a text alone
        content = part.get("content") if isinstance(part, Mapping) and len(part) == 2 else None
        count += len(content) if isinstance(content, str) else sum(map(len, find_texts(part)))
    return count
