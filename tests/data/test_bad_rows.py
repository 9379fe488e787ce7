"""Rows that cannot be read are dropped and counted with --skip_bad_rows; values of other types are never made text."""

import json

import pytest

from dpokit.data.prepare import prepare_data
from dpokit.data.sources import load_splits
from dpokit.errors import DataError, SettingsError
from dpokit.settings.flags import DataArguments
from dpokit.settings.load import load_settings

BOTH_WAYS = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


def write(number: int, **changes) -> str:
    return json.dumps({"prompt": f"Number {number} is", "chosen": f" n{number}.", "rejected": " no."} | changes) + "\n"


GOOD = [write(number) for number in range(6)]
# name -> lines of a file; the third and the sixth row cannot be read
BAD_ROWS = {
    "broken.jsonl": [*GOOD[:2], '{"prompt": "The sk\n', *GOOD[3:5], "[1]\n", *GOOD[:1]],
    "latin.jsonl": [*GOOD[:2], write(2).replace("n2", "\udce9"), *GOOD[3:5], "\udce9\n", *GOOD[:1]],
    "deep.jsonl": [*GOOD[:2], '{"x": ' + "[" * 99 + "]" * 99 + "}\n", *GOOD[3:5], "{]\n", *GOOD[:1]],
    "wide.csv": [
        "prompt,chosen,rejected\n",
        *("a,b,c\n", '"d\ne",f,g\n', "h,i,j,k\n", "l,m,n\n", '"o,p",q,r\n', "s,t,u,v,w\n", "x,y,z\n"),
    ],
}


def prepare(file, tokenizer, *, streaming: bool, skip: bool = True):
    data = DataArguments(dataset_name=str(file), dataset_streaming=streaming, skip_bad_rows=skip)
    return prepare_data(data, tokenizer, max_length=None, with_eval=False)


@BOTH_WAYS
@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_dropped_counted_and_keep_their_numbers(name, streaming, tmp_path, plain_tokenizer, capsys):
    (tmp_path / name).write_text("".join(BAD_ROWS[name]), errors="surrogateescape")
    data = prepare(tmp_path / name, plain_tokenizer, streaming=streaming)
    assert sorted(row["row"] for row in data.train) == [0, 1, 3, 4, 6]
    assert data.tallies["train"].dropped == {"empty_row": 2}
    assert f"{name}: 2 of 7 rows cannot be read" in capsys.readouterr().err


def test_a_file_of_bad_rows_alone_is_refused(tmp_path, plain_tokenizer):
    (tmp_path / "bad.jsonl").write_text("x\n" * 5)
    with pytest.raises(DataError, match=r"bad\.jsonl: the file has no rows"):
        prepare(tmp_path / "bad.jsonl", plain_tokenizer, streaming=False)


@BOTH_WAYS
@pytest.mark.parametrize("value", [{"a": 1}, ["a"], 5, True], ids=str)
def test_a_late_value_of_another_type_does_not_become_text(value, streaming, tmp_path):
    """`datasets` finds the types in the first megabytes, and writes later values as text."""
    lines = [write(number, chosen=f" n{number}." + " yes" * 200) for number in range(15_000)]
    (tmp_path / "late.jsonl").write_text("".join(lines) + write(0, chosen=value) + GOOD[0])
    data = DataArguments(dataset_name=str(tmp_path / "late.jsonl"), dataset_streaming=streaming)
    from dpokit.data.source_rows import find_layout

    rows = load_splits(data.dataset_name, None, streaming=streaming)["train"]
    *_, late, last = rows
    assert late["chosen"] == value and isinstance(last["chosen"], str)
    assert find_layout(rows, "late").name == "explicit, plain"


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_an_answer_with_the_text_of_an_end_is_dropped(kind, tmp_path, plain_tokenizer, chat_tokenizer):
    tokenizer = plain_tokenizer if kind == "plain" else chat_tokenizer
    end = tokenizer.eos_token
    lines = [*GOOD, write(6, chosen=f" one{end} two"), write(7, rejected=f" three{end}")]
    (tmp_path / "ends.jsonl").write_text("".join(lines))
    data = prepare(tmp_path / "ends.jsonl", tokenizer, streaming=False)
    assert data.tallies["train"].dropped == {"end_inside_answer": 1}
    assert sorted(data.train["row"]) == [0, 1, 2, 3, 4, 5, 7]


def test_a_second_dataset_is_refused():
    """argparse would take the last one alone."""
    with pytest.raises(SettingsError, match="--dataset_name is given twice"):
        load_settings("x", {"output_dir": "unused"}, ["--dataset_name", "a.jsonl", "--dataset_name=b.jsonl"])
