"""Rows of published layouts become pairs, split where the answers begin; each dropped row has a reason."""

import ast
from itertools import permutations

import pytest
from conftest import ROOT

from dpokit.data.formats import FORMATS
from dpokit.data.layouts import match_layout
from dpokit.data.messages import UnusableError
from dpokit.data.tally import REASONS, REMEDIES
from dpokit.errors import DataError

HH = "\n\nHuman: Why?\n\nAssistant:"
LONG_HH = "\n\nHuman: Why?\n\nAssistant: Who asks?\n\nHuman: Me.\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be brief."}
WHY = {"role": "user", "content": "Why?"}
ME = [WHY, {"role": "assistant", "content": "Who asks?"}, {"role": "user", "content": "Me."}]
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
TEXTS = {"chosen": " Yes.", "rejected": " No."}
TURNS = {"chosen": [YES], "rejected": [NO]}
VOTE = {"vote": "tuned", "blind": True, "left": "base", "answers": {"base": "No.", "tuned": "Yes."}, "models": {}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "ask", "arguments": {"whom": "me"}}}],
}
RESULT = {"role": "tool", "name": "ask", "content": "Me."}
SO = {"role": "user", "content": "So?"}
OTHER = {"role": "assistant", "content": "Guess."}

# layout, row, expected pair
ROWS = [
    ("HH prompt", {"prompt": HH, "response": " Yes.", **TEXTS}, (HH, " Yes.", " No.")),
    ("HH prompt", {"prompt": f"{HH} ", "response": "Yes.", **TEXTS}, (f"{HH} ", " Yes.", " No.")),
    ("explicit, plain", {"prompt": "Why?", **TEXTS}, ("Why?", " Yes.", " No.")),
    ("explicit, plain", {"prompt": HH, **TEXTS, "id": 7}, (HH, " Yes.", " No.")),
    ("explicit, conversational", {"prompt": [SYSTEM, WHY], **TURNS}, ([SYSTEM, WHY], "Yes.", "No.")),
    ("explicit, conversational", {"prompt": [WHY], "chosen": YES, "rejected": NO}, ([WHY], "Yes.", "No.")),
    ("explicit, conversational", {"prompt": [WHY], "chosen": " Yes.", "rejected": "No."}, ([WHY], " Yes.", "No.")),
    ("explicit, conversational", {"messages": [WHY], **TURNS}, ([WHY], "Yes.", "No.")),
    ("explicit, conversational", {"messages": ME, "chosen": "Yes.", "rejected": "No."}, (ME, "Yes.", "No.")),
    ("explicit, conversational", {"conversations": [WHY], "chosen": YES, "rejected": NO}, ([WHY], "Yes.", "No.")),
    ("explicit, conversational", {"prompt": ME, "chosen": [*ME, YES], "rejected": [*ME, NO]}, (ME, "Yes.", "No.")),
    ("explicit, conversational", {"prompt": ME, "chosen": [*ME, YES], "rejected": [NO]}, (ME, "Yes.", "No.")),
    (
        "explicit, conversational",
        {"prompt": [SYSTEM, WHY], "chosen": [WHY, YES], "rejected": [WHY, NO]},
        ([SYSTEM, WHY], "Yes.", "No."),
    ),
    (
        "explicit, conversational",
        {"messages": [WHY, YES], "chosen": [WHY, YES], "rejected": [WHY, NO]},
        ([WHY], "Yes.", "No."),
    ),
    ("explicit, conversational", {"prompt": [WHY, OTHER], **TURNS}, ([WHY, OTHER], "Yes.", "No.")),
    (
        "explicit, conversational",
        {"prompt": [WHY], "chosen": [YES, SO, OTHER], "rejected": [NO, SO, NO]},
        ([WHY], [YES, SO, OTHER], [NO, SO, NO]),
    ),
    (
        "explicit, conversational",
        {"prompt": [WHY], "chosen": [YES, SO, OTHER], "rejected": [YES, SO, NO]},
        ([WHY, YES, SO], "Guess.", "No."),
    ),
    (
        "explicit, conversational",
        {"prompt": [WHY], "chosen": [CALL, RESULT, YES], "rejected": [NO]},
        ([WHY], [CALL, RESULT, YES], [NO]),
    ),
    ("explicit, conversational", {"prompt": [WHY], "chosen": [CALL], "rejected": [NO]}, ([WHY], [CALL], [NO])),
    ("explicit, conversational", {"prompt": [WHY], "chosen": CALL, "rejected": "No."}, ([WHY], [CALL], [NO])),
    ("dpokit votes", {"prompt": [WHY], **TURNS, **VOTE}, ([WHY], "Yes.", "No.")),
    ("UltraFeedback", {"prompt": "Why?", "chosen": [WHY, YES], "rejected": [WHY, NO]}, ([WHY], "Yes.", "No.")),
    ("UltraFeedback", {"prompt": "Why?", **TURNS}, ([WHY], "Yes.", "No.")),
    ("UltraFeedback", {"prompt": HH, "chosen": YES, "rejected": NO}, ([WHY], "Yes.", "No.")),
    ("UltraFeedback", {"prompt": "Me.", "chosen": [*ME, YES], "rejected": [*ME, NO]}, (ME, "Yes.", "No.")),
    (
        "UltraFeedback",
        {"prompt": "Why?", "chosen": [SYSTEM, YES], "rejected": [SYSTEM, NO]},
        ([SYSTEM, WHY], "Yes.", "No."),
    ),
    (
        "UltraFeedback",
        {"prompt": "Why?", "chosen": [WHY, YES], "rejected": [WHY, NO], "messages": [WHY, YES]},
        ([WHY], "Yes.", "No."),
    ),
    (
        "UltraFeedback",
        {"prompt": "Why?", "chosen": [WHY, YES], "rejected": [*ME, NO]},
        ([WHY], [YES], [*ME[1:], NO]),
    ),
    ("UltraFeedback", {"prompt": "Why?", "chosen": [*ME, YES], "rejected": [*ME, NO]}, (ME, "Yes.", "No.")),
    ("implicit, conversational", {"chosen": [*ME, YES], "rejected": [*ME, NO]}, (ME, "Yes.", "No.")),
    ("HH transcript", {"chosen": f"{LONG_HH} Yes.", "rejected": f"{LONG_HH} No."}, (LONG_HH, " Yes.", " No.")),
    ("HH transcript", {"chosen": f"{HH} No, a.", "rejected": f"{HH} No, b."}, (HH, " No, a.", " No, b.")),
    ("implicit, plain", {"chosen": "It is so.", "rejected": "It is not."}, ("It is", " so.", " not.")),
    ("implicit, plain", {"chosen": "It is", "rejected": "It is not."}, ("It", " is", " is not.")),
]
BY_NAME = {form.name: form.flag for form in FORMATS if form.by_name}


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_a_row_is_recognised_and_becomes_this_pair(name, row, expected):
    layout = match_layout([row], "test", form=BY_NAME.get(name))
    pair = layout.to_pair(row)
    assert layout.name == name
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_the_rows_above_cover_every_layout():
    covered, names = {name for name, _, _ in ROWS}, {layout.name for layout in FORMATS}
    assert [f"{name}: add a row of this layout to ROWS in this file" for name in sorted(names - covered)] == []
    assert covered <= names


