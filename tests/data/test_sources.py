"""Loads rows from files and folders, whole and streamed; errors name the file and the reason."""

import gzip
import json
import re
from pathlib import Path

import pytest
from conftest import write_pairs
from datasets import Dataset, DatasetDict

from dpokit.data import check_file
from dpokit.data.prepare import prepare_data
from dpokit.data.sources import get_split, load_splits
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments

ROWS = [{"prompt": f"Number {i} is", "chosen": " é one.", "rejected": f" row {i}."} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
KINDS = ["jsonl", "json", "csv", "parquet"]
BOTH_WAYS = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


def write_rows(path: Path, kind: str) -> Path:
    """Writes the same rows as any kind of file, packed if the kind ends with .gz."""
    plain = path.with_suffix(f".{kind.removesuffix('.gz')}")
    if "jsonl" in kind:
        plain.write_text(LINES, encoding="utf-8")
    elif "json" in kind:
        plain.write_text(json.dumps(ROWS), encoding="utf-8")
    elif "csv" in kind:
        Dataset.from_list(ROWS).to_csv(plain)
    else:
        Dataset.from_list(ROWS).to_parquet(plain)
    if not kind.endswith(".gz"):
        return plain
    packed = plain.with_name(plain.name + ".gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    return packed


def read(path: Path | str, *, streaming: bool, split: str = "train") -> list[dict]:
    return list(load_splits(str(path), None, streaming=streaming)[split])


@BOTH_WAYS
@pytest.mark.parametrize("kind", [kind + end for kind in KINDS for end in ("", ".gz")])
def test_every_kind_of_file_gives_its_rows(kind, streaming, tmp_path):
    assert read(write_rows(tmp_path / "rows", kind), streaming=streaming) == ROWS


@BOTH_WAYS
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_has_the_splits_of_its_file_names(kind, streaming, tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / split, kind)
    assert set(load_splits(str(tmp_path), None, streaming=streaming)) == {"train", "test"}
    assert read(tmp_path, streaming=streaming, split="test") == ROWS


@BOTH_WAYS
def test_saved_datasets_with_and_without_splits_are_read(streaming, tmp_path):
    single, splits = tmp_path / "single", tmp_path / "splits"
    Dataset.from_list(ROWS).save_to_disk(single)
    DatasetDict(train=Dataset.from_list(ROWS), held=Dataset.from_list(ROWS[:2])).save_to_disk(splits)
    assert read(single, streaming=streaming) == ROWS
    assert read(splits, streaming=streaming, split="held") == ROWS[:2]


@BOTH_WAYS
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("windows.jsonl", LINES.replace("\n", "\r\n")),
        ("blank.jsonl", LINES.replace("\n", "\n\n")),
        ("no_newline.jsonl", LINES.rstrip("\n")),
        ("UPPER.JSONL", LINES),
        ("marked.jsonl", "\ufeff" + LINES),
    ],
)
def test_an_unusual_but_valid_file_gives_its_rows(name, text, streaming, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path / name, streaming=streaming) == ROWS


@BOTH_WAYS
@pytest.mark.parametrize("named", ["file", "folder"])
def test_na_none_and_null_are_answers_in_a_csv(named, streaming, tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("prompt,chosen,rejected\nIs it there?,NA,None\nIs it?,null,\n")
    rows = read(file if named == "file" else tmp_path, streaming=streaming)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("NA", "None"), ("null", None)]


@BOTH_WAYS
@pytest.mark.parametrize("block_bytes", [1, 7, 100])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", [None, "data"])
def test_a_list_is_read_in_blocks_of_any_size(key, indent, block_bytes, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(check_file, "BLOCK_BYTES", block_bytes)
    text = json.dumps(ROWS if key is None else {key: ROWS}, indent=indent, ensure_ascii=False)
    (tmp_path / "list.json").write_text(f"\ufeff{text} \n" + " " * block_bytes)  # another hash in each case
    assert read(tmp_path / "list.json", streaming=streaming) == ROWS


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("[{},\n{}", "line 2 is broken JSON: Expecting ',' delimiter"),
        ("[{},\n]", "line 2 is broken JSON: Expecting value"),
        ("[{}]\nx", "line 2 is broken JSON: Extra data"),
        ('[{},\n{"a": tru}]', "line 2 is broken JSON: Expecting value"),
        ("[{},\n5]", "line 2 has a row that is not an object of columns"),
        ('{"data": [{},\n{}], "version": 2}', "line 2 is broken JSON: a key follows the list of rows"),
        ('{"data": [{}]}\n{"data": [{}]}', "line 2 is broken JSON: Extra data"),
    ],
)
def test_a_broken_list_names_its_line_and_the_reason(text, seen, tmp_path):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(DataError, match=seen) as error:
        load_splits(str(tmp_path / "list.json"), None, streaming=False)
    assert "list.json" in error.value.seen


