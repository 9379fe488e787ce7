"""Rows of published layouts become pairs, split where the answers begin; each dropped row has a reason."""

import ast
from itertools import permutations

import pytest
from conftest import ROOT

from dpokit.data.formats import FORMATS, UnusableError, find_format, parse_transcript, render_transcript
from dpokit.data.tally import REASONS
from dpokit.errors import DataError

HH = "\n\nHuman: Why?\n\nAssistant:"
LONG_HH = "\n\nHuman: Why?\n\nAssistant: Who asks?\n\nHuman: Me.\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be brief."}
WHY = {"role": "user", "content": "Why?"}
ME = [WHY, {"role": "assistant", "content": "Who asks?"}, {"role": "user", "content": "Me."}]
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
TEXTS = {"chosen": " Yes.", "rejected": " No."}
TURNS = {"chosen": [YES], "rejected": [NO]}

# layout, row, expected pair
ROWS = [
    ("HH prompt", {"prompt": HH, "response": " Yes.", **TEXTS}, (HH, " Yes.", " No.")),
    ("HH prompt", {"prompt": f"{HH} ", "response": "Yes.", **TEXTS}, (f"{HH} ", " Yes.", " No.")),
    ("explicit, plain", {"prompt": "Why?", **TEXTS}, ("Why?", " Yes.", " No.")),
    ("explicit, plain", {"prompt": HH, **TEXTS, "id": 7}, (HH, " Yes.", " No.")),
    ("explicit, conversational", {"prompt": [SYSTEM, WHY], **TURNS}, ([SYSTEM, WHY], "Yes.", "No.")),
    ("UltraFeedback", {"prompt": "Why?", "chosen": [WHY, YES], "rejected": [WHY, NO]}, ([WHY], "Yes.", "No.")),
    ("UltraFeedback", {"prompt": "Why?", **TURNS}, ([WHY], "Yes.", "No.")),
    ("UltraFeedback", {"prompt": "Why?", "chosen": [*ME, YES], "rejected": [*ME, NO]}, (ME, "Yes.", "No.")),
    ("implicit, conversational", {"chosen": [*ME, YES], "rejected": [*ME, NO]}, (ME, "Yes.", "No.")),
    ("HH transcript", {"chosen": f"{LONG_HH} Yes.", "rejected": f"{LONG_HH} No."}, (LONG_HH, " Yes.", " No.")),
    ("HH transcript", {"chosen": f"{HH} No, a.", "rejected": f"{HH} No, b."}, (HH, " No, a.", " No, b.")),
    ("implicit, plain", {"chosen": "It is so.", "rejected": "It is not."}, ("It is", " so.", " not.")),
    ("implicit, plain", {"chosen": "It is", "rejected": "It is not."}, ("It", " is", " is not.")),
]


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_a_row_is_recognised_and_becomes_this_pair(name, row, expected):
    layout = find_format([row], "test")
    pair = layout.to_pair(row)
    assert layout.name == name
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_the_rows_above_cover_every_layout():
    covered, names = {name for name, _, _ in ROWS}, {layout.name for layout in FORMATS}
    assert [f"{name}: add a row of this layout to ROWS in this file" for name in sorted(names - covered)] == []
    assert covered <= names


@pytest.mark.parametrize(("name", "row", "_"), ROWS)
def test_the_order_of_columns_does_not_matter(name, row, _):
    for names in permutations(row):
        assert find_format([{column: row[column] for column in names}], "test").name == name


def test_a_minority_of_broken_rows_does_not_hide_the_layout():
    usable = {"prompt": "Why?", **TEXTS}
    assert find_format([{**usable, "chosen": None}, usable, usable], "test").name == "explicit, plain"
    with pytest.raises(DataError, match="no known form"):
        find_format([{**usable, "chosen": None}, usable], "test")


def test_data_without_rows_has_no_known_form():
    with pytest.raises(DataError, match="no row at all"):
        find_format([], "test")


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("explicit, plain", {"prompt": None, **TEXTS}, "missing_text"),
        ("explicit, plain", {"prompt": "Why?", "chosen": 5, "rejected": " No."}, "missing_text"),
        ("HH transcript", {"chosen": None, "rejected": f"{HH} No."}, "missing_text"),
        ("explicit, conversational", {"prompt": [], **TURNS}, "missing_text"),
        (
            "implicit, conversational",
            {"chosen": [WHY, {**YES, "content": None}], "rejected": [WHY, NO]},
            "missing_text",
        ),
        ("HH transcript", {"chosen": "\n\nHuman: Why?", "rejected": f"{HH} No."}, "no_answer_turn"),
        ("HH transcript", {"chosen": f"{HH} Yes.\n\nHuman: So?", "rejected": f"{HH} No."}, "no_answer_turn"),
        ("explicit, conversational", {"prompt": [WHY], "chosen": [WHY], "rejected": [NO]}, "no_answer_turn"),
        ("HH transcript", {"chosen": f"{HH} Yes.", "rejected": f"{LONG_HH} No."}, "different_prompts"),
        ("explicit, conversational", {"prompt": [WHY], **TURNS, "vote": "tie"}, "tie"),
        ("explicit, conversational", {"prompt": [WHY], **TURNS, "vote": "both_bad"}, "both_bad"),
        ("UltraFeedback", {"prompt": "Why?", "chosen": [WHY, YES], "rejected": [*ME, NO]}, "different_prompts"),
        ("UltraFeedback", {"prompt": "Why?", "chosen": [WHY, YES], "rejected": [NO]}, "different_prompts"),
    ],
)
def test_an_unusable_row_has_this_reason(name, row, reason):
    layout = next(layout for layout in FORMATS if layout.name == name)
    with pytest.raises(UnusableError, match=f"^{reason}$"):
        layout.to_pair(row)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The sky is blue.", "The sky isn't blue."),
        ("The sky is blue.", "The sky is black."),
        ("The sky is", "The sky is blue."),
        ("The sky  is", "The sky  was"),
        ("The sky\nis", "The sky was"),
    ],
)
def test_a_common_beginning_ends_before_a_whole_word(first, second):
    prompts = set()
    for chosen, rejected in ((first, second), (second, first)):
        pair = FORMATS[-1].to_pair({"chosen": chosen, "rejected": rejected})
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)
        assert pair.chosen[0].isspace()
        assert pair.rejected[0].isspace()
        prompts.add(pair.prompt)
    assert len(prompts) == 1, "the prompt is the same whichever answer is preferred"


def test_a_transcript_survives_parsing_and_rendering():
    assert parse_transcript(LONG_HH) == ME
    assert render_transcript(parse_transcript(LONG_HH)) == LONG_HH


def test_a_plain_text_is_one_stripped_user_message():
    assert parse_transcript("  Why? ") == [WHY]


def test_an_empty_answer_is_left_out_of_a_transcript():
    assert parse_transcript("\n\nHuman: Why?\n\nAssistant:") == [WHY]


def test_text_before_the_first_human_turn_is_kept():
    messages = parse_transcript(f"Be brief.{HH}")
    assert any("Be brief." in message["content"] for message in messages)
    assert messages[-1]["content"].endswith("Why?")


def test_a_conversation_as_a_transcript_names_its_speakers():
    assert render_transcript([SYSTEM, *ME]) == f"\n\nSystem: Be brief.{LONG_HH}"


def test_every_reason_in_the_source_has_a_description():
    reasons = set()
    for path in (ROOT / "src" / "dpokit" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UnusableError":
                reasons.add(ast.literal_eval(node.args[0]))
    assert reasons
    assert [f"{name}: describe it in REASONS of data/tally.py" for name in sorted(reasons - set(REASONS))] == []
