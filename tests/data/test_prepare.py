"""From files and folders to counted, tokenised splits; broken input names itself."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import write_pairs
from datasets import Dataset, DatasetDict, load_dataset

from dpokit.data.prepare import prepare_data
from dpokit.errors import DataError
from dpokit.settings import DataArguments

LINE = json.dumps({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}) + "\n"


def prepare(path: Path, tokenizer, *, with_eval: bool = False, max_length: int | None = None, **arguments):
    data = DataArguments(dataset_name=str(path), **arguments)
    return prepare_data(data, tokenizer, max_length=max_length, with_eval=with_eval)


def ids_of(rows) -> list[tuple]:
    return sorted((tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) for row in rows)


@pytest.mark.parametrize(
    "kind", ["json", "jsonl.gz", "json.gz", "csv", "csv.gz", "parquet", "folder", "saved", "stream"]
)
def test_every_kind_of_source_gives_the_same_pairs(kind, pairs_file, tmp_path, plain_tokenizer):
    expected = prepare(pairs_file, plain_tokenizer)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    path, arguments = tmp_path / f"other.{kind}", {}
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind in ("jsonl.gz", "json.gz"):
        path.write_bytes(gzip.compress(pairs_file.read_bytes()))
    elif kind == "csv":
        Dataset.from_list(rows).to_csv(path)
    elif kind == "csv.gz":
        Dataset.from_list(rows).to_csv(tmp_path / "plain.csv")
        path.write_bytes(gzip.compress((tmp_path / "plain.csv").read_bytes()))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "folder":
        path.mkdir()
        (path / "train.jsonl").write_bytes(pairs_file.read_bytes())
    elif kind == "saved":
        DatasetDict(train=Dataset.from_list(rows)).save_to_disk(path)
    else:
        path, arguments = pairs_file, {"dataset_streaming": True}
    assert ids_of(prepare(path, plain_tokenizer, **arguments).train) == ids_of(expected.train)


@pytest.mark.parametrize(
    ("name", "content", "seen"),
    [
        ("broken.jsonl", (LINE + '{"prompt": "The sk\n').encode(), "line 2 is broken JSON"),
        ("list.jsonl", (LINE + "[1, 2]\n").encode(), "line 2 is not an object"),
        ("cut.jsonl.gz", gzip.compress(LINE.encode() * 500)[:-20], "gzip data is cut off"),
        ("not_gzip.jsonl.gz", LINE.encode(), "gzip data is cut off or broken"),
        ("empty.jsonl", b"", "the file is empty"),
        ("empty.jsonl.gz", gzip.compress(b""), "the file is empty"),
        ("latin.jsonl", (LINE * 3).replace("blue", "bleuâtre").encode("latin-1"), "is not UTF-8"),
        ("latin.csv", "prompt,chosen,rejected\na,é,b\n".encode("latin-1"), "is not UTF-8"),
        ("pairs.txt", b"hello", "file of an unknown kind"),
        ("broken.parquet", b"PAR1 no more", "cannot be read"),
        ("columns.jsonl", b'{"prompt": "a", "chosen": "b"}\n', "no known form"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(name, content, seen, tmp_path, plain_tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=seen) as error:
        prepare(tmp_path / name, plain_tokenizer)
    assert name in str(error.value)


def test_a_missing_file_and_a_missing_set_are_named(tmp_path, plain_tokenizer):
    for name in (str(tmp_path / "none.jsonl"), "nobody/no-such-dataset"):
        with pytest.raises(DataError, match=Path(name).name):
            prepare(name, plain_tokenizer)


def test_a_missing_split_names_the_splits_there_are_and_a_way_out(pairs_file, plain_tokenizer):
    with pytest.raises(DataError, match="no split 'test'; there is train") as error:
        prepare(pairs_file, plain_tokenizer, with_eval=True)
    assert "--eval_fraction" in str(error.value)


def test_no_usable_row_is_an_error_with_the_reasons(tmp_path, plain_tokenizer):
    (tmp_path / "equal.jsonl").write_text(LINE.replace("green", "blue") * 5)
    with pytest.raises(DataError, match="5 equal_answers"):
        prepare(tmp_path / "equal.jsonl", plain_tokenizer)


def test_prompts_are_held_out_whole_and_always_the_same(tmp_path, plain_tokenizer):
    file = write_pairs(tmp_path / "pairs.jsonl", 30)
    file.write_text(file.read_text() + file.read_text().replace("Mix", "Stir"))  # each prompt twice
    first, again = (prepare(file, plain_tokenizer, with_eval=True, eval_fraction=0.2) for _ in range(2))
    train, held_out = ({tuple(ids) for ids in split["prompt_ids"]} for split in (first.train, first.eval))
    assert not train & held_out
    assert (len(first.train), len(first.eval)) == (48, 12)
    assert first.fingerprint == again.fingerprint
    record = first.record()
    assert (record["train"]["rows"], record["eval"]["rows"], record["findings"]) == (48, 12, [])


def test_held_out_pairs_whose_prompt_is_trained_on_are_reported(tmp_path, plain_tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        write_pairs(folder / f"{split}.jsonl", 6 if split == "test" else 4)
    findings = prepare(folder, plain_tokenizer, with_eval=True).findings
    assert findings == ["4 of 6 held-out pairs have a prompt that is also trained on"]


def test_the_first_rows_are_taken_where_fewer_are_asked_for(pairs_file, plain_tokenizer):
    assert prepare(pairs_file, plain_tokenizer, max_train_samples=5).train["row"] == [0, 1, 2, 3, 4]


def test_real_hh_rows_are_kept_but_for_five(shared, plain_tokenizer):
    data = prepare(shared / "data" / "hh-rlhf" / "harmless-base", plain_tokenizer, with_eval=True)
    record = data.record()
    assert record["train"]["format"] == "HH transcript"
    assert (record["train"]["rows"], record["train"]["kept"]) == (1500, 1495)
    assert record["train"]["dropped"] == {"different_prompts": 4, "empty_answer": 1}
    assert record["eval"]["rows"] == 300


def test_real_hh_rows_are_split_where_the_transcripts_are(shared, plain_tokenizer):
    folder = shared / "data" / "hh-rlhf" / "harmless-base"
    rows = load_dataset("json", data_files=str(folder / "test.jsonl.gz"), split="train")
    for row in prepare(folder / "test.jsonl.gz", plain_tokenizer).train:
        texts = [plain_tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]
        for side, answer in zip(("chosen", "rejected"), texts[1:], strict=True):
            assert texts[0] + answer == rows[row["row"]][side] + plain_tokenizer.eos_token