@BOTH_WAYS
def test_a_row_of_a_list_beyond_the_limit_is_refused(streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(check_file, "LINE_BYTES", 200)
    monkeypatch.setattr(check_file, "BLOCK_BYTES", 100)
    (tmp_path / "list.json").write_text(json.dumps([*ROWS, {"prompt": "x" * 500}]))
    with pytest.raises(DataError, match="longer than"):
        load_splits(str(tmp_path / "list.json"), None, streaming=streaming)


def test_a_tilde_is_expanded_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "rows", "jsonl")
    assert read("~/rows.jsonl", streaming=False) == ROWS


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
PARQUET_HEAD = b"PAR1 and no more"
# name, bytes, pattern of the message
BROKEN = [
    ("broken.jsonl", (LINES + '{"prompt": "The sk\n').encode(), "line 6 is broken JSON"),
    ("first.jsonl", b'{"prompt": \n' + LINES.encode(), "line 1 is broken JSON"),
    ("number.jsonl", (LINES + "5\n").encode(), "line 6 is not an object of columns"),
    ("cut_list.json", json.dumps(ROWS)[:-9].encode(), "cut_list.json"),
    ("cut.jsonl.gz", gzip.compress(LINES.encode() * 500)[:-20], "gzip data is cut off or broken after line"),
    ("cut.csv.gz", gzip.compress(b"prompt,chosen,rejected\n" + b"a,b,c\n" * 500)[:-12], "gzip data is cut off"),
    ("not_gzip.jsonl.gz", LINES.encode(), "not packed with gzip"),
    ("empty.jsonl", b"", "the file is empty"),
    ("empty.json", b"", "the file is empty"),
    ("empty.csv", b"", "the file is empty"),
    ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "the file is empty"),
    ("empty.csv.gz", gzip.compress(b"", mtime=0), "the file is empty"),
    ("empty.parquet", b"", "0 bytes"),
    ("latin.jsonl", LINES.encode("latin-1"), "line 1 is not UTF-8"),
    ("latin.csv", "prompt,chosen,rejected\na,é,b\n".encode("latin-1"), "line 2 is not UTF-8"),
    ("late_latin.jsonl", LINES.encode() + LINES.encode("latin-1"), "line 6 is not UTF-8"),
    ("windows.csv", "prompt,chosen,rejected\na,b,c\n".encode("utf-16"), "text in UTF-16"),
    ("ragged.csv", b"prompt,chosen,rejected\na,b,c\nd,e,f,g,h\n", "line 3 has 5 cells, and there are 3 columns"),
    ("broken.parquet", PARQUET_HEAD, "magic bytes"),
    ("pointer.jsonl", LFS_POINTER, "a Git LFS pointer"),
    ("pointer.csv", LFS_POINTER, "a Git LFS pointer"),
    ("pointer.parquet", LFS_POINTER, "a Git LFS pointer"),
    ("packed.jsonl", gzip.compress(LINES.encode(), mtime=0), "packed with gzip"),
    ("packed.parquet", gzip.compress(b"PAR1", mtime=0), "packed with gzip"),
    ("archive.jsonl", b"PK\x03\x04 and more", "a zip archive"),
    ("zstd.jsonl", b"(\xb5/\xfd and more", "packed with zstd"),
    ("page.jsonl", b"<!DOCTYPE html><html>", "a web page"),
    ("text.parquet", LINES.encode(), "not a Parquet file"),
    ("parquet.csv", PARQUET_HEAD, "a Parquet file"),
    (
        "three.jsonl",
        (LINES + "{\n" + LINES + "5\nx\n").encode(),
        r"3 of 13 rows cannot be read: line 6 .*; line 12 .*; line 13 ",
    ),
    ("many.jsonl", ("x\n" * 9 + LINES).encode(), "9 of 14 rows cannot be read: .*line 5 .*and 4 more"),
    ("deep.jsonl", (LINES + '{"x": ' + "[" * 60 + "]" * 60 + "}\n").encode(), "line 6 is nested too deeply"),
    ("deep_list.json", ('[{"x": ' + "[" * 60 + "]" * 60 + "}]").encode(), "line 1 is nested too deeply"),
    (
        "twice.jsonl",
        (LINES + '{"prompt": "a", "chosen": "b", "chosen": "c"}\n').encode(),
        "line 6 .* chosen is there twice",
    ),
    ("half.jsonl", (LINES + '{"prompt": "\\ud800", "chosen": "b"}\n').encode(), "line 6 .* half of a surrogate pair"),
    ("objects.jsonl", b"{}\n{}\n", "no rows"),
    ("twice.csv", b"prompt,chosen,chosen,rejected\na,b,x,c\n", "names the column chosen twice"),
    ("marks.csv", b"prompt;chosen;rejected\na;b;c\n", "separates columns with ';'"),
    ("pairs.txt", LINES.encode(), "file of an unknown kind"),
    ("pairs", LINES.encode(), "file of an unknown kind"),
    ("pairs.txt.gz", gzip.compress(LINES.encode(), mtime=0), "file of an unknown kind"),
    ("columns.jsonl", b'{"prompt": "a", "chosen": "b"}\n', 'its first row is {"prompt": "a", "chosen": "b"}'),
    ("header.csv", b"prompt,chosen,rejected\n", "no data|no rows"),
    ("list.json", b"[]", "no data|no rows"),
    ("blank.jsonl", b"\n\n", "no data|no rows"),
]


