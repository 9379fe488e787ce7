"""Rows of published layouts become these pairs; of several answers, the pairs that the flags choose."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from datasets import Dataset

import dpokit
from dpokit.data.layouts import LAYOUTS, match_layout
from dpokit.data.messages import UnusableError
from dpokit.data.prepare import prepare_data, prepare_held_out
from dpokit.data.ranking import PairChoice
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments

WHY, SO = {"role": "user", "content": "Why?"}, {"role": "user", "content": "So?"}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: Why?\n\nAssistant:"
TEXTS, TURNS = {"chosen": "Yes.", "rejected": "No."}, {"chosen": [YES], "rejected": [NO]}
ANSWERS = {"response_a": "Yes.", "response_b": "No."}
SWAPPED = {"response_a": "No.", "response_b": "Yes."}
CHATML = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
PLAIN, CHAT = ("Why?", "Yes.", "No."), ([WHY], "Yes.", "No.")
EXPLICIT, CONVERSATION = "explicit, plain", "explicit, conversational"


def shp(label: int, first: str = "Yes.", second: str = "No.") -> dict:
    return {"history": "Why?", "human_ref_A": first, "human_ref_B": second, "labels": label, "score_A": 3}


def pku(**labels: int) -> dict:
    return {"prompt": "Why?", "response_0": "Yes.", "response_1": "No.", "is_response_0_safe": True, **labels}


def steer(strength: int, first: str = "Yes.", second: str = "No.") -> dict:
    return {"prompt": "Why?", "response_1": first, "response_2": second, "preference_strength": strength}


def objects(key: str, label: str, *values: float) -> list[dict]:
    return [{key: f"Answer {value:g}.", label: value, "model": "m"} for value in values]


# layout, row, pair
ROWS = [
    (EXPLICIT, {"instruction": "Why?", "input": "", **TEXTS}, PLAIN),
    (EXPLICIT, {"instruction": "Why?", "input": "Rain.", **TEXTS}, ("Why?\n\nRain.", "Yes.", "No.")),
    (EXPLICIT, {"question": "Why?", **TEXTS}, PLAIN),
    (EXPLICIT, {"query": "Why?", **TEXTS}, PLAIN),
    (EXPLICIT, {"problem": "Why?", **TEXTS}, PLAIN),
    (EXPLICIT, {"request": "Why?", **TEXTS}, PLAIN),
    (EXPLICIT, {"Prompt": "Why?", "Chosen": "Yes.", "Rejected": "No."}, PLAIN),
    (EXPLICIT, {"prompt": "Why?", "chosen_response": "Yes.", "rejected_response": "No."}, PLAIN),
    (EXPLICIT, {"prompt": "Why?", "chosen": "Yes.", "reject": "No."}, PLAIN),
    (EXPLICIT, {"input": "Why?", "accepted": "Yes.", "rejected": "No."}, PLAIN),
    (EXPLICIT, {"prompt": "Why?", "better_response": "Yes.", "worse_response": "No."}, PLAIN),
    (EXPLICIT, {"qid": 7, "question": "Why?", "response_j": "Yes.", "response_k": "No.", "date": "2026"}, PLAIN),
    (EXPLICIT, {"system": "Be brief.", "question": "Why?", **TEXTS}, ([SYSTEM, WHY], "Yes.", "No.")),
    (EXPLICIT, {"system_prompt": "", "question": "Why?", **TEXTS}, CHAT),
    (CONVERSATION, {"system": "Be brief.", "prompt": [WHY], **TURNS}, ([SYSTEM, WHY], "Yes.", "No.")),
    (CONVERSATION, {"prompt": [WHY], "chosen": YES, "rejected": NO}, CHAT),
    (
        CONVERSATION,
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        CHAT,
    ),
    (CONVERSATION, {"conversations": [{"from": "human", "value": "Why?"}], **TEXTS}, CHAT),
    (
        CONVERSATION,
        {"conversations": [{"from": "human", "value": "Why?"}], **TURNS},
        CHAT,
    ),
    (CONVERSATION, {"messages": json.dumps([WHY]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])}, CHAT),
    (CONVERSATION, {"messages": [WHY], "chosen_response": "Yes.", "rejected_response": "No."}, CHAT),
    (
        CONVERSATION,
        {
            "input": {"messages": [WHY], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
        CHAT,
    ),
    (
        "Step-DPO",
        {"prompt": "Why?", "initial_reason_steps": "Step 1: it", "chosen": " is.", "rejected": " not.", "answer": "4"},
        ([WHY, {"role": "assistant", "content": "Step 1: it"}], " is.", " not."),
    ),
    ("LLaMA-Factory", {"instruction": "So?", "history": [["Why?", "Yes."]], **TEXTS}, ([WHY, YES, SO], "Yes.", "No.")),
    ("LLaMA-Factory", {"instruction": "Why?", "input": "", "history": [], **TEXTS}, CHAT),
    ("LLaMA-Factory v1", {"instruction": "Why?", "input": "", "output": ["Yes.", "No."]}, PLAIN),
    (
        "LLaMA-Factory v1",
        {"instruction": "So?", "output": ["Yes.", "No."], "history": [["Why?", "Yes."]]},
        ([WHY, YES, SO], "Yes.", "No."),
    ),
    ("ms-swift", {"messages": [WHY, YES], "rejected_response": "No."}, CHAT),
    (
        "ms-swift",
        {"messages": [SYSTEM, WHY, YES], "rejected_messages": [SYSTEM, WHY, NO]},
        ([SYSTEM, WHY], "Yes.", "No."),
    ),
    ("lists of answers", {"prompt": "Why?", "chosen": ["Yes.", "Yes!"], "rejected": ["No.", "No!"]}, PLAIN),
    ("lists of turns", {"chosen": ["Why?", "Yes."], "rejected": ["Why?", "No."]}, CHAT),
    (
        "transcript without empty lines",
        {"chosen": "Human: Why?\nAssistant: Yes.", "rejected": "Human: Why?\nAssistant: No."},
        (HH, " Yes.", " No."),
    ),
    (
        "transcript without empty lines",
        {"prompt": "Why?", "chosen": "Human: Why?\nAssistant: Yes.", "rejected": "Human: Why?\nAssistant: No."},
        (HH, " Yes.", " No."),
    ),
    (
        EXPLICIT,
        {
            "prompt": "Human: Why?\nAssistant:",
            "chosen": "Human: Why?\nAssistant: Yes.",
            "rejected": "Human: Why?\nAssistant: No.",
        },
        ("Human: Why?\nAssistant:", " Yes.", " No."),
    ),
    (
        EXPLICIT,
        {"prompt": "[INST] Why? [/INST]", "chosen": "[INST] Why? [/INST] Yes.", "rejected": "[INST] Why? [/INST] No."},
        ("[INST] Why? [/INST]", " Yes.", " No."),
    ),
    (EXPLICIT, {"prompt": CHATML, "chosen": f"{CHATML}Yes.", "rejected": f"{CHATML}No."}, (CHATML, "Yes.", "No.")),
    (
        "rendered conversations",
        {"prompt": "Why?", "chosen": f"{CHATML}Yes.", "rejected": f"{CHATML}No."},
        (CHATML, "Yes.", "No."),
    ),
    ("rendered conversations", {"chosen": f"{CHATML}Yes.", "rejected": f"{CHATML}No."}, (CHATML, "Yes.", "No.")),
    ("rendered conversations", {"chosen": f"{LLAMA}Yes.", "rejected": f"{LLAMA}No."}, (LLAMA, "Yes.", "No.")),
    ("SHP", shp(1), PLAIN),
    ("SHP", shp(0, "No.", "Yes."), PLAIN),
    (
        "summarize from feedback",
        {
            "info": {"post": "Rain.", "title": "Why?", "subreddit": "weather", "id": "x"},
            "summaries": [{"text": " No.", "policy": "a"}, {"text": " Yes.", "policy": "b"}],
            "choice": 1,
        },
        ("SUBREDDIT: r/weather\n\nTITLE: Why?\n\nPOST: Rain.\n\nTL;DR:", " Yes.", " No."),
    ),
    ("PKU-SafeRLHF", pku(better_response_id=0, safer_response_id=1), PLAIN),
    ("PKU-SafeRLHF safer", pku(better_response_id=1, safer_response_id=0), PLAIN),
    ("HelpSteer", steer(-2), PLAIN),
    ("HelpSteer", steer(1, "No.", "Yes."), PLAIN),
    ("HelpSteer", {"context": [WHY], "response1": "Yes.", "response2": "No.", "overall_preference": -3}, CHAT),
    (
        "WebGPT",
        {"question": {"full_text": "Why?"}, "answer_0": "No.", "answer_1": "Yes.", "score_0": -1.0, "score_1": 1.0},
        PLAIN,
    ),
    ("arena conversations", {"conversation_a": [WHY, YES], "conversation_b": [WHY, NO], "winner": "model_a"}, CHAT),
    (
        "arena conversations",
        {"conversation_a": [WHY, NO, SO, NO], "conversation_b": [WHY, YES, SO, NO], "winner": "model_b", "turn": 1},
        CHAT,
    ),
    (
        "arena conversations",
        {"conversation_a": [WHY, NO, SO, NO], "conversation_b": [WHY, YES, SO, NO], "winner": "model_b", "turn": 1.0},
        CHAT,
    ),
    ("arena", {"prompt": "Why?", **ANSWERS, "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, PLAIN),
    (
        "arena",
        {
            "prompt": '["Why?", "So?"]',
            "response_a": '["Yes.", "No."]',
            "response_b": '["Yes.", "Yes."]',
            "winner_model_a": 0,
            "winner_model_b": 1,
        },
        ([WHY, YES, SO], "Yes.", "No."),
    ),
    ("votes", {"prompt": "Why?", **SWAPPED, "winner": "B"}, PLAIN),
    ("votes", {"prompt": "Why?", "response_1": "No.", "response_2": "Yes.", "winner": 2.0}, PLAIN),
    (
        "votes",
        {"prompt": "[1, 2]", "response_a": "[2, 1]", "response_b": "[1, 1]", "winner": "a"},
        ("[1, 2]", "[2, 1]", "[1, 1]"),
    ),
    (
        "votes",
        {"prompt": "Why?", "response_a": '["Yes."]', "response_b": '["No."]', "winner": "a"},
        ("Why?", '["Yes."]', '["No."]'),
    ),
    ("votes", {"prompt": '["Why?"]', "response_a": '["Yes."]', "response_b": '["No."]', "winner": "model_a"}, CHAT),
    ("AlpacaEval", {"instruction": "Why?", "output_1": "No.", "output_2": "Yes.", "preference": 2.0}, PLAIN),
    ("AlpacaEval", {"instruction": "Why?", "input": "", "output_1": "Yes.", "output_2": "No.", "preference": 1}, PLAIN),
    ("ranked answers", {"prompt": HH, "answers": objects("answer", "rank", 2, 1, 3)}, (HH, "Answer 1.", "Answer 3.")),
    (
        "ranked answers",
        {"instruction": "Why?", "completions": objects("response", "overall_score", 2, 9, 5), "models": ["a", "b"]},
        ("Why?", "Answer 9.", "Answer 2."),
    ),
    ("scored answers", {"prompt": "Why?", "responses": ["No.", "Yes.", "So."], "scores": [1, 9, 5]}, PLAIN),
    ("scored answers", {"instruction": "Why?", "generations": ["Yes.", "No."], "ratings": ["5", "2"]}, PLAIN),
    ("scored answers", {"instruction": "Why?", "output": ["No.", "Yes."], "scores": [1, 9]}, PLAIN),
]
BY_NAME = {form.name: form.flag for form in LAYOUTS if form.by_name}


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_a_row_of_a_published_layout_becomes_this_pair(name, row, expected):
    layout = match_layout([row] * 2, "test", form=BY_NAME.get(name))
    [pair] = layout.to_pairs(row)
    assert layout.name == name
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_the_rows_have_every_published_layout():
    names = {form.name for form in LAYOUTS}
    assert {name for name, _, _ in ROWS} >= {name for name in names if name not in TESTED_IN_FORMATS}
    assert len({form.flag for form in LAYOUTS}) == len(names) == len(LAYOUTS)


TESTED_IN_FORMATS = {"dpokit votes", "HH prompt", "UltraFeedback", "implicit, conversational", "HH transcript"} | {
    "implicit, plain"
}

ARENA = {
    "prompt": '["Why?", "So?"]',
    "response_a": '["Yes.", "Yes."]',
    "response_b": '["No.", "No."]',
    "winner_model_a": 1,
    "winner_model_b": 0,
}
# rows without a pair, and the reason
UNUSABLE = [
    (shp(1), {"labels": None}, "missing_label (labels is null)"),
    (steer(-2), {"preference_strength": 0}, "tie"),
    (steer(-2), {"response_2": ""}, "one_answer"),
    (pku(better_response_id=0), {"better_response_id": -1}, "tie"),
    ({"prompt": "Why?", **ANSWERS, "winner": "a"}, {"winner": "tie"}, "tie"),
    ({"prompt": "Why?", **ANSWERS, "winner": "a"}, {"winner": "tie (bothbad)"}, "both_bad"),
    ({"prompt": "Why?", **ANSWERS, "winner": "a"}, {"winner": "carol"}, "missing_label (winner is text)"),
    ({"instruction": "Why?", "output_1": "Yes.", "output_2": "No.", "preference": 1}, {"preference": 1.5}, "tie"),
    ({"instruction": "Why?", "output_1": "Yes.", "output_2": "No.", "preference": 1}, {"preference": 0}, "tie"),
    (
        {"instruction": "Why?", "output_1": "Yes.", "output_2": "No.", "preference": 1},
        {"preference": -1},
        "missing_label (preference is not from 1 to 2)",
    ),
    ({"prompt": "Why?", "responses": ["Yes.", "No."], "scores": [1, 9]}, {"scores": [3, 3]}, "tie"),
    (
        {"prompt": "Why?", "responses": ["Yes.", "No."], "scores": [1, 9]},
        {"scores": [float("nan"), 1]},
        "missing_label (scores is a number)",
    ),
    (ARENA, {"response_b": '["No."]'}, "missing_text (a list of questions has another number of answers)"),
    (ARENA, {"response_b": '["No." null]'}, "missing_text (a list of questions has another number of answers)"),
    (
        {"prompt": "Why?", "responses": ["Yes.", "No."], "scores": [1, 9]},
        {"scores": [3]},
        "missing_label (scores is a list with a number)",
    ),
    ({"chosen": ["Why?", "Yes."], "rejected": ["Why?", "No."]}, {"rejected": ["So?", "No."]}, "different_prompts"),
]


@pytest.mark.parametrize(("row", "changes", "reason"), UNUSABLE)
def test_a_row_without_a_preference_has_this_reason(row, changes, reason):
    [error] = match_layout([row] * 2, "test").to_pairs(row | changes)
    assert isinstance(error, UnusableError)
    assert str(error) == reason


GARBAGE = (None, 5, True, float("nan"), "", "x", [], [None], ["x"], [[1]], {}, {"role": 5}, [{"from": None}], b"x")


@pytest.mark.parametrize(("name", "row", "_"), ROWS)
def test_a_damaged_row_has_a_reason_instead_of_a_traceback(name, row, _):
    layout = match_layout([row] * 2, "test", form=BY_NAME.get(name))
    for column in row:
        for value in GARBAGE:
            assert layout.to_pairs(row | {column: value})


def test_odd_rows_of_an_arena_file_do_not_hide_its_layout():
    odd = [ARENA | {"response_b": '["No."]'}, ARENA | {"prompt": "Why?", **ANSWERS}]
    layout = match_layout([*odd, ARENA, ARENA, ARENA], "test")
    assert isinstance(layout.to_pairs(odd[0])[0], UnusableError)
    assert layout.to_pair(ARENA).prompt == [WHY]


# rows whose label has no certain meaning
UNSURE = {
    "a preference from 0": {"prompt": "Why?", **ANSWERS, "preference": 1},
    "a signed preference": {"prompt": "Why?", "response_1": "Yes.", "response_2": "No.", "preference": -3},
    "a number for the winner of A and B": {"prompt": "Why?", **ANSWERS, "winner": 1},
    "two outputs and their ranks": {"instruction": "Why?", "output": ["No.", "Yes."], "ranking": [2, 1]},
    "two outputs and the best one": {"prompt": "Why?", "output": ["No.", "Yes."], "best_id": 1},
    "a strength beside a label": steer(3) | {"preference": "response_1"},
}


@pytest.mark.parametrize("case", UNSURE)
def test_a_label_that_could_be_read_in_two_ways_is_an_error(case):
    with pytest.raises(DataError):
        match_layout([UNSURE[case]] * 2, "my.jsonl")


def test_labels_beside_a_layout_are_named_and_may_be_ignored():
    row = UNSURE["two outputs and the best one"]
    with pytest.raises(DataError, match="beside them best_id") as error:
        match_layout([row], "my.jsonl")
    assert "--ignore_columns best_id" in error.value.do
    for layout in (match_layout([row], "", ignored=["best_id"]), match_layout([row], "", form="llama_factory_v1")):
        assert layout.to_pair(row).chosen == "No."


FIVE = {"prompt": "Why?", "responses": ["a", "b", "c", "d", "e"], "scores": [1, 9, 5, 9, 4]}
# flags, the pairs of FIVE
CHOICES = {
    "best_worst": ([("b", "a")], 0.0),
    "adjacent": ([("b", "c"), ("d", "c"), ("c", "e"), ("e", "a")], 0.0),
    "all": (
        [("b", "c"), ("b", "e"), ("b", "a"), ("d", "c"), ("d", "e"), ("d", "a"), ("c", "e"), ("c", "a"), ("e", "a")],
        0.0,
    ),
    "all with a gap": ([("b", "e"), ("b", "a"), ("d", "e"), ("d", "a")], 4.5),
    "best_worst with a gap": ([("b", "a")], 8.0),
}


@pytest.mark.parametrize("case", CHOICES)
def test_several_answers_give_the_pairs_of_the_flags(case):
    pairs, gap = CHOICES[case]
    layout = match_layout([FIVE], "test", choice=PairChoice(case.partition(" ")[0], gap))
    assert [(pair.chosen, pair.rejected) for pair in layout.to_pairs(FIVE)] == pairs
    assert all(pair.prompt == "Why?" for pair in layout.to_pairs(FIVE))


def test_a_random_pair_is_the_same_in_each_run_and_varies_by_row():
    rows = [FIVE | {"responses": [f"{letter}{number}" for letter in "abcde"]} for number in range(40)]
    layout = match_layout(rows, "test", choice=PairChoice("random"))
    pairs = [(pair.chosen[0], pair.rejected[0]) for row in rows for pair in layout.to_pairs(row)]
    assert pairs == [(pair.chosen[0], pair.rejected[0]) for row in rows for pair in layout.to_pairs(row)]
    assert set(pairs) <= set(CHOICES["all"][0])
    assert len(set(pairs)) > 5


def test_a_gap_above_every_difference_drops_the_row():
    layout = match_layout([FIVE], "test", choice=PairChoice("all", 8.5))
    assert [str(error) for error in layout.to_pairs(FIVE)] == ["small_gap"]


@pytest.mark.parametrize("choice", [PairChoice("all"), PairChoice(min_score_gap=1.0)])
def test_flags_for_scores_are_an_error_where_no_scores_are(choice):
    with pytest.raises(DataError, match=r"--ranked .* has one pair in a row"):
        match_layout([{"prompt": "Why?", **TEXTS}], "my.jsonl", choice=choice)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "Why?", "completion": "Yes.", "label": True}, {"prompt": [WHY], "completion": [YES], "label": False}],
)
def test_unpaired_labels_say_that_they_are_unpaired(row):
    with pytest.raises(DataError, match=r"my\.jsonl has unpaired labels") as error:
        match_layout([row], "my.jsonl")
    assert "a good and a bad answer to the same prompt" in error.value.do


def test_the_flag_decides_where_two_layouts_fit():
    row = {"prompt": "Why?", **TEXTS, "responses": ["a", "b"], "scores": [1, 2]}
    assert match_layout([row], "test").name == "explicit, plain"
    assert match_layout([row], "test", form="scored_answers", ignored=["chosen", "rejected"]).to_pair(row).chosen == "b"


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


RANKED_ROWS = [
    {"prompt": f"Why {n}?", "responses": [f"a{n}", f"b{n}", f"c{n}"], "scores": [1, 2, 3 if n else 2]} for n in range(4)
] + [{"prompt": "Tie?", "responses": ["a", "b", "c"], "scores": [2, 2, 2]}]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_run_counts_each_pair_of_several_in_a_row(streaming, tmp_path, plain_tokenizer):
    name = write(tmp_path / "rows.jsonl", RANKED_ROWS)
    data = DataArguments(dataset_name=name, ranked="all", dataset_streaming=streaming)
    prepared = prepare_data(data, plain_tokenizer, max_length=None, with_eval=False)
    rows = list(prepared.train)
    assert sorted(row["row"] for row in rows) == [0, 0, *[1] * 3, *[2] * 3, *[3] * 3]
    counts = prepared.record()["train"]
    assert (counts["rows"], counts["kept"], counts["dropped"]) == (12, 11, {"tie": 1})
    texts = {tuple(plain_tokenizer.decode(row[f"{side}_ids"]) for side in ("chosen", "rejected")) for row in rows}
    end = plain_tokenizer.eos_token
    assert {(f" c3{end}", f" b3{end}"), (f" c3{end}", f" a3{end}"), (f" b3{end}", f" a3{end}")} <= texts


def test_all_pairs_of_a_prompt_are_on_one_side(tmp_path, plain_tokenizer):
    name = write(tmp_path / "rows.jsonl", RANKED_ROWS)
    data = DataArguments(dataset_name=name, ranked="all", eval_fraction=0.25)
    prepared = prepare_data(data, plain_tokenizer, max_length=None, with_eval=True)
    assert not {row["row"] for row in prepared.train} & {row["row"] for row in prepared.eval}
    held_out = prepare_held_out(data, plain_tokenizer, max_length=None)
    assert held_out.prompts == [f"Why {row['row']}?" for row in prepared.eval]


def test_one_pair_a_row_counts_rows(tmp_path, plain_tokenizer):
    data = DataArguments(dataset_name=write(tmp_path / "rows.jsonl", RANKED_ROWS))
    counts = prepare_data(data, plain_tokenizer, max_length=None, with_eval=False).record()["train"]
    assert (counts["rows"], counts["kept"], counts["dropped"]) == (5, 4, {"tie": 1})


def test_load_pairs_returns_every_pair(tmp_path, capsys):
    pairs = dpokit.load_pairs(write(tmp_path / "rows.jsonl", RANKED_ROWS), ranked="adjacent")
    expected = [{"prompt": "Why 0?", "chosen": chosen, "rejected": "a0", "margin": 1.0} for chosen in ("b0", "c0")]
    assert list(pairs)[:2] == expected
    assert len(pairs) == 8
    assert "(tie)" in capsys.readouterr().err


def test_objects_in_parquet_are_read_as_in_jsonl(tmp_path):
    rows = [{"instruction": f"Why {n}?", "completions": objects("response", "overall_score", 1, 2)} for n in range(3)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    names = [write(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.parquet")]
    pairs = [list(dpokit.load_pairs(name)) for name in names]
    assert pairs[0] == pairs[1]
    assert pairs[0][0] == {"prompt": "Why 0?", "chosen": "Answer 2.", "rejected": "Answer 1.", "margin": 1.0}


def test_a_margin_of_a_row_is_carried_through(tmp_path):
    values = [2.5, None, "high", 1, True, float("inf")]
    rows = [{"prompt": f"Why {n}?", "chosen": "a", "rejected": "b", "margin": value} for n, value in enumerate(values)]
    pairs = dpokit.load_pairs(write(tmp_path / "rows.jsonl", rows[:1] * 8 + rows[1:2] + rows[3:4]))
    assert pairs["margin"][:] == [2.5] * 8 + [None, 1.0]
    margins = [match_layout(rows, "rows").to_pair(row).margin for row in rows]
    assert margins == [2.5, None, None, 1.0, None, None]
    assert "margin" not in dpokit.load_pairs(write(tmp_path / "none.jsonl", rows[1:2])).column_names


def test_each_example_of_the_page_has_the_layout_of_its_heading():
    page = (ROOT / "docs" / "layouts.md").read_text()
    examples = re.findall(r"^### (\w+)\n.*?```json\n(.*?)```", page, re.M | re.S)
    assert sorted(flag for flag, _ in examples) == sorted(form.flag for form in LAYOUTS)
    for flag, lines in examples:
        rows = [json.loads(line) for line in lines.splitlines()]
        by_name = [form for form in LAYOUTS if form.by_name and form.flag == flag]
        layout = match_layout(rows, "docs/layouts.md", form=flag if by_name else None)
        assert [form.flag for form in LAYOUTS if form.name == layout.name] == [flag]
        assert [isinstance(pair, UnusableError) for row in rows for pair in layout.to_pairs(row)] == [False, False], (
            flag
        )


# The answers of the public rows differ only in these two texts.
GOOD, BAD = "Paris is the capital of France", ("I do not know that at all", "Paris is a town in Texas")


def test_public_column_sets_give_the_right_pairs(shared):
    files = sorted((shared / "field" / "layouts").glob("*.jsonl"))
    assert len(files) > 40
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        layout = match_layout(rows, path.name)
        for number, row in enumerate(rows):
            [pair] = layout.to_pairs(row)
            question = json.dumps(pair.prompt)
            assert f"What is the capital of France? ({number})" in question, path.name
            assert GOOD in str(pair.chosen) and not any(text in str(pair.chosen) for text in BAD), path.name
            assert any(text in str(pair.rejected) for text in BAD) and GOOD not in str(pair.rejected), path.name
            assert "pirate" not in json.dumps(row) or "pirate" in question, path.name
            assert "Let's think" not in json.dumps(row) or "Let's think" in question, path.name
