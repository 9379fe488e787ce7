"""Files and folders become counted, tokenised splits; an error names the broken input."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import write_pairs
from datasets import Dataset, DatasetDict, load_dataset
from test_tokens import EXPECTED, FLAGS, encode
from transformers import AutoTokenizer

from dpokit.data import source_rows, tokens
from dpokit.data.columns import IDS, MASKS
from dpokit.data.prepare import prepare_data, prepare_held_out
from dpokit.data.tally import MOST_DETAILS, Tally, print_report
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments

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
        ("not_gzip.jsonl.gz", LINE.encode(), "not packed with gzip"),
        ("empty.jsonl", b"", "the file is empty"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "the file is empty"),
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


WRAPPED = [json.loads(LINE)] * 3
# content of a file that begins as a list of rows under a key, further flags, and the number of pairs; or an error
WRAPPERS = {
    "a list under a key": (json.dumps({"data": WRAPPED}), {}, 3),
    "in several lines": (json.dumps({"data": WRAPPED}, indent=2) + "\n", {}, 3),
    "a column of messages": (
        "".join(
            json.dumps({"data": [{"role": "user", "content": f"Why {n}?"}], "chosen": "a", "rejected": "b"}) + "\n"
            for n in range(2)
        ),
        {"columns": ["prompt=data"]},
        2,
    ),
    "two splits": (json.dumps({"train": WRAPPED, "test": WRAPPED}), {}, "whose train is a list of 3 objects"),
    "a key behind it": (json.dumps({"data": WRAPPED, "version": "1"}), {}, "whose data is a list of 3 objects"),
    "broken JSON": (json.dumps({"data": WRAPPED})[:-30] + "}", {}, "line 1 is broken JSON"),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_a_list_is_the_rows_only_if_nothing_follows_it(case, tmp_path, plain_tokenizer):
    content, flags, expected = WRAPPERS[case]
    (tmp_path / "rows.json").write_text(content)
    if isinstance(expected, int):
        assert len(prepare(tmp_path / "rows.json", plain_tokenizer, **flags).train) == expected
        return
    with pytest.raises(DataError, match=expected):
        prepare(tmp_path / "rows.json", plain_tokenizer, **flags)


def test_a_missing_file_or_dataset_is_named(tmp_path, plain_tokenizer):
    for name in (str(tmp_path / "none.jsonl"), "nobody/no-such-dataset"):
        with pytest.raises(DataError, match=Path(name).name):
            prepare(name, plain_tokenizer)


def test_a_missing_split_is_reported_with_the_existing_ones(pairs_file, plain_tokenizer):
    with pytest.raises(DataError, match="no split 'test'; there is train") as error:
        prepare(pairs_file, plain_tokenizer, with_eval=True)
    assert "--eval_fraction" in str(error.value)


@pytest.mark.parametrize("split", ["train[100:200]", "train[:0]", "train[5:5]"])
def test_a_slice_without_rows_is_an_error_with_the_sizes(split, pairs_file, plain_tokenizer):
    with pytest.raises(DataError, match=r"this slice has no row: train has 40 rows") as error:
        prepare(pairs_file, plain_tokenizer, dataset_train_split=split)
    assert error.value.do == "correct --dataset_train_split"


def test_a_first_pair_without_an_answer_stops_no_evaluation(tmp_path, plain_tokenizer):
    lists = {"prompt": "Why?", "answers": [{"answer": 4, "rank": 1}] + [{"answer": f"a{n}", "rank": n} for n in (2, 3)]}
    rows = [lists, *({**lists, "answers": lists["answers"][1:]} for _ in range(2))]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArguments(dataset_name=str(tmp_path), ranked="all")
    held_out = prepare_held_out(data, plain_tokenizer, max_length=None)
    assert (held_out.prompts, held_out.pairs["row"][:]) == (["Why?"] * 3, [0, 1, 2])


def test_no_usable_row_is_an_error_with_the_reasons(tmp_path, plain_tokenizer):
    (tmp_path / "equal.jsonl").write_text(LINE.replace("green", "blue") * 5)
    with pytest.raises(DataError, match="5 equal_answers"):
        prepare(tmp_path / "equal.jsonl", plain_tokenizer)


def test_without_evaluations_held_out_prompts_stay_untrained(tmp_path, plain_tokenizer):
    file = write_pairs(tmp_path / "pairs.jsonl", 30)
    evaluated = prepare(file, plain_tokenizer, with_eval=True, eval_fraction=0.2)
    other = prepare(file, plain_tokenizer, with_eval=False, eval_fraction=0.2)
    assert other.eval is None
    assert other.train["prompt_ids"] == evaluated.train["prompt_ids"]
    assert (len(other.train), other.record()["eval"]["rows"]) == (24, 6)


def test_the_same_whole_prompts_are_always_held_out(tmp_path, plain_tokenizer):
    file = write_pairs(tmp_path / "pairs.jsonl", 30)
    file.write_text(file.read_text() + file.read_text().replace("Mix", "Stir"))  # each prompt has two pairs
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


def test_max_train_samples_takes_the_first_rows(pairs_file, plain_tokenizer):
    assert prepare(pairs_file, plain_tokenizer, max_train_samples=5).train["row"] == [0, 1, 2, 3, 4]


def test_all_but_five_real_hh_rows_are_kept(shared, plain_tokenizer):
    data = prepare(shared / "data" / "hh-rlhf" / "harmless-base", plain_tokenizer, with_eval=True)
    record = data.record()
    assert record["train"]["format"] == "HH transcript"
    assert (record["train"]["rows"], record["train"]["kept"]) == (1500, 1495)
    assert record["train"]["dropped"] == {"different_prompts": 4, "empty_answer": 1}
    assert record["eval"]["rows"] == 300


def test_real_hh_rows_decode_to_their_transcripts(shared, plain_tokenizer):
    folder = shared / "data" / "hh-rlhf" / "harmless-base"
    rows = load_dataset("json", data_files=str(folder / "test.jsonl.gz"), split="train")
    for row in prepare(folder / "test.jsonl.gz", plain_tokenizer).train:
        texts = [plain_tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]
        for side, answer in zip(("chosen", "rejected"), texts[1:], strict=True):
            assert texts[0] + answer == rows[row["row"]][side] + plain_tokenizer.eos_token


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", EXPECTED)
def test_every_layout_in_a_file_has_the_ids_of_a_single_row(name, streaming, tmp_path, chat_tokenizer):
    row = EXPECTED[name][0]
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    data = prepare(tmp_path / "rows.jsonl", chat_tokenizer, dataset_streaming=streaming, format=FLAGS[name])
    encoded = encode(chat_tokenizer, row, form=FLAGS[name])
    assert data.record()["train"]["format"] == name
    expected = tuple(tuple(encoded[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
    assert ids_of(data.train) == [expected] * 3


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_columns_with_the_names_of_prepared_ones_are_ignored(streaming, tmp_path, plain_tokenizer):
    row = {**json.loads(LINE), "row": "first", "dropped": "yes", "cut": 3, "prompt_ids": [1]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    rows = list(prepare(tmp_path / "rows.jsonl", plain_tokenizer, dataset_streaming=streaming).train)
    assert sorted(row["row"] for row in rows) == [0, 1]
    assert plain_tokenizer.decode(rows[0]["prompt_ids"]) == "\n\nHuman: The sky is\n\nAssistant:"
    assert set(rows[0]) == {*IDS, *MASKS, "row"}


def write_mixed(path: Path) -> Path:
    """Writes 12 rows in mixed order: 2 without an answer, 1 with equal answers, 9 usable rows."""
    write_pairs(path, 9)
    usable = path.read_text().splitlines()
    empty = json.dumps({"prompt": "The sky is", "chosen": " ", "rejected": " green."})
    path.write_text("\n".join([empty, *usable[:4], LINE.replace("green", "blue").strip(), *usable[4:], empty]) + "\n")
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_every_row_is_kept_or_dropped_with_a_reason(streaming, tmp_path, plain_tokenizer):
    data = prepare(write_mixed(tmp_path / "rows.jsonl"), plain_tokenizer, dataset_streaming=streaming, max_length=20)
    for _ in range(2):  # a second epoch of a stream counts nothing twice
        assert len(list(data.train)) == 9
        record = data.record()
        json.dumps(record, allow_nan=False)
        assert (record["train"]["rows"], record["train"]["kept"]) == (12, 9)
        assert record["train"]["dropped"] == {"empty_answer": 2, "equal_answers": 1}
        assert record["train"]["shortened"]["prompt"] == 9
        assert record["eval"] is None
    assert (data.fingerprint is None) == streaming


def test_a_stream_of_several_files_counts_every_row_once(tmp_path, plain_tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        write_mixed(folder / f"train-{i:05d}-of-00003.jsonl")
    whole, stream = (prepare(folder, plain_tokenizer, dataset_streaming=streaming) for streaming in (False, True))
    rows = list(stream.train)
    assert ids_of(rows) == ids_of(whole.train)
    counts = ("rows", "kept", "dropped")
    assert [stream.record()["train"][name] for name in counts] == [whole.record()["train"][name] for name in counts]


def test_a_stream_is_shuffled_by_its_seed(pairs_file, plain_tokenizer):
    data = DataArguments(dataset_name=str(pairs_file), dataset_streaming=True)
    orders = []
    for seed in (0, 0, 1):
        rows = prepare_data(data, plain_tokenizer, max_length=None, with_eval=False, seed=seed).train
        orders.append([row["row"] for row in rows])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == list(range(40))


def test_a_streamed_evaluation_split_ends_at_max_eval_samples(tmp_path, plain_tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        write_pairs(folder / f"{split}.jsonl", 12)
    data = prepare(
        folder, plain_tokenizer, with_eval=True, dataset_streaming=True, max_eval_samples=5, max_train_samples=7
    )
    assert len(list(data.train)) == 7
    assert data.eval["row"] == [0, 1, 2, 3, 4]
    assert (data.record()["train"]["rows"], data.record()["eval"]["rows"]) == (7, 5)


def test_no_usable_row_in_a_stream_is_an_error_with_the_reasons(tmp_path, plain_tokenizer):
    (tmp_path / "equal.jsonl").write_text(LINE.replace("green", "blue") * 300)
    with pytest.raises(DataError, match="300 equal_answers"):
        prepare(tmp_path / "equal.jsonl", plain_tokenizer, dataset_streaming=True)


# changes of a row that make it unusable, the counted reason, and a part of the advice
NOTHING_LEFT = {
    "equal answers": ({"rejected": " blue."}, "equal_answers", "two different answers"),
    "an unknown role": (
        {"prompt": [{"role": "narrator", "content": "Once."}]},
        "unknown_role (narrator)",
        "write one of the roles user, human, prompter, assistant",
    ),
    "an image": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "missing_text (prompt has a part of type image)",
        "the text of each message",
    ),
    "a question as answer": (
        {
            "prompt": [],
            "chosen": [{"role": "user", "content": "Blue?"}],
            "rejected": [{"role": "user", "content": "?"}],
        },
        "no_answer_turn (user)",
        "end each conversation with the assistant's message",
    ),
    "a broken schema": ({"tools": "[{"}, "bad_json (tools)", "--ignore_columns"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", NOTHING_LEFT)
def test_the_reason_decides_the_advice(case, streaming, tmp_path, plain_tokenizer):
    changes, reason, advice = NOTHING_LEFT[case]
    row = {**json.loads(LINE), **changes}
    row = {name: value for name, value in row.items() if value != []}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "rows.jsonl", plain_tokenizer, dataset_streaming=streaming)
    assert f"3 {reason}" in error.value.seen
    assert advice in error.value.do
    assert "max_length" not in error.value.do


def test_many_details_of_a_reason_are_counted_together():
    tally = Tally("rows", "explicit, plain")
    for number in range(100):
        tally.add(f"unknown_role (role {number % 50})")
    assert len(tally.dropped) == MOST_DETAILS + 1
    assert tally.dropped["unknown_role (role 0)"] == 2
    assert tally.dropped["unknown_role"] == 100 - 2 * MOST_DETAILS
    assert (tally.rows, tally.kept) == (100, 0)


def test_limits_that_leave_no_tokens_name_the_flags(pairs_file, plain_tokenizer):
    with pytest.raises(DataError, match="40 no_room") as error:
        prepare(pairs_file, plain_tokenizer, max_length=1)
    assert "--max_length" in error.value.do


def test_the_fingerprint_depends_on_ids_and_not_on_the_file(pairs_file, tmp_path, plain_tokenizer):
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    Dataset.from_list(rows).to_csv(tmp_path / "other.csv")
    (tmp_path / "copy.jsonl").write_bytes(pairs_file.read_bytes())
    (tmp_path / "changed.jsonl").write_text(pairs_file.read_text().replace("flour", "sand", 1))
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed(pairs_file.read_text().splitlines())) + "\n")
    first = prepare(pairs_file, plain_tokenizer).fingerprint
    assert first == prepare(tmp_path / "copy.jsonl", plain_tokenizer).fingerprint
    assert first == prepare(tmp_path / "other.csv", plain_tokenizer).fingerprint
    others = [prepare(tmp_path / name, plain_tokenizer).fingerprint for name in ("changed.jsonl", "reversed.jsonl")]
    others.append(prepare(pairs_file, plain_tokenizer, max_length=20).fingerprint)
    others.append(prepare(pairs_file, plain_tokenizer, with_eval=True, eval_fraction=0.1).fingerprint)
    assert len({first, *others}) == 5


def test_several_processes_give_the_same_fingerprint(pairs_file, plain_tokenizer):
    data = DataArguments(dataset_name=str(pairs_file))
    single, double = (
        prepare_data(data, plain_tokenizer, max_length=None, with_eval=False, processes=n).fingerprint for n in (1, 2)
    )
    assert single == double


def test_rows_that_other_code_has_encoded_are_encoded_again(pairs_file, plain_tokenizer, monkeypatch, capsys):
    logs = []
    for other_version in ("", "", "9.9"):
        with monkeypatch.context() as patched:
            if other_version:
                patched.setattr(tokens, "version", lambda _: "9.9")
            tokens.hash_code.cache_clear()
            prepare(pairs_file, plain_tokenizer)
        logs.append("rows/s" in capsys.readouterr().err)
    tokens.hash_code.cache_clear()
    assert logs == [True, False, True]


def test_held_out_prompts_do_not_depend_on_the_order_of_rows(pairs_file, tmp_path, plain_tokenizer):
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed(pairs_file.read_text().splitlines())) + "\n")
    held_out = [
        prepare(path, plain_tokenizer, with_eval=True, eval_fraction=0.25).eval
        for path in (pairs_file, tmp_path / "reversed.jsonl")
    ]
    assert len(held_out[0]) == 10
    assert ids_of(held_out[0]) == ids_of(held_out[1])


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_each_side_of_a_hold_out_has_a_prompt(fraction, pairs_file, plain_tokenizer):
    data = prepare(pairs_file, plain_tokenizer, with_eval=True, eval_fraction=fraction)
    assert min(len(data.train), len(data.eval)) == 1
    assert len(data.train) + len(data.eval) == 40


@pytest.mark.parametrize("arguments", [{"eval_fraction": 0.25}, {"dataset_test_split": "train"}])
def test_held_out_pairs_are_loaded_once(arguments, pairs_file, plain_tokenizer, monkeypatch):
    loaded = []
    load_splits = source_rows.load_splits
    monkeypatch.setattr(
        source_rows, "load_splits", lambda *args, **options: loaded.append(args) or load_splits(*args, **options)
    )
    data = DataArguments(dataset_name=str(pairs_file), **arguments)
    held_out = prepare_held_out(data, plain_tokenizer, max_length=None)
    assert len(loaded) == 1
    assert len(held_out.pairs) == len(held_out.prompts) == (10 if "eval_fraction" in arguments else 40)


def test_pairs_that_share_one_prompt_cannot_be_held_out(tmp_path, plain_tokenizer):
    (tmp_path / "one.jsonl").write_text(LINE * 4)
    with pytest.raises(DataError, match="all training pairs have one prompt") as error:
        prepare(tmp_path / "one.jsonl", plain_tokenizer, with_eval=True, eval_fraction=0.5)
    assert "--dataset_test_split" in error.value.do


def test_a_limited_hold_out_counts_every_row(pairs_file, plain_tokenizer):
    data = prepare(pairs_file, plain_tokenizer, with_eval=True, eval_fraction=0.5, max_eval_samples=5)
    train, held_out = data.record()["train"], data.record()["eval"]
    assert len(data.eval) == 5
    assert (train["kept"], held_out["kept"]) == (len(data.train), len(data.eval))
    assert train["rows"] + held_out["rows"] == 40


def test_markup_in_the_data_stays_text_on_the_screen(tmp_path, plain_tokenizer, capsys):
    rows = [[{"role": "user", "content": "Q?"}, {"role": role, "content": "A"}] for role in ("assistant", "[/red]")]
    good = {"chosen": rows[0], "rejected": [rows[0][0], {"role": "assistant", "content": "B"}]}
    bad = {"chosen": rows[1], "rejected": rows[0]}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, bad)))
    record = prepare(tmp_path / "x.jsonl", plain_tokenizer).record()
    print_report(record)
    assert any("[/red]" in reason for reason in record["train"]["dropped"])
    assert "[/red]" in capsys.readouterr().err


def test_the_screen_shows_reasons_and_findings(tmp_path, plain_tokenizer, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write_mixed(folder / "train.jsonl")
    write_pairs(folder / "test.jsonl", 3)
    capsys.readouterr()
    print_report(prepare(folder, plain_tokenizer, with_eval=True).record())
    screen = capsys.readouterr()
    assert screen.out == ""
    text = " ".join(screen.err.split())
    assert "train: 2 dropped as empty_answer: an answer has no word" in text
    assert "3 of 3 held-out pairs have a prompt that is also trained on" in text


def test_real_hh_rows_and_gpt2_tokenizer_are_counted_with_eos(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "gpt2-tokenizer")
    data = prepare(shared / "data" / "hh-rlhf" / "harmless-base", tokenizer, with_eval=True, max_length=512)
    train = data.record()["train"]
    assert (train["rows"], train["kept"]) == (1500, 1495)
    assert train["dropped"] == {"different_prompts": 4, "empty_answer": 1}
    for row in data.train:
        assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 512
        assert tokenizer.eos_token_id not in row["prompt_ids"]
    whole = [row["chosen_ids"] for row in data.train if tokenizer.eos_token_id in row["chosen_ids"]]
    assert all(ids.index(tokenizer.eos_token_id) == len(ids) - 1 for ids in whole)
    assert len(whole) >= 1400


def test_cut_held_out_pairs_are_counted_by_source(tmp_path, plain_tokenizer):
    for name in ("a", "b"):
        rows = [{"prompt": f"Q {n}?", "chosen": f"yes {name} {n}", "rejected": "no"} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    data = prepare(names, plain_tokenizer, with_eval=True, eval_fraction=0.5, max_eval_samples=1)
    whole = data.record()["eval"]
    assert (len(data.eval), whole["kept"], [source["kept"] for source in whole["sources"]]) == (1, 1, [1, 0])


def test_max_eval_samples_limits_prompts_with_several_pairs(tmp_path, plain_tokenizer):
    file = write_pairs(tmp_path / "pairs.jsonl", 10)
    file.write_text(file.read_text() + file.read_text().replace("Mix", "Stir") + file.read_text().replace("Mix", "Get"))
    for most in (1, 2, 4):
        data = prepare(file, plain_tokenizer, with_eval=True, eval_fraction=0.5, max_eval_samples=most)
        assert 1 <= len(data.eval) <= most
        record = data.record()
        assert (record["train"]["kept"], record["eval"]["kept"]) == (len(data.train), len(data.eval))
        assert record["train"]["rows"] + record["eval"]["rows"] == 30
