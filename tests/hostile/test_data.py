"""Hostile datasets: files that expand, folders with links out of them, columns that would fetch addresses."""

import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, DatasetDict, Features, Image, List, Value, load_dataset_builder

from dpokit.data import check_file, hub_source, rendering
from dpokit.data import check_lines as limits
from dpokit.data.files import read_split_rows
from dpokit.data.prepare import prepare_data
from dpokit.data.sources import load_splits
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments

MIB = 1 << 20
ROWS = [{"prompt": f"Number {i} is", "chosen": " one.", "rejected": f" row {i}."} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
SECRET = json.dumps({"prompt": "a", "chosen": "the key of another folder", "rejected": "b"}) + "\n"
BOTH_WAYS = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
MOST_SECONDS = 30.0


@pytest.fixture
def small(monkeypatch):
    """Makes the limits a thousand times smaller, so that a test creates a bomb quickly."""
    monkeypatch.setattr(limits, "FREE_BYTES", MIB)
    for module in (limits, check_file):
        monkeypatch.setattr(module, "LINE_BYTES", MIB // 4)
    monkeypatch.setattr(check_file, "LIST_BYTES", MIB // 2)


def repeat(text: str, times: int) -> pa.DictionaryArray:
    """A repeated text that is stored once in memory and in a Parquet file."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([text]))


def parquet(path: Path, column: pa.Array, **options: object) -> None:
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 1 << 30} | options
    pq.write_table(pa.table(dict.fromkeys(ROWS[0], column)), path, **options)


def messages(times: int) -> pa.Array:
    text = repeat("x" * 100_000, times)
    offsets = pa.array(range(times + 1), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays([text, text], ["role", "content"]))


def packed_parquet(path: Path) -> None:
    plain = path.with_suffix("")
    pq.write_table(pa.table({"chosen": ["x" * 99_000] * 900}), plain, use_dictionary=False, compression=None)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


GROWING = ["x" * length for length in range(0, 12_000, 2)]
ROW = LINES.splitlines()[0] + "\n"
# The file, the function that writes it, and a part of the message.
BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "zeros, packed": ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(bytes(9 * MIB))), "line 1 is longer"),
    "zeros after a row": ("a.jsonl", lambda p: p.write_bytes(ROW.encode() + bytes(MIB)), "line 2 is longer"),
    "zeros in a CSV": ("a.csv.gz", lambda p: p.write_bytes(gzip.compress(b"a,b\n" + bytes(9 * MIB))), "line 2 is long"),
    "rows without end": ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(ROW.encode() * 40_000)), "expand to more"),
    "cells without end": ("a.csv.gz", lambda p: p.write_bytes(gzip.compress(b"a,b,c\n" * 400_000)), "expand to more"),
    "a list without end": (
        "a.json.gz",
        lambda p: p.write_bytes(gzip.compress(b"[" + b"{},\n" * 400_000)),
        "expand to more",
    ),
    "a large list": ("a.json", lambda p: p.write_text("[" + "{},\n" * 200_000 + "{}]"), "one JSON object a line"),
    "an object without end": ("a.json.gz", lambda p: p.write_bytes(gzip.compress(b"{\n" + bytes(9 * MIB))), "expand"),
    "a line of a deep list": ("a.jsonl", lambda p: p.write_text(ROW + "[" * 100_000 + "\n"), "line 2 is nested too"),
    "a list of deep lists": ("a.json", lambda p: p.write_text("[" * 100_000), "nested too deeply"),
    "a number of many digits": (
        "a.jsonl",
        lambda p: p.write_text('{"a": ' + "9" * 100_000 + "}\n"),
        "line 1 is broken",
    ),
    "one text in all rows": ("a.parquet", lambda p: parquet(p, repeat("x" * 100_000, 9_000)), "expand to more"),
    "one message in all rows": ("a.parquet", lambda p: parquet(p, messages(9_000)), "expand to more"),
    "one long text": ("a.parquet", lambda p: parquet(p, repeat("x" * 300_000, 1)), "a row has a text of 300,000 bytes"),
    "plain texts that pack well": (
        "a.parquet",
        lambda p: parquet(p, pa.array(["x" * 100_000] * 90), use_dictionary=False),
        "expand to more",
    ),
    "texts that each begin as the one before": (
        "a.parquet",
        lambda p: parquet(p, pa.array(GROWING), use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY"),
        "expand to more",
    ),
    "a number in all rows": ("a.parquet", lambda p: parquet(p, pa.array([7] * 9_000_000)), "expand to more"),
    "nothing in all rows": ("a.parquet", lambda p: parquet(p, pa.nulls(9_000_000, pa.string())), "expand to more"),
    "a packed Parquet file": ("a.parquet.gz", packed_parquet, "expand to more"),
}


@BOTH_WAYS
@pytest.mark.parametrize("case", BOMBS)
@pytest.mark.usefixtures("small")
def test_a_file_that_expands_too_much_is_refused(case, streaming, tmp_path):
    name, make, message = BOMBS[case]
    make(tmp_path / name)
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as refusal:
        load_splits(str(tmp_path / name), None, streaming=streaming)
    assert name in refusal.value.seen
    assert time.monotonic() - began < MOST_SECONDS


@pytest.mark.usefixtures("small")
def test_a_compressed_file_of_ordinary_size_is_read(tmp_path):
    """Each file has half a MiB after decompression."""
    rows = ROW * (MIB // 2 // len(ROW))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    parquet(tmp_path / "a.parquet", pa.array([str(i) * 10 for i in range(9_000)]))
    for name in ("a.jsonl.gz", "a.parquet"):
        assert len(load_splits(str(tmp_path / name), None, streaming=False)["train"]) > 1_000


@pytest.mark.slow
def test_five_gigabytes_of_zeros_are_refused_in_seconds(tmp_path):
    """With the real limits."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(5 * 1024 // 64):
            file.write(bytes(64 * MIB))
    began = time.monotonic()
    with pytest.raises(DataError, match="line 1 is longer than 64 MiB"):
        load_splits(str(tmp_path / "a.jsonl.gz"), None, streaming=False)
    assert time.monotonic() - began < MOST_SECONDS


@BOTH_WAYS
def test_a_row_too_long_for_a_tokenizer_is_dropped_and_counted(streaming, tmp_path, plain_tokenizer, monkeypatch):
    monkeypatch.setattr(rendering, "TEXT_LETTERS", 1_000)
    long = [
        {"prompt": "a" * 1_001, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 1_001, "rejected": "c"},
    ]
    (tmp_path / "a.jsonl").write_text(LINES + "".join(json.dumps(row) + "\n" for row in long))
    data = DataArguments(dataset_name=str(tmp_path / "a.jsonl"), dataset_streaming=streaming)
    prepared = prepare_data(data, plain_tokenizer, max_length=None, with_eval=False)
    assert len(list(prepared.train)) == len(ROWS)
    assert prepared.tallies["train"].dropped["too_long_text"] == 2


# Entries of a README that name data files; `$` is another folder, with a file that must not be read.
CARDS = {
    "an absolute path": "data_files: $/secret.jsonl",
    "an absolute pattern": "data_files: /**/secret.jsonl",
    "a folder above": "data_files: ../beside/secret.jsonl",
    "a folder above, within": "data_files: own/../../beside/*.jsonl",
    "a folder above, by split": "data_files: [{split: train, path: ../beside/secret.jsonl}]",
    "a folder above, in a list": "data_files: [train.jsonl, ../beside/secret.jsonl]",
    "a home": "data_files: ~/secret.jsonl",
    "an address": "data_files: http://127.0.0.1:9/secret.jsonl",
    "the Hub": "data_files: hf://datasets/own/set/secret.jsonl",
    "a file by its address": "data_files: file://$/secret.jsonl",
    "an archive": "data_files: zip://secret.jsonl::$/secret.zip",
    "a folder above, by data_dir": "data_dir: ../beside",
    "another file system": "data_files: memory://secret.jsonl",
    "stars without end": f"data_files: {'**/' * 500}a",
    "a number": "data_files: 5",
    "an object": "data_files: {a: {b: c}}",
    "splits of wrong types": "data_files: [{split: [1], path: {a: b}}]",
    "a file that is not there": "data_files: nothing.jsonl",
    "a link out": "data_files: link.jsonl",
}
HARMLESS = {
    "a separator without end": 'data_files: train.jsonl\n  sep: "(a+)+$"',
    "a builder's own settings": "data_files: train.jsonl\n  field: prompt\n  chunksize: -1",
    "a program": "data_files: train.jsonl\n  script: own.py",
    "an object that YAML would build": "data_files: train.jsonl\n  own: !!python/object/apply:os.system [id]",
    "no object at all": "[",
}


def write_card(folder: Path, entry: str) -> None:
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: own\n  {entry}\n---\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a data file, and another folder with a file that must not be read."""
    beside, folder = tmp_path / "beside", tmp_path / "set"
    for each in (beside, folder):
        each.mkdir()
    (beside / "secret.jsonl").write_text(SECRET)
    (folder / "train.jsonl").write_text(LINES)
    monkeypatch.setenv("HOME", str(beside))
    return folder


def read(path: Path, *, streaming: bool) -> list[dict]:
    return [row for rows in load_splits(str(path), None, streaming=streaming).values() for row in rows]


def read_or_refuse(path: Path, *, streaming: bool) -> str:
    """The rows, or the message; asserts that neither shows the file of the other folder."""
    try:
        shown = json.dumps(read(path, streaming=streaming))
    except DataError as error:
        shown = str(error)
    assert "the key of another folder" not in shown
    return shown


@BOTH_WAYS
@pytest.mark.parametrize("case", CARDS)
def test_a_readme_opens_no_file_outside_the_folder(case, streaming, folder):
    write_card(folder, CARDS[case].replace("$", str(folder.parent / "beside")))
    if case == "a link out":
        (folder / "link.jsonl").symlink_to(folder.parent / "beside" / "secret.jsonl")
    began = time.monotonic()
    shown = read_or_refuse(folder, streaming=streaming)
    assert str(folder) in shown or json.loads(shown) == ROWS
    assert time.monotonic() - began < MOST_SECONDS


@BOTH_WAYS
@pytest.mark.parametrize("case", HARMLESS)
def test_a_readme_decides_nothing_but_the_data_files(case, streaming, folder):
    write_card(folder, HARMLESS[case])
    assert read(folder, streaming=streaming) == ROWS


def test_counting_rows_opens_no_file_that_a_readme_names(folder):
    write_card(folder, "data_files: /**/secret.jsonl")
    assert read_split_rows(folder, None) == {}


def make_pipe(folder: Path) -> None:
    os.mkfifo(folder / "test.jsonl")


def make_socket(folder: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(folder / "test.jsonl"))
    server.close()


def make_link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def make_deep(folder: Path) -> None:
    for _ in range(100):
        folder = folder / "own"
        folder.mkdir()
    (folder / "test.jsonl").write_text(SECRET)


def make_mesh(folder: Path) -> None:
    """Creates folders with two links each to the next folder: 2^20 paths lead to the last one."""
    for level in range(20):
        (folder / f"_{level}").mkdir()
    for level in range(19):
        for link in "ab":
            (folder / f"_{level}" / link).symlink_to(f"../_{level + 1}")


# Other entries of the folder, and a part of the message; None if the folder's own rows are read.
ENTRIES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a link to a file": (make_link("test.jsonl", "../beside/secret.jsonl"), "leads out of it"),
    "a link to a folder": (make_link("more", "../beside"), "leads out of it"),
    "a link to the root": (make_link("more", "/"), "leads out of it"),
    "a link to a device": (make_link("test.jsonl", "/dev/zero"), "leads out of it"),
    "a link to a process": (make_link("test.jsonl", "/proc/self/environ"), "leads out of it"),
    "a link to nothing": (make_link("test.jsonl", "nothing.jsonl"), "not a regular file"),
    "a link to itself": (make_link("test.jsonl", "test.jsonl"), ""),
    "a link to the folder": (make_link("more", "."), None),
    "a link out that is no data": (make_link("notes.txt", "/etc/passwd"), None),
    "a README that is a link": (make_link("README.md", "/dev/zero"), None),
    "a README that is a pipe": (lambda folder: os.mkfifo(folder / "README.md"), None),
    "a pipe": (make_pipe, "not a regular file"),
    "a socket": (make_socket, "not a regular file"),
    "a name that datasets takes apart": (
        lambda folder: (folder / "zip:own::test.jsonl").write_text(LINES),
        "cannot be read",
    ),
    "folders in folders": (make_deep, None),
    "a mesh of links": (make_mesh, None),
}


@BOTH_WAYS
@pytest.mark.parametrize("case", ENTRIES)
def test_a_folder_is_read_from_regular_files_inside(case, streaming, folder, monkeypatch):
    monkeypatch.chdir(folder)
    make, message = ENTRIES[case]
    make(folder)
    began = time.monotonic()
    shown = read_or_refuse(folder, streaming=streaming)
    assert time.monotonic() - began < MOST_SECONDS
    if message is None:
        assert json.loads(shown) == ROWS
    else:
        assert message in shown
        assert str(folder) in shown


@BOTH_WAYS
def test_wildcards_in_a_file_name_are_not_expanded(streaming, folder):
    (folder / "train.jsonl").rename(folder / "tr[a]in*?.jsonl")
    assert read(folder, streaming=streaming) == ROWS
    assert read(folder / "tr[a]in*?.jsonl", streaming=streaming) == ROWS


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "pipe.jsonl"])
def test_a_device_or_pipe_is_refused_as_a_dataset(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe or a device|no such file|unknown kind"):
        load_splits(name, None, streaming=False)


def edit(file: str, **changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def link_arrow(folder: Path) -> None:
    arrow = next((folder / "train").glob("*.arrow"))
    arrow.unlink()
    arrow.symlink_to(next((folder.parent / "beside").glob("*.arrow")))


def make_arrow_pipe(folder: Path) -> None:
    arrow = next((folder / "train").glob("*.arrow"))
    arrow.unlink()
    os.mkfifo(arrow)


SAVED: dict[str, Callable[[Path], object]] = {
    "files of a folder beside": edit(
        "train/state.json", _data_files=[{"filename": "../../beside/data-00000-of-00001.arrow"}]
    ),
    "a split of a folder beside": edit("dataset_dict.json", splits=["../beside"]),
    "a split by its absolute path": edit("dataset_dict.json", splits=["/tmp"]),
    "a split by its address": edit("dataset_dict.json", splits=["http://127.0.0.1:9/own"]),
    "splits of a wrong type": edit("dataset_dict.json", splits=5),
    "files of a wrong type": edit("train/state.json", _data_files={"a": 1}),
    "a link to rows": link_arrow,
    "a pipe for rows": make_arrow_pipe,
    "no JSON": lambda folder: (folder / "train" / "state.json").write_text("{"),
    "deep JSON": lambda folder: (folder / "train" / "state.json").write_text("[" * 100_000),
}


@BOTH_WAYS
@pytest.mark.parametrize("case", SAVED)
def test_a_saved_set_is_read_from_its_own_folder(case, streaming, tmp_path):
    Dataset.from_list([json.loads(SECRET)]).save_to_disk(tmp_path / "beside")
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "set")
    SAVED[case](tmp_path / "set")
    with pytest.raises(DataError) as refusal:
        read(tmp_path / "set", streaming=streaming)
    assert str(tmp_path / "set") in refusal.value.seen


@pytest.fixture
def site():
    """The URL of a local site, and the list of the paths that were requested from it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/a.png", asked
        server.shutdown()


MEDIA = {
    "images": (Image(), lambda url: {"bytes": None, "path": url}),
    "sounds": (Audio(), lambda url: {"bytes": None, "path": url}),
    "lists of images": (List(Image()), lambda url: [{"bytes": None, "path": url}]),
    "objects with images": ({"own": Image()}, lambda url: {"own": {"bytes": None, "path": url}}),
    "bytes": (Value("binary"), lambda url: url.encode()),
}


def write_media(path: Path, kind: str, url: str, *, saved: bool, columns: tuple[str, ...]) -> Path:
    feature, build = MEDIA[kind]
    texts = {name: Value("string") for name in ROWS[0]}
    features = Features({**texts, **dict.fromkeys(columns, feature)})
    arrays = {name: [row.get(name) for row in ROWS] for name in texts} | {
        name: [build(url)] * len(ROWS) for name in columns
    }
    arrow = {name: pa.array(values, features.arrow_schema.field(name).type) for name, values in arrays.items()}
    table = pa.table(arrow, schema=features.arrow_schema)
    if not saved:  # the schema has the types of the columns
        pq.write_table(table, path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")
    Dataset(table.replace_schema_metadata()).save_to_disk(path)
    edit("dataset_info.json", features=features.to_dict())(path)
    return path


@BOTH_WAYS
@pytest.mark.parametrize("saved", [False, True], ids=["parquet", "saved"])
@pytest.mark.parametrize("kind", MEDIA)
def test_columns_that_are_no_text_are_not_opened(kind, saved, streaming, tmp_path, site):
    url, asked = site
    path = write_media(tmp_path / "a", kind, url, saved=saved, columns=("picture",))
    with pytest.raises(DataError, match="columns that hold no text: picture") as error:
        load_splits(str(path), None, streaming=streaming)
    assert "--ignore_columns picture" in error.value.do
    splits = load_splits(str(path), None, streaming=streaming, ignore=["picture"])
    assert [row for rows in splits.values() for row in rows] == ROWS
    assert not asked


def test_a_column_without_text_is_named_once_for_all_splits(tmp_path):
    for split in ("train", "test"):
        write_media(tmp_path / split, "images", "http://127.0.0.1:9/a.png", saved=True, columns=("picture",))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert set(load_splits(str(tmp_path), None, streaming=False, ignore=["picture"])) == {"train", "test"}
    with pytest.raises(DataError) as error:
        load_splits(str(tmp_path), None, streaming=False)
    assert error.value.seen.count("picture") == 1


@BOTH_WAYS
@pytest.mark.parametrize("saved", [False, True], ids=["parquet", "saved"])
def test_an_image_instead_of_an_answer_is_refused(saved, streaming, tmp_path, site, plain_tokenizer):
    url, asked = site
    path = write_media(tmp_path / "a", "images", url, saved=saved, columns=("chosen",))
    data = DataArguments(dataset_name=str(path), dataset_streaming=streaming)
    with pytest.raises(DataError, match="hold no text: chosen"):
        prepare_data(data, plain_tokenizer, max_length=None, with_eval=False)
    assert not asked


HUB = {
    "pictures": (lambda folder: load_dataset_builder("imagefolder", data_files=str(folder / "*")), "holds imagefolder"),
    "an archive": (lambda folder: load_dataset_builder("webdataset", data_files=str(folder / "*")), "holds webdataset"),
    "files of this machine": (
        lambda folder: load_dataset_builder("json", data_files=str(folder / "train.jsonl")),
        "its README names",
    ),
    "a separator without end": (
        lambda folder: load_dataset_builder("csv", data_files=str(folder / "train.jsonl"), sep="(a+)+$"),
        "its README",
    ),
}


@pytest.mark.parametrize("case", HUB)
def test_a_hub_dataset_of_other_types_or_files_is_refused(case, folder):
    build, message = HUB[case]
    with pytest.raises(DataError, match=message):
        hub_source.check_hub_builder("own/set", build(folder))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", ["zeros after a row", "a list without end", "one text in all rows", "zeros in a CSV"])
def test_a_hub_file_that_expands_too_much_is_refused(case, tmp_path):
    """The files come from this machine; downloaded files go through the same check."""
    name, make, message = BOMBS[case]
    make(tmp_path / name)
    kind = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}[name.split(".")[1]]
    with pytest.raises(DataError, match=message):
        hub_source.check_downloads(load_dataset_builder(kind, data_files=str(tmp_path / name)))


def test_a_changed_file_with_the_same_time_is_read_again(tmp_path):
    """A copy or an archive may set file times, and `datasets` compares nothing else."""
    file = tmp_path / "a.jsonl"
    for number in range(2):
        file.write_text(json.dumps(ROWS[number]) + "\n")
        os.utime(file, (1, 1))
        assert read(file, streaming=False) == [ROWS[number]]
