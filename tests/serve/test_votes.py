"""Votes: complete lines under concurrent writers and kill -9, and pairs to train on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from dpokit.data.prepare import prepare_data
from dpokit.errors import RunFolderError
from dpokit.intervals import find_wilson
from dpokit.report.votes import count_votes, is_between, read_votes
from dpokit.serve.votes import LINE_START, append_vote, build_vote, check_votes
from dpokit.settings.flags import DataArguments

PROMPT = [{"role": "user", "content": "How do I bake bread?"}]
NAMES = {"base": "gpt2", "tuned": "runs/mine"}


def vote(choice="left", number=0, order=("tuned", "base"), **more):
    answers = {"tuned": f"Mix flour. {number}", "base": f"No. {number}"}
    shown = {"prompt": PROMPT, "order": order, "answers": answers, "names": NAMES, "blind": True}
    return build_vote(choice, **shown, **more)


@pytest.mark.parametrize("order", [("tuned", "base"), ("base", "tuned")])
@pytest.mark.parametrize("choice", ["left", "right"])
def test_the_preferred_side_is_chosen_in_either_order(order, choice):
    result = vote(choice, order=order)
    preferred = order[0] if choice == "left" else order[1]
    assert result["vote"] == preferred
    assert result["chosen"][0]["content"] == result["answers"][preferred]
    assert result["rejected"][0]["content"] == result["answers"]["base" if preferred == "tuned" else "tuned"]
    assert result["left"] == order[0]


def test_votes_are_read_as_pairs_without_ties(tmp_path, plain_tokenizer):
    path = tmp_path / "votes.jsonl"
    for number, choice in enumerate(["tie", "both_bad", "tie", "left", "right", "tie", "both_bad"]):
        append_vote(path, vote(choice, number, rewards=None if number % 2 else {"tuned": 0.5, "base": -0.1}))
    data = DataArguments(dataset_name=str(path))
    prepared = prepare_data(data, plain_tokenizer, max_length=None, with_eval=False)
    assert prepared.record()["train"]["dropped"] == {"tie": 3, "both_bad": 2}
    texts = [
        tuple(plain_tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        for row in prepared.train
    ]
    prompt = "\n\nHuman: How do I bake bread?\n\nAssistant:"
    assert [text.removeprefix("<|endoftext|>") for text, _, _ in texts] == [prompt, prompt]
    assert [(chosen, rejected) for _, chosen, rejected in texts] == [
        (" Mix flour. 3<|endoftext|>", " No. 3<|endoftext|>"),
        (" No. 4<|endoftext|>", " Mix flour. 4<|endoftext|>"),
    ]


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {source!r}]
from test_votes import vote
from dpokit.serve.votes import append_vote
print("ready", flush=True)
number = 0
while number < int(sys.argv[2]):
    append_vote(Path(sys.argv[1]), vote(number=f"{{sys.argv[3]}}-{{number}}" + "x" * 3000))
    print(number, flush=True)
    number += 1
"""


def start_writer(path, votes, name):
    code = WRITER.format(tests=str(ROOT / "tests" / "serve"), source=str(ROOT / "src"))
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(path), str(votes), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_no_vote_of_many_writers_is_lost_or_cut(tmp_path):
    path = tmp_path / "votes.jsonl"
    writers = [start_writer(path, 40, str(number)) for number in range(4)]
    assert [writer.wait(timeout=300) for writer in writers] == [0] * 4
    lines = path.read_text().splitlines()
    written = [json.loads(line)["answers"]["tuned"].rstrip("x") for line in lines]
    assert sorted(written) == sorted(f"Mix flour. {name}-{number}" for name in range(4) for number in range(40))


def test_kill_9_loses_no_acknowledged_vote(tmp_path):
    path = tmp_path / "votes.jsonl"
    acknowledged = 0
    for life in range(3):
        writer = start_writer(path, 10_000, str(life))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        assert writer.stdout.readline() == "0\n"  # at least one vote is stored, even on a slow disk
        acknowledged += 1
        time.sleep(0.2 + 0.1 * life)
        writer.send_signal(signal.SIGKILL)
        acknowledged += sum(line.strip().isdigit() for line in writer.stdout.read().splitlines())
        writer.wait()
    append_vote(path, vote())
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert len([json.loads(line) for line in lines]) >= acknowledged + 1 > 1