@BOTH_WAYS
@pytest.mark.parametrize(("name", "content", "seen"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_broken_file_is_reported_with_its_name_and_the_reason(
    name, content, seen, streaming, tmp_path, plain_tokenizer
):
    (tmp_path / name).write_bytes(content)
    data = DataArguments(dataset_name=str(tmp_path / name), dataset_streaming=streaming)
    with pytest.raises(DataError, match=seen) as error:
        prepare_data(data, plain_tokenizer, max_length=None, with_eval=False)
    assert name in error.value.seen
    assert error.value.do


@BOTH_WAYS
def test_a_parquet_file_without_rows_is_refused(streaming, tmp_path, plain_tokenizer):
    Dataset.from_list(ROWS).select([]).to_parquet(tmp_path / "none.parquet")
    data = DataArguments(dataset_name=str(tmp_path / "none.parquet"), dataset_streaming=streaming)
    with pytest.raises(DataError, match=r"no data|no rows"):
        prepare_data(data, plain_tokenizer, max_length=None, with_eval=False)


@BOTH_WAYS
@pytest.mark.parametrize("name", ["none.jsonl", "./none", "~/none", "/no/such/folder", "none.csv.gz"])
def test_a_missing_file_is_not_searched_on_the_hub(name, streaming):
    with pytest.raises(DataError, match="there is no such file") as error:
        load_splits(name, None, streaming=streaming)
    assert name in error.value.seen


@BOTH_WAYS
def test_an_unreachable_hub_dataset_is_named_with_its_flag(streaming):
    with pytest.raises(DataError, match="nobody/nothing could not be loaded from the Hub") as error:
        load_splits("nobody/nothing", None, streaming=streaming)
    assert "--dataset_config" in error.value.do


@pytest.mark.parametrize("name", [None, ""])
def test_a_missing_dataset_name_names_the_flag(name):
    with pytest.raises(DataError, match="no dataset was named") as error:
        load_splits(name, None, streaming=False)
    assert "--dataset_name" in error.value.do


@BOTH_WAYS
def test_a_folder_without_data_is_refused(streaming, tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(DataError, match="data files") as error:
        load_splits(str(tmp_path), None, streaming=streaming)
    assert str(tmp_path) in error.value.seen


@BOTH_WAYS
def test_a_broken_file_in_a_folder_is_named_with_its_line(streaming, tmp_path):
    write_pairs(tmp_path / "train.jsonl", 3)
    (tmp_path / "test.jsonl").write_text(LINES + '{"prompt": \n')
    with pytest.raises(DataError, match="line 6 is broken JSON") as error:
        load_splits(str(tmp_path), None, streaming=streaming)
    assert "test.jsonl" in error.value.seen


@BOTH_WAYS
def test_a_saved_folder_that_is_cut_off_is_refused(streaming, tmp_path):
    Dataset.from_list(ROWS * 100).save_to_disk(tmp_path)
    arrow = next(tmp_path.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as a dataset") as error:
        load_splits(str(tmp_path), None, streaming=streaming)
    assert str(tmp_path) in error.value.seen


@BOTH_WAYS
def test_files_of_one_folder_with_different_columns_are_refused(streaming, tmp_path, plain_tokenizer):
    write_pairs(tmp_path / "train.jsonl", 3)
    (tmp_path / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    data = DataArguments(dataset_name=str(tmp_path), dataset_streaming=streaming, max_eval_samples=5)
    with pytest.raises(DataError, match="question"):
        prepare_data(data, plain_tokenizer, max_length=None, with_eval=True)


@pytest.mark.parametrize("flag", ["dataset_train_split", "dataset_test_split"])
def test_a_missing_split_is_reported_with_the_flag(flag, tmp_path):
    splits = load_splits(str(write_rows(tmp_path / "rows", "jsonl")), None, streaming=False)
    with pytest.raises(DataError, match=re.escape("no split 'validation'; there is train")) as error:
        get_split(splits, "validation", flag)
    assert f"--{flag}" in error.value.do
    assert ("--eval_fraction" in error.value.do) == (flag == "dataset_test_split")


@pytest.mark.parametrize(
    ("names", "advised"),
    [(["test_prefs"], "NAME"), (["test", "train_prefs"], "train_prefs"), (["validation", "data"], "data")],
)
def test_nobody_is_advised_to_train_on_a_test_split(names, advised):
    with pytest.raises(DataError) as error:
        get_split(dict.fromkeys(names), "train", "dataset_train_split")
    assert error.value.do.endswith(f"--dataset_train_split {advised}")


@BOTH_WAYS
@pytest.mark.parametrize(
    ("line", "seen"), [(b'  {"prompt": "a" "chosen"},', "is broken JSON"), (b'  {"prompt": "\xe9"},', "is not UTF-8")]
)
def test_a_list_over_several_lines_names_its_broken_line(line, seen, streaming, tmp_path):
    lines = [b"[", *(json.dumps(row).encode() + b"," for row in ROWS), line, b"{}", b"]"]
    (tmp_path / "list.json").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=f"line 7 {seen}"):
        load_splits(str(tmp_path / "list.json"), None, streaming=streaming)


@BOTH_WAYS
def test_a_later_file_with_other_columns_is_refused(streaming, tmp_path, plain_tokenizer):
    write_pairs(tmp_path / "train-00000-of-00002.jsonl", 50)
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    data = DataArguments(dataset_name=str(tmp_path), dataset_streaming=streaming)
    with pytest.raises(DataError, match="question"):
        list(prepare_data(data, plain_tokenizer, max_length=None, with_eval=False).train)


SLICES = {
    "train[:60%]": [0, 1, 2],
    "train[60%:]": [3, 4],
    "train[1:3]": [1, 2],
    "train[-2:]": [3, 4],
    "train+train[:1]": [0, 1, 2, 3, 4, 0],
}


@pytest.mark.parametrize("split", SLICES)
def test_a_slice_of_a_split_has_its_rows(split, tmp_path):
    splits = load_splits(str(write_rows(tmp_path / "rows", "jsonl")), None, streaming=False)
    assert list(get_split(splits, split, "dataset_train_split")) == [ROWS[number] for number in SLICES[split]]


@pytest.mark.parametrize(
    ("split", "streaming", "seen", "do"),
    [
        ("train[:9", False, "Unrecognized instruction format", "correct --dataset_train_split"),
        ("test[:9]", False, "there is no split 'test[:9]'; there is train", "--dataset_train_split train"),
        ("train[:9]", True, "a stream has no slices", "--max_train_samples"),
    ],
)
def test_a_wrong_slice_is_an_error(split, streaming, seen, do, tmp_path):
    splits = load_splits(str(write_rows(tmp_path / "rows", "jsonl")), None, streaming=streaming)
    with pytest.raises(DataError) as error:
        get_split(splits, split, "dataset_train_split")
    assert seen in error.value.seen
    assert do in error.value.do


def test_slices_of_one_file_are_trained_and_evaluated_on(pairs_file, plain_tokenizer):
    data = DataArguments(
        dataset_name=str(pairs_file), dataset_train_split="train[:90%]", dataset_test_split="train[90%:]"
    )
    prepared = prepare_data(data, plain_tokenizer, max_length=None, with_eval=True)
    assert (len(prepared.train), len(prepared.eval)) == (36, 4)
