"""Names of datasets: patterns, lists with commas, packed files, and addresses of files."""

import gzip
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import load_dataset_builder
from test_sources import BOTH_WAYS, KINDS, LINES, ROWS, read, write_rows

from dpokit.data.hub_source import check_downloads
from dpokit.data.paths import find_hub_name, find_paths
from dpokit.data.sources import load_splits
from dpokit.errors import DataError
from dpokit.file_hashes import hash_file
from dpokit.settings.mixture import parse_sources, split_names


def pack_zstd(path: Path) -> Path:
    packed = path.with_name(path.name + ".zst")
    packed.write_bytes(pa.compress(path.read_bytes(), codec="zstd", asbytes=True))
    return packed


@BOTH_WAYS
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_packed_with_zstd_gives_its_rows(kind, streaming, tmp_path):
    assert read(pack_zstd(write_rows(tmp_path / "rows", kind)), streaming=streaming) == ROWS


def test_a_packed_file_of_the_hub_is_left_to_the_library(tmp_path):
    file = pack_zstd(write_rows(tmp_path / "rows", "jsonl"))
    check_downloads(load_dataset_builder("json", data_files=str(file)))


def test_a_folder_has_splits_packed_with_zstd(tmp_path):
    for split in ("train", "test"):
        pack_zstd(write_rows(tmp_path / split, "jsonl")).with_suffix("").unlink()
    assert {name: len(rows) for name, rows in load_splits(str(tmp_path), None, streaming=False).items()} == {
        "train": 5,
        "test": 5,
    }


