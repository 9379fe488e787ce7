"""No column is ignored in silence: each is used, named by a flag, metadata that data.json lists, or an error."""

import json
from pathlib import Path

import pytest

import dpokit
from dpokit.data.layouts import match_layout
from dpokit.data.messages import UnusableError
from dpokit.data.prepare import prepare_data
from dpokit.errors import DataError, SettingsError
from dpokit.settings.flags import DataArguments, FlagParser, parse_columns

WHY = {"role": "user", "content": "Why?"}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
TEXTS = {"chosen": "I think Oslo.", "rejected": "I think Bergen."}
PLAIN = {"prompt": "Capital of Norway?", **TEXTS}
CHAT = {"prompt": [WHY], "chosen": [YES], "rejected": [NO]}
LONG = "A long text that says more than any label of a row would say."

# row, the columns that are an error
CONTENT = {
    "a persona": (PLAIN | {"persona": "Be brief."}, "persona"),
    "a second system text": (CHAT | {"system": "Be brief.", "system_prompt": "Be kind."}, "system_prompt"),
    "a question beside a prompt": (PLAIN | {"question": "Capital?"}, "question"),
    "a prompt beside whole transcripts": (
        {
            "prompt": "Capital?",
            "chosen": "\n\nHuman: Oslo?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Oslo?\n\nAssistant: No.",
        },
        "prompt",
    ),
    "an input": (PLAIN | {"input": ""}, "input"),
    "images": (CHAT | {"images": ["cat.png"]}, "images"),
    "an image's file": (PLAIN | {"imageFile": "cat.png"}, "imageFile"),
    "an image's URL": (PLAIN | {"image_url": "https://a/b.png"}, "image_url"),
    "an image's path": (PLAIN | {"image_path": "cat.png"}, "image_path"),
    "messages of another conversation": (CHAT | {"messages": [WHY, NO]}, "messages"),
    "functions": (CHAT | {"functions": "[]"}, "functions"),
    "a history": (PLAIN | {"history": ["Hi."]}, "history"),
    "a long text of an unknown name": (PLAIN | {"beispiel": LONG}, "beispiel"),
    "a long text in a list": (PLAIN | {"beispiele": [LONG]}, "beispiele"),
    "messages of an unknown name": (PLAIN | {"verlauf": [WHY]}, "verlauf"),
    "camel case": (PLAIN | {"userQuestion": "Capital?"}, "userQuestion"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_a_column_of_content_is_an_error_that_names_it(case):
    row, names = CONTENT[case]
    with pytest.raises(DataError) as error:
        match_layout([row] * 2, "my.jsonl")
    assert error.value.seen.startswith("my.jsonl has columns that look like content")
    assert error.value.seen.endswith(f": {names}")
    assert f"--ignore_columns {names.replace(', ', ',')}" in error.value.do


@pytest.mark.parametrize(
    ("row", "flag"),
    [
        (PLAIN | {"persona": "Be brief."}, "--columns system=persona;"),
        (PLAIN | {"context": "Norway."}, "--columns prompt=prompt+context;"),
        (PLAIN | {"history": ["Norway."]}, "do this:   to leave them out: --ignore_columns history"),
        (CHAT | {"functions": "[]"}, "--columns tools=functions;"),
        (CHAT | {"images": ["cat.png"]}, "do this:   to leave them out: --ignore_columns images"),
    ],
)
def test_the_error_names_the_flag_that_uses_the_column(row, flag):
    with pytest.raises(DataError) as error:
        match_layout([row], "my.jsonl")
    assert flag in str(error.value)


METADATA = (
    ("id", 7),
    ("prompt_id", "a b c d e f g h"),
    ("source", LONG),
    ("messages_id", None),
    ("score_chosen", 8.0),
    ("chosen_rating", 5.0),
    ("questionType", "open"),
    ("meta", {"remark": LONG}),
    ("blind", True),
    ("num_messages", 3),
    ("url", "https://a/b"),
    ("image_id", "a"),
    ("prompt_style", "short"),
    ("empty", None),
    ("nothing", []),
    ("thema", "travel"),
)


@pytest.mark.parametrize(("name", "value"), METADATA, ids=[name for name, _ in METADATA])
@pytest.mark.parametrize("row", [PLAIN, CHAT], ids=["texts", "messages"])
def test_metadata_is_no_error(row, name, value):
    assert match_layout([row | {name: value}], "my.jsonl").unused == (name,)


REPEATS = {
    "the prompt": PLAIN | {"question": PLAIN["prompt"]},
    "an answer": PLAIN | {"output": PLAIN["chosen"]},
    "both answers": PLAIN | {"generations": [TEXTS["rejected"], TEXTS["chosen"]]},
    "a conversation": {"prompt": "Why?", "chosen": [WHY, YES], "rejected": [WHY, NO], "messages": [WHY, YES]},
}


@pytest.mark.parametrize("case", REPEATS)
def test_a_column_that_repeats_the_pair_is_no_error(case):
    row = REPEATS[case]
    assert match_layout([row] * 2, "my.jsonl").unused == tuple(row)[3:]
    with pytest.raises(DataError, match="look like content"):
        match_layout([row, row | {tuple(row)[3]: LONG}], "my.jsonl")


# --columns, row, expected prompt, chosen, rejected
ORCA = {"system": "Be brief.", "question": "Capital of Norway?", **TEXTS}
MAPPED = [
    (
        {"system": "system", "prompt": "question"},
        ORCA,
        ([SYSTEM, {"role": "user", "content": "Capital of Norway?"}], *TEXTS.values()),
    ),
    ({"system": "system"}, CHAT | {"system": "Be brief."}, ([SYSTEM, WHY], "Yes.", "No.")),
    ({"system": "system"}, CHAT | {"system": ""}, ([WHY], "Yes.", "No.")),
    ({"system": "system"}, CHAT | {"system": None}, ([WHY], "Yes.", "No.")),
    ({"system": "system"}, CHAT | {"prompt": [SYSTEM, WHY], "system": "Be brief."}, ([SYSTEM, WHY], "Yes.", "No.")),
    ({"prompt": "query"}, TEXTS | {"query": "Capital?"}, ("Capital?", *TEXTS.values())),
    (
        {"prompt": "question.full_text", "chosen": "a0", "rejected": "a1"},
        {"question": {"full_text": "Why?", "dataset": "x"}, "a0": "Yes.", "a1": "No."},
        ("Why?", "Yes.", "No."),
    ),
    (
        {"prompt": "question+context.text"},
        TEXTS | {"question": "Capital?", "context": {"text": "Norway."}},
        ("Capital?\n\nNorway.", *TEXTS.values()),
    ),
    (
        {"prompt": "question+context"},
        TEXTS | {"question": "Capital?", "context": ""},
        ("Capital?", *TEXTS.values()),
    ),
    ({"prompt": "a+b"}, TEXTS | {"a+b": "Capital?", "c": 1}, ("Capital?", *TEXTS.values())),
    (
        {"prompt": "input.messages", "chosen": "good", "rejected": "bad"},
        {"input": {"messages": [WHY]}, "good": [YES], "bad": [NO]},
        ([WHY], "Yes.", "No."),
    ),
    (
        {"chosen": "a.b", "rejected": "a.c"},
        {"prompt": "Why?", "a.b": "Yes.", "a.c": "No."},
        ("Why?", "Yes.", "No."),
    ),
]


@pytest.mark.parametrize(("columns", "row", "expected"), MAPPED)
def test_named_columns_become_the_pair(columns, row, expected):
    pair = match_layout([row], "my.jsonl", columns).to_pair(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_tools_of_another_name_are_read():
    row = CHAT | {"functions": '[{"name": "f"}]'}
    assert match_layout([row], "my.jsonl", {"tools": "functions"}).to_pair(row).tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": [{**SYSTEM, "content": "Be long."}, WHY]}, "second_system_turn"),
        ({"system": ["Be brief."]}, r"missing_text \(system is a list with text\)"),
    ],
)
def test_a_system_text_that_cannot_be_used_drops_the_row(changes, reason):
    row = CHAT | {"system": "Be brief."}
    layout = match_layout([row], "my.jsonl", {"system": "system"})
    with pytest.raises(Exception, match=f"^{reason}$"):
        layout.to_pair(row | changes)


def test_a_system_text_beside_a_rendered_prompt_drops_the_row():
    rows = [PLAIN | {"system": text, "prompt": "<|im_start|>user\nWhy?<|im_end|>\n"} for text in ("Be brief.", "")]
    layout = match_layout(rows, "my.jsonl")
    with pytest.raises(UnusableError, match="rendered_prompt"):
        layout.to_pair(rows[0])


def test_a_column_of_a_mapped_name_is_still_checked():
    with pytest.raises(DataError, match="does not use: prompt"):
        match_layout([PLAIN | {"question": "Capital?"}], "my.jsonl", {"prompt": "question"})


@pytest.mark.parametrize(
    ("columns", "listed"),
    [
        ({"prompt": "questoin"}, "system, question, chosen, rejected"),
        ({"prompt": "question+contxt"}, "system, question, chosen, rejected"),
        ({"prompt": "system.text"}, "system, question"),
    ],
)
def test_a_named_column_that_is_missing_is_an_error(columns, listed):
    with pytest.raises(DataError, match="has no column") as error:
        match_layout([ORCA], "my.jsonl", columns)
    assert listed in error.value.expected


def test_a_missing_key_of_an_object_lists_its_keys():
    row = {"question": {"text": "Why?", "id": 3}, "chosen": "Yes.", "rejected": "No."}
    with pytest.raises(DataError) as error:
        match_layout([row], "my.jsonl", {"prompt": "question.body"})
    assert error.value.expected == "one of question.text, question.id"


WRONG_FLAGS = {
    "no sign": (["prompt"], "'prompt', which is not NAME=COLUMN"),
    "no column": (["prompt="], "'prompt=', which is not NAME=COLUMN"),
    "an unknown name": (["question=prompt"], "the name 'question'"),
    "a name twice": (["prompt=a", "prompt=b"], "prompt twice"),
    "a column twice": (["chosen=a,rejected=a"], "a twice"),
    "an empty item": (["prompt=a,,chosen=b"], "an empty item"),
    "broken JSON": (['{"prompt": '], "which is not NAME=COLUMN"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_a_wrong_value_of_the_flag_is_an_error(case):
    values, seen = WRONG_FLAGS[case]
    with pytest.raises(SettingsError, match="--columns") as error:
        DataArguments(dataset_name="x", columns=values)
    assert seen in error.value.seen


@pytest.mark.parametrize(
    "argv",
    [
        ["--columns", "prompt=question,chosen=best.text"],
        ["--columns", "prompt=question", "chosen=best.text"],
        ["--columns", '{"prompt": "question", "chosen": "best.text"}'],
        {"columns": {"prompt": "question", "chosen": "best.text"}},
        {"columns": ["prompt=question", "chosen=best.text"]},
    ],
    ids=str,
)
def test_the_flag_has_one_value_however_it_is_written(argv):
    parser = FlagParser()
    values = parser.parse_mapping(argv, "a file") if isinstance(argv, dict) else parser.parse_layer(argv, "a call")
    data = DataArguments(dataset_name="x", **values)
    assert data.columns == ["prompt=question", "chosen=best.text"]
    assert parse_columns(data.columns) == {"prompt": "question", "chosen": "best.text"}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_run_uses_and_ignores_the_named_columns(streaming, tmp_path, chat_tokenizer):
    rows = [ORCA | {"images": ["a.png"], "id": n, "question": f"Capital {n}?"} for n in range(3)]
    data = DataArguments(
        dataset_name=write(tmp_path / "rows.jsonl", rows),
        dataset_streaming=streaming,
        columns=["system=system,prompt=question"],
        ignore_columns=["images"],
    )
    prepared = prepare_data(data, chat_tokenizer, max_length=None, with_eval=False)
    texts = sorted(chat_tokenizer.decode(row["prompt_ids"]) for row in prepared.train)
    assert len(texts) == 3
    assert "Be brief." in texts[0]
    assert "Capital 0?" in texts[0]
    assert prepared.record()["unused_columns"] == ["id"]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_an_ignored_column_that_is_missing_is_an_error(streaming, tmp_path, plain_tokenizer):
    data = DataArguments(
        dataset_name=write(tmp_path / "rows.jsonl", [PLAIN]), ignore_columns=["image"], dataset_streaming=streaming
    )
    with pytest.raises(DataError, match="--ignore_columns image") as error:
        prepare_data(data, plain_tokenizer, max_length=None, with_eval=False)
    assert "prompt, chosen, rejected" in error.value.expected


def test_pairs_with_tools_are_read_and_written_back(tmp_path):
    row = CHAT | {"tools": [{"name": "f"}], "chosen": [{**YES, "reasoning_content": "Hm."}]}
    pairs = dpokit.load_pairs(write(tmp_path / "rows.jsonl", [row]))
    assert list(pairs) == [row | {"chat_template_kwargs": None}]
    pairs.to_json(tmp_path / "again.jsonl")
    assert list(dpokit.load_pairs(str(tmp_path / "again.jsonl"))) == list(pairs)


def test_load_pairs_takes_the_columns_as_a_mapping(tmp_path):
    name = write(tmp_path / "rows.jsonl", [ORCA])
    pairs = dpokit.load_pairs(name, columns={"prompt": "question"}, ignore_columns=["system"])
    assert list(pairs) == [PLAIN]


LONG_QUESTION = "Which animal sleeps on the sofa in the morning?"
ANSWERS = {"chosen": "The dog sleeps.", "rejected": "The cat sleeps."}


@pytest.mark.parametrize("name", ["source", "user", "task", "topic", "info", "comment", "title", "text", "sentence"])
def test_a_question_of_any_name_beside_two_texts_is_an_error(name):
    with pytest.raises(DataError, match="but no prompt") as error:
        match_layout([ANSWERS | {name: LONG_QUESTION}], "my.jsonl")
    assert f"--columns prompt={name}" in error.value.do
    mapped = match_layout([ANSWERS | {name: LONG_QUESTION}], "my.jsonl", {"prompt": name})
    assert mapped.to_pair(ANSWERS | {name: LONG_QUESTION}).prompt == LONG_QUESTION


NESTED = {"input": {"messages": CHAT["prompt"], "functions": [{"name": "f"}], "id": 1}, "good": "Yes.", "bad": "No."}


def test_the_keys_beside_a_dotted_path_are_columns_too():
    columns = {"prompt": "input.messages", "chosen": "good", "rejected": "bad"}
    with pytest.raises(DataError, match=r"input\.functions") as error:
        match_layout([NESTED], "my.jsonl", columns)
    assert "--columns tools=input.functions" in error.value.do
    assert match_layout([NESTED], "my.jsonl", columns | {"tools": "input.functions"}).unused == ("input.id",)
    assert match_layout([NESTED], "my.jsonl", columns, ignored=["input.functions"]).unused == ("input.id",)


def test_a_key_of_an_object_can_be_ignored(tmp_path):
    name = write(tmp_path / "rows.jsonl", [NESTED, NESTED])
    columns = {"prompt": "input.messages", "chosen": "good", "rejected": "bad"}
    pairs = dpokit.load_pairs(name, columns=columns, ignore_columns=["input.functions"])
    assert pairs[0]["prompt"] == CHAT["prompt"]
    with pytest.raises(DataError, match="has no such column"):
        dpokit.load_pairs(name, columns=columns, ignore_columns=["inputs.tools"])