@pytest.mark.parametrize(("name", "row", "_"), ROWS)
def test_the_order_of_columns_does_not_matter(name, row, _):
    for names in permutations(row) if len(row) < 6 else [tuple(row), tuple(reversed(row))]:
        reordered = {column: row[column] for column in names}
        assert match_layout([reordered], "test", form=BY_NAME.get(name)).name == name


@pytest.mark.parametrize(("name", "row", "_"), ROWS)
def test_the_flag_names_each_layout(name, row, _):
    [flag] = [form.flag for form in FORMATS if form.name == name]
    assert match_layout([row], "test", form=flag).name == name


def test_an_unknown_name_of_a_layout_lists_the_known_ones():
    with pytest.raises(DataError, match="no layout of this name") as error:
        match_layout([ROWS[0][1]], "my.jsonl", form="hh")
    assert "hh_transcript" in error.value.expected


def test_a_named_layout_that_does_not_fit_is_an_error():
    with pytest.raises(DataError, match=r"--format implicit_plain does not fit my\.jsonl"):
        match_layout([{"prompt": "Why?", **TEXTS}], "my.jsonl", form="implicit_plain")


def test_texts_without_a_prompt_are_an_error():
    """Else the common first words of the answers would become the prompt."""
    with pytest.raises(DataError, match=r"my\.jsonl has chosen and rejected as texts, but no prompt") as error:
        match_layout([TEXTS], "my.jsonl")
    assert "--columns prompt=NAME" in error.value.do
    assert "--format implicit_plain" in error.value.do


