"""The layout of a dataset is that of most of its first rows; a value that fits no layout is named."""

import json

import pytest

from dpokit.data.formats import PARTS
from dpokit.data.layouts import CONTEXT, match_layout
from dpokit.data.messages import UnusableError
from dpokit.errors import DataError
from dpokit.settings.flags import COLUMN_NAMES

WHY = {"role": "user", "content": "Why?"}
ME = [WHY, {"role": "assistant", "content": "Who asks?"}, {"role": "user", "content": "Me."}]
TEXTS = {"chosen": " Yes.", "rejected": " No."}
TURNS = {
    "chosen": [{"role": "assistant", "content": "Yes."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def test_a_minority_of_broken_rows_does_not_hide_the_layout():
    usable = {"prompt": "Why?", **TEXTS}
    assert match_layout([{**usable, "chosen": None}, usable, usable], "test").name == "explicit, plain"
    with pytest.raises(DataError, match="no known form"):
        match_layout([{**usable, "chosen": None}, usable], "test")


def test_data_without_rows_has_no_known_form():
    with pytest.raises(DataError, match="no row at all"):
        match_layout([], "test")


# the rows of a file that no layout fits, and the part of the error that names the value
WRONG_VALUES = [
    ([{"prompt": "Why?", **TEXTS}, {"prompt": "Why?", **TEXTS, "rejected": None}], "in row 2, rejected is null"),
    ([{"prompt": "Why?", "chosen": 4, "rejected": 5}], "in row 1, chosen is a number"),
    ([{"prompt": "Why?", "chosen": ["Yes.", 5], "rejected": ["No."]}], "in row 1, chosen is a list with text"),
    ([{"prompt": None, **TEXTS}], "in row 1, prompt is null"),
    ([{"prompt": {"text": "Why?"}, **TEXTS}], "in row 1, prompt is an object without a role"),
]


@pytest.mark.parametrize(("rows", "seen"), WRONG_VALUES)
def test_a_value_that_fits_no_layout_is_named_with_its_row(rows, seen):
    with pytest.raises(DataError, match="no known form") as error:
        match_layout(rows, "my.jsonl")
    assert seen in error.value.seen
    assert "my.jsonl" in error.value.seen


def test_rows_in_a_list_beside_other_keys_are_named():
    with pytest.raises(DataError, match=r"my\.json has one row, whose data is a list of 2 objects") as error:
        match_layout([{"version": 1, "data": [{"prompt": "Why?", **TEXTS}] * 2}], "my.json")
    assert "the objects of data" in error.value.do


# rows whose columns hold messages as text
JSON_TEXTS = {
    "JSON": json.dumps,
    "Python's notation": str,
    "JSON with spaces": lambda value: "\n " + json.dumps(value, indent=2),
}


@pytest.mark.parametrize("kind", JSON_TEXTS)
@pytest.mark.parametrize("names", [PARTS, ("prompt",), ("chosen", "rejected")], ids=",".join)
def test_messages_as_text_are_read_as_messages(names, kind):
    row = {"prompt": ME, **TURNS}
    texts = row | {name: JSON_TEXTS[kind](row[name]) for name in names}
    layout = match_layout([texts], "test")
    pair = layout.to_pair(texts)
    assert (pair.prompt, pair.chosen, pair.rejected) == (ME, "Yes.", "No.")
    with pytest.raises(UnusableError, match=r"^bad_json \(" + names[0]):
        layout.to_pair(texts | {names[0]: texts[names[0]][:-1]})


def test_a_few_answers_that_are_json_stay_texts():
    answer = json.dumps([WHY])
    rows = [{"prompt": "Why?", **TEXTS}] * 2 + [{"prompt": "Show a list of messages.", **TEXTS, "chosen": answer}]
    assert match_layout(rows, "test").to_pair(rows[2]).chosen == answer


def test_the_flag_has_the_names_that_layouts_use():
    assert set(COLUMN_NAMES) == {*PARTS, *CONTEXT}
