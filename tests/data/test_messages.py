"""Messages, tool schemas and template arguments of a row are read whole, or the row is dropped with what was seen."""

import json

import pytest
from datasets import Dataset

from dpokit.data.messages import ROLE_NAMES, UnusableError, read_template_kwargs, read_tools, read_turns
from dpokit.data.source_rows import find_layout
from dpokit.data.sources import load_splits

WHY = {"role": "user", "content": "Why?"}
YES = {"role": "assistant", "content": "Yes."}
CALL = {"type": "function", "function": {"name": "get_tide", "arguments": {"harbour": "Husum"}}}
SCHEMA = {"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object", "properties": {}}}}


def text_part(text: str, **more: object) -> dict:
    return {"type": "text", "text": text, **more}


def calling(arguments: object, **more: object) -> dict:
    call = {"type": "function", "function": {"name": "get_tide", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **more}


# message, the message that is read
MESSAGES = {
    "a plain message": (WHY, WHY),
    "from and value": ({"from": "human", "value": "Why?"}, WHY),
    "from and value beside empty role and content": (
        {"role": None, "content": None, "from": "gpt", "value": "Yes."},
        YES,
    ),
    "an unknown key": ({**YES, "weight": 0.5}, {**YES, "weight": 0.5}),
    "reasoning": ({**YES, "reasoning_content": "Hm."}, {**YES, "reasoning_content": "Hm."}),
    "reasoning without content": (
        {"role": "assistant", "content": None, "reasoning_content": "Hm."},
        {"role": "assistant", "content": None, "reasoning_content": "Hm."},
    ),
    "keys without a value": ({**YES, "tool_calls": None, "name": None}, YES),
    "no tool call": ({**YES, "tool_calls": []}, YES),
    "a tool's result": (
        {"role": "tool", "name": "get_tide", "tool_call_id": "1", "content": "{}"},
        {"role": "tool", "name": "get_tide", "tool_call_id": "1", "content": "{}"},
    ),
    "parts": ({"role": "user", "content": [text_part("Wh"), text_part("y?")]}, WHY),
    "parts with absent keys": ({"role": "user", "content": [text_part("Why?", image=None)]}, WHY),
    "a part that is a text": ({"role": "user", "content": ["Why?"]}, WHY),
    "a part of an answer": ({"role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]}, YES),
    "arguments as a mapping": (calling({"harbour": "Husum"}), calling({"harbour": "Husum"})),
    "arguments as text": (calling('{"harbour": "Husum"}'), calling({"harbour": "Husum"})),
    "no arguments as text": (calling(""), calling({})),
    "arguments that are no JSON": (calling("harbour=Husum"), calling("harbour=Husum")),
    "an argument that is null": (calling({"harbour": None}), calling({"harbour": None})),
    "a call as text": (
        {**calling({}), "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_message_is_read_with_all_its_keys(case):
    message, expected = MESSAGES[case]
    assert read_turns([message], "prompt", padded=False) == [expected]
    assert read_turns(message, "prompt", padded=False) == [expected]


@pytest.mark.parametrize("name", ["User", "human", "Human", " HUMAN ", "Assistant", "gpt", "system", "tool", "model"])
def test_a_role_is_understood_in_any_case(name):
    message = {"role": name, "content": "Why?"}
    assert read_turns([message], "prompt", padded=False)[0]["role"] == ROLE_NAMES[name.strip().lower()]


# message, reason
REFUSED = {
    "an unknown role": ({"role": "narrator", "content": "Once."}, "unknown_role (narrator)"),
    "a role that is no text": ({"role": ["user"], "content": "Why?"}, "unknown_role (['user'])"),
    "an image": (
        {"role": "user", "content": [text_part("Why?"), {"type": "image", "text": None}]},
        "missing_text (prompt has a part of type image)",
    ),
    "an image's address": (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
        "missing_text (prompt has a part of type image_url)",
    ),
    "sound": (
        {"role": "user", "content": [{"type": "input_audio"}]},
        "missing_text (prompt has a part of type input_audio)",
    ),
    "a text part without text": (
        {"role": "user", "content": [{"type": "text"}]},
        "missing_text (prompt has a part of type text)",
    ),
    "null": ({"role": "user", "content": None}, "missing_text (prompt has a message whose content is null)"),
    "no content": ({"role": "user"}, "missing_text (prompt has a message whose content is null)"),
    "a number": ({"role": "user", "content": 4}, "missing_text (prompt has a message whose content is a number)"),
    "an object": (
        {"role": "tool", "content": {"height": 1}},
        "missing_text (prompt has a message whose content is an object without a role)",
    ),
    "broken calls": ({**YES, "tool_calls": "[{"}, "bad_json (tool_calls)"),
    "calls of another type": ({**YES, "tool_calls": ["get_tide"]}, "bad_json (tool_calls)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_message_is_refused_with_what_was_seen(case):
    message, reason = REFUSED[case]
    with pytest.raises(UnusableError) as error:
        read_turns([message], "prompt", padded=False)
    assert str(error.value) == reason


TOOLS = {
    "none": (None, None),
    "an empty list": ([], None),
    "an empty text": ("", None),
    "a list": ([SCHEMA], [SCHEMA]),
    "JSON": (json.dumps([SCHEMA]), [SCHEMA]),
    "JSON of one tool": (json.dumps(SCHEMA), [SCHEMA]),
    "a list of JSON": ([json.dumps(SCHEMA)], [SCHEMA]),
    "keys without a value": ([{**SCHEMA, "strict": None}], [SCHEMA]),
    "JSON with null": (json.dumps([{**SCHEMA, "strict": None}]), [{**SCHEMA, "strict": None}]),
}


@pytest.mark.parametrize("case", TOOLS)
def test_tool_schemas_are_read_as_objects(case):
    value, expected = TOOLS[case]
    assert read_tools(value, "tools", padded=True) == expected


@pytest.mark.parametrize("value", ["[{", '"get_tide"', "5", ["get_tide"], [5], 5], ids=str)
def test_a_tool_schema_that_is_no_json_object_is_refused(value):
    with pytest.raises(UnusableError, match=r"^bad_json \(tools\)$"):
        read_tools(value, "tools", padded=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ({"enable_thinking": False, "date": None}, {"enable_thinking": False}),
        ('{"enable_thinking": false}', {"enable_thinking": False}),
    ],
)
def test_arguments_of_the_template_are_read(value, expected):
    assert read_template_kwargs(value, "chat_template_kwargs") == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "bad_json (chat_template_kwargs)"),
        (["thinking"], "bad_json (chat_template_kwargs)"),
        ({"chat_template": "{{ 1 }}"}, "reserved_argument (chat_template)"),
        ({"tokenize": True}, "reserved_argument (tokenize)"),
        ({"messages": []}, "reserved_argument (messages)"),
    ],
)
def test_other_arguments_of_the_template_are_refused(value, reason):
    with pytest.raises(UnusableError) as error:
        read_template_kwargs(value, "chat_template_kwargs")
    assert str(error.value) == reason


ROWS = [
    {
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
        ],
        "prompt": [WHY, calling({"a": "1"}), {"role": "tool", "name": "f", "content": "4"}],
        "chosen": [YES],
        "rejected": [{"role": "assistant", "content": "No.", "reasoning_content": "Hm."}],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    {
        "tools": [
            {"type": "function", "function": {"name": "g", "parameters": {"properties": {"b": {"type": "number"}}}}}
        ],
        "prompt": [WHY],
        "chosen": [calling({"b": "2"})],
        "rejected": [{"role": "assistant", "content": "No."}],
        "chat_template_kwargs": {"date": "today"},
    },
]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_keys_that_arrow_adds_are_removed(kind, streaming, tmp_path):
    """Parquet merges the keys of all rows; each pair has only those of its row."""
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
        stored = load_splits(str(path), None, streaming=False)["train"][1]
        assert "a" in stored["tools"][0]["function"]["parameters"]["properties"], "the keys of both rows are merged"
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = load_splits(str(path), None, streaming=streaming)["train"]
    layout = find_layout(rows, "test")
    pairs = [layout.to_pair(row) for row in rows]
    for pair, row in zip(pairs, ROWS, strict=True):
        assert (pair.prompt, pair.tools) == (row["prompt"], row["tools"])
        assert (pair.chosen, pair.rejected) == (row["chosen"], row["rejected"])
        assert pair.template_kwargs == row["chat_template_kwargs"]


def test_a_null_of_a_json_column_is_kept(tmp_path):
    rows = [{"prompt": [WHY], "chosen": [calling({"a": None})], "rejected": [YES]}, {**ROWS[0], "chosen": [YES]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_splits(str(tmp_path / "rows.jsonl"), None, streaming=False)["train"]
    pair = find_layout(loaded, "test").to_pair(loaded[0])
    assert pair.chosen[0]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_the_older_function_call_becomes_a_tool_call():
    call = {"name": "f", "arguments": '{"city": "Oslo"}'}
    [message] = read_turns([{"role": "assistant", "content": None, "function_call": call}], "chosen", padded=False)
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}]
    assert "function_call" not in message