@pytest.mark.parametrize(
    ("end", "kept"),
    [(b'{"vote": "tie", "answ', 1), (b"\xff\xfe", 1), (b'{"vote": "tie"}', 2), (b"", 1), (b'"', 1)],
    ids=["cut", "bytes", "only the newline is missing", "complete", "a quote"],
)
def test_the_next_vote_repairs_a_cut_last_line(tmp_path, end, kept):
    path = tmp_path / "votes.jsonl"
    append_vote(path, vote("tie"))
    with path.open("ab") as file:
        file.write(end)
    append_vote(path, vote("left"))
    votes = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(votes) == kept + 1
    assert votes[-1]["vote"] == "tuned"
    assert read_votes(path) == votes


def test_a_long_cut_line_is_repaired(tmp_path):
    path = tmp_path / "votes.jsonl"
    append_vote(path, vote("tie"))
    with path.open("ab") as file:
        file.write(LINE_START + b"x" * (3 * 2**20))
    append_vote(path, vote("left"))
    assert [json.loads(line)["vote"] for line in path.read_bytes().splitlines()] == ["tie", "tuned"]


@pytest.mark.parametrize("cut", [1, 5, 200], ids="{} bytes".format)
def test_the_next_vote_repairs_a_cut_first_line(tmp_path, cut):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(vote("tie"))[:cut])
    append_vote(path, vote("left"))
    assert [json.loads(line)["vote"] for line in path.read_text().splitlines()] == ["tuned"]


@pytest.mark.parametrize(
    "content",
    ['{\n  "beta": 0.1\n}', '{"beta": 0.1}', '{"prompt": "Why?", "chosen": "a", "rejected": "b"}\n', "\n", "\x00" * 9],
)
def test_a_file_without_votes_is_refused_and_unchanged(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    for refuse in (lambda: append_vote(path, vote()), lambda: check_votes(path)):
        with pytest.raises(RunFolderError, match="does not begin with a vote"):
            refuse()
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("models", "run", "among_named", "among_run"),
    [
        (NAMES, None, True, False),
        (NAMES, "t0", False, True),
        (NAMES | {"tuned": "runs/../runs/mine"}, None, False, False),
        (NAMES | {"tuned": "runs/../runs/mine"}, "t0", False, True),
        (NAMES | {"base": "another"}, None, False, False),
        (NAMES | {"base": "another"}, "t0", False, False),
        (NAMES, "t1", False, False),
        (None, "t0", False, False),
    ],
)
def test_a_win_rate_counts_the_shown_models_only(models, run, among_named, among_run):
    result = vote() | {"models": models, "run": run}
    assert is_between(result, NAMES, run=None) is among_named
    assert is_between(result, NAMES, run="t0") is among_run


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_leaves_only_complete_lines(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        path = tmp_path / "votes.jsonl"
        with pytest.raises(RunFolderError, match="no space is left"):
            for number in range(100):
                append_vote(path, vote(number="x" * 5000 + str(number)))
        assert path.read_bytes().endswith(b"}\n")
        assert len(read_votes(path)) > 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_win_rate_ignores_votes_without_a_preference():
    result = count_votes([vote("left"), vote("left"), vote("right"), vote("tie"), vote("both_bad"), {"vote": 7}])
    assert result.counts == {"tuned": 2, "base": 1, "tie": 1, "both_bad": 1}
    assert result.win_rate is not None
    assert result.win_rate["value"] == pytest.approx(2 / 3)
    assert count_votes([vote("tie")]).win_rate is None


def test_the_interval_equals_wilsons_in_a_published_table():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    for wins, decided, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        result = find_wilson(wins, decided)
        assert result is not None
        assert (result["low"], result["high"]) == pytest.approx((low, high), abs=5e-5)