USABLE = {
    "explicit, plain": {"prompt": "Why?", **TEXTS},
    "explicit, conversational": {"prompt": [WHY], **TURNS},
    "implicit, conversational": {"chosen": [WHY, YES], "rejected": [WHY, NO]},
    "UltraFeedback": {"prompt": "Why?", "chosen": [WHY, YES], "rejected": [WHY, NO]},
    "HH transcript": {"chosen": f"{HH} Yes.", "rejected": f"{HH} No."},
    "dpokit votes": {"prompt": [WHY], **TURNS, **VOTE},
}
# layout, changes of a usable row, reason
UNUSABLE = [
    ("explicit, plain", {"prompt": None}, "missing_text (prompt is null)"),
    ("explicit, plain", {"chosen": 5}, "missing_text (chosen is a number)"),
    ("explicit, plain", {"rejected": True}, "missing_text (rejected is true or false)"),
    ("HH transcript", {"chosen": None}, "missing_text (chosen is null)"),
    ("explicit, conversational", {"prompt": []}, "missing_text (prompt is an empty list)"),
    ("explicit, conversational", {"chosen": ["Yes."]}, "missing_text (chosen has text)"),
    (
        "implicit, conversational",
        {"chosen": [WHY, {**YES, "content": None}]},
        "missing_text (chosen has a message whose content is null)",
    ),
    ("HH transcript", {"chosen": "\n\nHuman: Why?"}, "no_answer_turn (user)"),
    ("HH transcript", {"chosen": f"{HH} Yes.\n\nHuman: So?"}, "no_answer_turn (user)"),
    ("HH transcript", {"rejected": f"{LONG_HH} No."}, "different_prompts"),
    ("explicit, conversational", {"chosen": [WHY]}, "no_answer_turn (user)"),
    ("explicit, conversational", {"chosen": [CALL, RESULT]}, "no_answer_turn (tool)"),
    ("implicit, conversational", {"chosen": [WHY], "rejected": [WHY]}, "no_answer_turn (user)"),
    ("explicit, conversational", {"chosen": [SO, YES]}, "different_prompts"),
    ("implicit, conversational", {"chosen": [SO, YES]}, "different_prompts"),
    ("explicit, conversational", {"chosen": [YES, SO, YES], "rejected": [YES, WHY, NO]}, "different_prompts"),
    ("explicit, conversational", {"chosen": [YES, SO, YES], "rejected": [YES]}, "different_prompts"),
    ("UltraFeedback", {"rejected": [NO]}, "different_prompts"),
    ("UltraFeedback", {"prompt": "Who?"}, "different_prompts (the prompt is in neither conversation)"),
    ("explicit, conversational", {"chosen": [{**YES, "role": "narrator"}]}, "unknown_role (narrator)"),
    ("explicit, conversational", {"prompt": [{**WHY, "role": None}]}, "unknown_role (None)"),
    ("dpokit votes", {"vote": "tie"}, "tie"),
    ("dpokit votes", {"vote": "both_bad"}, "both_bad"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), UNUSABLE)
def test_an_unusable_row_has_this_reason(name, changes, reason):
    layout = match_layout([USABLE[name]], "test")
    assert layout.name == name
    with pytest.raises(UnusableError) as error:
        layout.to_pair({**USABLE[name], **changes})
    assert str(error.value) == reason


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


def test_every_reason_in_the_source_has_a_description():
    reasons = set()
    for path in (ROOT / "src" / "dpokit" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UnusableError":
                reasons |= {ast.literal_eval(node.args[0])} if isinstance(node.args[0], ast.Constant) else set()
    assert reasons
    assert [f"{name}: describe it in REASONS of data/tally.py" for name in sorted(reasons - set(REASONS))] == []


def test_every_reason_has_a_remedy():
    assert set(REMEDIES) == set(REASONS)


Q = {"role": "user", "content": "Weather?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def answer(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


# Prompt, chosen, rejected, and the prompt and chosen answer of the pair, or the reason without one.
REPEATS = {
    "a system turn before the repeated prompt": ([Q], [SYSTEM, Q, answer("Sun.")], [SYSTEM, Q, answer("No.")], None),
    "other system turns": ([Q], [SYSTEM, Q, answer("Sun.")], [{**SYSTEM, "content": "Hi"}, Q, answer("No.")], None),
    "the beginning of the answer": (
        [Q, answer("It is:")],
        [Q, answer("It is: sun")],
        [Q, answer("It is: no")],
        ([Q, answer("It is:")], " sun"),
    ),
    "the prompt's text": ("The sky is", "The sky is blue", "The sky is red", ("The sky is", " blue")),
    "ids in the messages": (
        [Q],
        [{**Q, "id": 1}, answer("Sun.")],
        [{**Q, "id": 2}, answer("No.")],
        ([Q], "Sun."),
    ),
}


@pytest.mark.parametrize("case", REPEATS)
def test_an_answer_that_repeats_the_prompt_has_it_once(case):
    prompt, chosen, rejected, expected = REPEATS[case]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    layout = match_layout([row], "test")
    if expected is None:
        with pytest.raises(UnusableError, match="different_prompts"):
            layout.to_pair(row)
    else:
        pair = layout.to_pair(row)
        assert (pair.prompt, pair.chosen) == expected