WHOLE = pa.compress(LINES.encode() * 200, codec="zstd", asbytes=True)
BROKEN = {
    "cut off": (WHOLE[:-9], "the zstd data is cut off or broken"),
    "damaged": (WHOLE[:30] + b"x" * 40, "the zstd data is cut off or broken"),
    "gzip": (gzip.compress(LINES.encode()), "it is packed with gzip"),
    "plain": (LINES.encode(), "it is not packed with zstd"),
    "empty": (b"", "it is cut off"),
    "three bytes": (WHOLE[:3], "it is cut off"),
    "a broken line": (pa.compress(LINES.encode() + b"{", codec="zstd", asbytes=True), "line 6 is broken JSON"),
    "a list that ends": (pa.compress(b'[{"a": 1},', codec="zstd", asbytes=True), "is broken JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_zstd_file_is_named(case, tmp_path):
    content, message = BROKEN[case]
    (tmp_path / "rows.jsonl.zst").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / "rows.jsonl.zst", streaming=False)
    assert str(tmp_path / "rows.jsonl.zst") in error.value.seen


@BOTH_WAYS
def test_a_pattern_gives_the_rows_of_its_files_in_order(streaming, tmp_path):
    for number, row in enumerate(ROWS):
        folder = tmp_path / f"part{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "part0" / "notes.txt").write_text("no rows")
    assert read(tmp_path / "part?" / "*", streaming=streaming) == [ROWS[number] for number in (0, 2, 4, 1, 3)]
    assert read(tmp_path / "**" / "[0-1].jsonl", streaming=streaming) == ROWS[:2]


def test_a_file_with_a_bracket_in_its_name_is_itself(tmp_path):
    (tmp_path / "a[1].jsonl").write_text(LINES)
    (tmp_path / "a1.jsonl").write_text(LINES * 2)
    assert len(read(tmp_path / "a[1].jsonl", streaming=False)) == len(ROWS)


BAD_NAMES = {
    "no match": ("*.jsonl", "fits no file"),
    "no data": ("*.txt", "fits 1 paths, and none is a data file"),
    "two kinds": ("rows.*", "files of 2 kinds"),
    "a web page": ("https://host.example/data", "is no address of a data file"),
    "no encryption": ("http://host.example/rows.jsonl", "is no address of a data file"),
    "another protocol": ("s3://bucket/rows.jsonl", "is no address of a data file"),
    "no network": ("https://host.example/rows.jsonl", "could not be downloaded"),
    "no such file": ("none.jsonl.zst", "there is no such file"),
    "no such user": ("~nobody-here/x.jsonl", "is no path"),
    "a long name": ("x" * 300, "is no path"),
    "no host": ("https://[::bad/x.jsonl", "is no address of a data file"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_a_name_without_files_is_an_error(case, tmp_path, monkeypatch):
    name, message = BAD_NAMES[case]
    monkeypatch.chdir(tmp_path)
    for kind in ("csv", "jsonl"):
        if case in ("two kinds", "no data"):
            write_rows(tmp_path / "rows", kind)
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(DataError, match=message) as error:
        load_splits(name, None, streaming=False)
    assert error.value.do


def test_files_of_different_columns_are_named(tmp_path):
    (tmp_path / "1.jsonl").write_text(LINES)
    (tmp_path / "2.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(DataError, match=r"\*\.jsonl"):
        read(tmp_path / "*.jsonl", streaming=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("hf://datasets/owner/name", ("owner/name", None)),
        ("hf://datasets/owner/name@v2", ("owner/name", "v2")),
    ],
)
def test_an_address_of_a_dataset_is_its_id_and_revision(name, expected):
    assert find_paths(name) == []
    assert find_hub_name(name) == expected


def test_commas_separate_names_but_not_in_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.jsonl").write_text(LINES)
    assert split_names("a,b.jsonl") == ["a,b.jsonl"]
    assert split_names("owner/a, c.jsonl") == ["owner/a", "c.jsonl"]
    (source,) = parse_sources({"datasets": [{"path": "a,b.jsonl"}]})
    assert source.location == "a,b.jsonl"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"path": "json", "data_files": "x.jsonl"}, "x.jsonl"),
        ({"path": "parquet", "data_files": ["x.parquet", "y.parquet"]}, ["x.parquet", "y.parquet"]),
        ({"path": "csv", "data_dir": "folder"}, "folder"),
        ({"path": "folder", "data_files": "x.jsonl"}, "folder/x.jsonl"),
        ({"path": "https://host/folder/", "data_files": "x.jsonl"}, "https://host/folder/x.jsonl"),
        ({"path": "folder", "data_dir": "deep", "data_files": ["x.csv"]}, "folder/deep/x.csv"),
        ({"id": "owner/name", "config": "en"}, "owner/name"),
    ],
)
def test_keys_of_a_source_name_its_files(entry, expected):
    (source,) = parse_sources({"datasets": [entry]})
    assert source.location == expected


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[tuple[str, Path, list[int]]]:
    """The address of an HTTPS server that this process trusts, its files, and the status of each reply."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder, key, certificate = tmp_path / "site", tmp_path / "key.pem", tmp_path / "certificate.pem"
    folder.mkdir()
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *names], check=True, capture_output=True)

    replies: list[int] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def log_request(self, code: int = 0, *_) -> None:
            replies.append(int(code))

        def find_tag(self) -> str:
            path = Path(self.translate_path(self.path))
            return f'"{hash_file(path)}"' if path.is_file() else ""

        def do_GET(self) -> None:
            if self.path.startswith("/plain/"):
                self.send_response(302)
                self.send_header("Location", "http://localhost:1/rows.jsonl")
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif self.find_tag() and self.find_tag() in self.headers.get("If-None-Match", ""):
                self.send_response(304)
                self.end_headers()
            else:
                super().do_GET()

        def end_headers(self) -> None:
            if self.find_tag() and "unmarked" not in self.path:
                self.send_header("ETag", self.find_tag())
            super().end_headers()

    site = ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=str(folder)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    yield f"https://localhost:{site.server_port}", folder, replies
    site.shutdown()
    site.server_close()
    thread.join()


def test_an_address_is_downloaded_and_again_when_it_changes(server):
    address, folder, replies = server
    file = write_rows(folder / "rows", "jsonl.gz")
    assert read(f"{address}/rows.jsonl.gz?download=true", streaming=False) == ROWS
    assert read(f"{address}/rows.jsonl.gz?download=true", streaming=True) == ROWS
    first = file.read_bytes()
    file.write_bytes(gzip.compress((LINES + LINES).encode()))
    assert len(read(f"{address}/rows.jsonl.gz?download=true", streaming=False)) == 2 * len(ROWS)
    file.write_bytes(first)
    assert read(f"{address}/rows.jsonl.gz?download=true", streaming=False) == ROWS
    assert replies == [200, 304, 200, 304]


def test_a_file_without_a_tag_is_downloaded_each_time(server):
    address, folder, replies = server
    for lines in (LINES, LINES + LINES):
        (folder / "unmarked.jsonl").write_text(lines)
        assert len(read(f"{address}/unmarked.jsonl", streaming=False)) == lines.count("\n")
    assert replies == [200, 200]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("broken.jsonl", r"broken.jsonl: line 1 is broken JSON"),
        ("none.jsonl", r"none.jsonl could not be downloaded: .*404"),
        ("plain/rows.jsonl", r"rows.jsonl could not be downloaded"),
    ],
)
def test_an_address_that_gives_no_rows_is_an_error(path, message, server):
    address, folder, _ = server
    (folder / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match=message):
        read(f"{address}/{path}", streaming=False)
