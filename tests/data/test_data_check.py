"""`dpokit data check`: each fault that is planted in a file is counted, and a clean file has no finding."""

import json
import random
import re

import numpy as np
import pytest
from conftest import build_tokenizer

from dpokit.data.doctor import near, pairs
from dpokit.data.doctor.check import HELD_OUT_BY_PROMPT, NO_HELD_OUT, check_data
from dpokit.data.doctor.kinds import KINDS, NO_RENSA
from dpokit.data.doctor.rows import Usable
from dpokit.data.doctor.shortcuts import cross_validate
from dpokit.data.formats import Pair
from dpokit.data.prepare import prepare_data
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments, FlagParser

CONVERSATION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
LETTERS = "bcdfghjklmnpqrstvwz"
KEY = "hf_" + "aB3" * 10
PRIVATE = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7bq\n-----END RSA PRIVATE KEY-----"


def say(rng: random.Random, number: int) -> str:
    """Random words, no two of which share seven letters."""
    return " ".join("".join(rng.choice(LETTERS) for _ in range(6)) for _ in range(number))


def build_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose answers have the same look on average."""
    rng = random.Random(seed)
    texts = ((say(rng, 12), say(rng, rng.randint(5, 40)), say(rng, rng.randint(5, 40))) for _ in range(number))
    return [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]


def change_a_word(text: str) -> str:
    return text.replace(text.split()[3], "x", 1)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# The kind of finding, and how many of the planted rows it must count.
PLANTED = {
    "dropped": 8,
    "repeated_pairs": 12,
    "near_pairs": 20,
    "near_prompts": 20,
    "opposite_pairs": 3,
    "loops": 1,
    "leaked_prompts": 4,
    "near_leaked_prompts": 5,
    "control_characters": 2,
    "damaged_text": 2,
    "emails": 2,
    "phones": 2,
    "keys": 2,
    "invisible_answers": 2,
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The record of a folder with each fault."""
    folder = tmp_path_factory.mktemp("planted")
    rows = build_rows(300)
    clean, held_out = rows[:], build_rows(40, seed=1)
    rows += clean[:12]
    rows += [{name: change_a_word(text) for name, text in row.items()} for row in clean[20:40]]
    rows += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in clean[50:53]]
    loop = [("A", "B"), ("B", "C"), ("C", "A")]
    rows += [{"prompt": "which?", "chosen": a, "rejected": b} for a, b in loop]
    odd = build_rows(14, seed=2)
    odd[0]["chosen"] += " \x1b[31m"
    odd[1]["prompt"] += " \u202eabc"
    odd[2]["chosen"] += " caf\u00c3\u00a9"
    odd[3]["rejected"] += " \u00e2\u20ac\u2122"
    odd[4]["prompt"] += " jane.doe@mail.example.org"
    odd[5]["rejected"] += " x_y+z@a-b.co"
    odd[6]["chosen"] += " +49 30 1234 5678"
    odd[7]["chosen"] += " (212) 736-5000"
    odd[8]["chosen"] += f" {KEY}"
    odd[9]["rejected"] += f" {PRIVATE}"
    odd[10]["chosen"] = "\u200b\u200d"
    odd[11]["rejected"] = "\u3164 \u2800"
    rows += odd
    rows += [row | {"chosen": " "} for row in build_rows(8, seed=3)]
    held_out[:4] = [row | {"prompt": old["prompt"]} for row, old in zip(held_out[:4], clean, strict=False)]
    for number in range(5):
        held_out[10 + number]["prompt"] = change_a_word(clean[100 + number]["prompt"])
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", held_out)
    return check_data([str(folder)], DataArguments())


@pytest.mark.parametrize(("kind", "number"), PLANTED.items())
def test_each_planted_fault_is_counted(planted, kind, number):
    (finding,) = (finding for finding in planted["findings"] if finding["kind"] == kind)
    # Half of the changed pairs have an answer so short that one other word makes it another answer.
    least = number // 3 if kind == "near_pairs" else number // 2 if kind.startswith("near") else number
    assert least <= finding["count"] <= number
    assert finding["examples"]


def test_examples_hide_keys_and_personal_data(planted):
    text = json.dumps(planted)
    for secret in (KEY, KEY[:12], "MIIEowIB", "jane.doe", "x_y+z@a-b", "1234 5678", "736-5000"):
        assert secret not in text
    assert "***" in text


# Where a secret may stand: in dropped rows, in their reasons, and at the start of answers.
PLACES = {
    "a line of equal answers": lambda text: {"prompt": "Why?", "chosen": f"\n{text}", "rejected": f"\n{text}"},
    "the end of a long text": lambda text: {"prompt": "x" * 560 + " " + text, "chosen": "So.", "rejected": "So."},
    "JSON in a text": lambda text: {"prompt": json.dumps([f"\n{text}"]), "chosen": "", "rejected": "b"},
    "a role": lambda text: {
        "prompt": "Why?",
        "chosen": [{"role": text, "content": "So."}],
        "rejected": CONVERSATION[1:],
    },
    "the first word": lambda text: {"prompt": "Why?", "chosen": text, "rejected": "No."},
    "the second word": lambda text: {"prompt": "Why?", "chosen": f"Ask {text}", "rejected": "No."},
}


@pytest.mark.parametrize("place", PLACES)
def test_no_key_of_a_row_is_shown(tmp_path, place):
    rows = [PLACES[place](text) | {"meta": text} for text in (KEY, "assistant")]
    record = check_data([write(tmp_path / "pairs.jsonl", rows)], DataArguments(ignore_columns=["meta"]))
    assert record["splits"][0]["rows"] == 2
    assert KEY[:9].lower() not in json.dumps(record).lower()
    assert "***" in json.dumps(record)


def test_the_record_tells_where_a_row_has_its_twin(planted):
    (finding,) = (finding for finding in planted["findings"] if finding["kind"] == "repeated_pairs")
    (first, *_) = finding["examples"]
    assert first["source"].endswith("split train, row 301")
    assert first["equal_to"].endswith("split train, row 1")


def test_a_clean_file_has_no_finding(tmp_path):
    folder = tmp_path / "clean"
    folder.mkdir()
    write(folder / "train.jsonl", build_rows(300))
    write(folder / "test.jsonl", build_rows(40, seed=1))
    record = check_data([str(folder)], DataArguments())
    assert [finding["kind"] for finding in record["findings"] if finding["is_problem"]] == []
    assert abs(record["shortcuts"]["all_shortcuts"]["accuracy"] - 0.5) < 0.1
    assert json.dumps(record) == json.dumps(check_data([str(folder)], DataArguments()))


# What an answer looks like, the finding that must name it, and that of nothing else but "all_shortcuts".
LOOKS = {
    "length": lambda text: text + " " + text,
    "refusal": lambda text: "I'm sorry, but I can\u2019t help with that. " + text[45:],
    "opening": lambda text: "Hohoho friend " + text[14:],
    "markup": lambda text: "- " + text[2:],
    "punctuation": lambda text: text[:-1] + "!",
    "script": lambda text: text[:-12] + "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440!!"[:12],
}


@pytest.mark.parametrize("kind", LOOKS)
def test_a_shortcut_is_named_with_its_accuracy(tmp_path, kind):
    rng = random.Random(4)
    rows = []
    for _ in range(300):
        row = {"prompt": say(rng, 5), "chosen": say(rng, 12), "rejected": say(rng, 12)}
        side = "rejected" if kind == "refusal" else "chosen"
        if rng.random() < 0.8:
            row[side] = LOOKS[kind](row[side])
        rows.append(row)
    record = check_data([write(tmp_path / "pairs.jsonl", rows)], DataArguments())
    named = {finding["kind"] for finding in record["findings"] if finding["is_problem"]}
    assert kind in named
    assert record["shortcuts"][kind]["accuracy"] > 0.85
    assert named <= {kind, "all_shortcuts", *({"opening", "punctuation", "length"} if kind != "length" else set())}


@pytest.mark.parametrize("prompts", [1, 2])
def test_few_prompts_hide_no_shortcut(prompts):
    differences = np.ones((300, 2), np.float32)
    groups = np.minimum(np.arange(300) % 12, prompts - 1).astype(np.uint64)
    accuracy = cross_validate(differences, groups)
    assert (accuracy.value, accuracy.decided) == (1, 300)


def test_random_looks_are_no_shortcut():
    rng = np.random.default_rng(0)
    differences, groups = rng.normal(size=(2000, 20)), rng.integers(0, 900, 2000).astype(np.uint64)
    accuracy = cross_validate(differences, groups)
    assert abs(accuracy.value - 0.5) < 0.05
    assert not accuracy.is_certain


@pytest.mark.parametrize("kind", KINDS)
def test_each_flag_of_a_remedy_exists(kind):
    names = set(FlagParser(prog="any").names())
    flags = re.findall(r"--(\w+)", KINDS[kind].why + KINDS[kind].do)
    assert set(flags) <= names
    assert len(KINDS[kind].title) <= 32


# -- what training would do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "max_length"), [("plain", 60), ("chat", 60), ("chat", None)])
def test_the_counts_are_those_of_training(shared, plain_tokenizer, chat_tokenizer, template, max_length):
    tokenizer = plain_tokenizer if template == "plain" else chat_tokenizer
    folder = str(shared / "data" / "hh-rlhf" / "harmless-base")
    data = DataArguments(dataset_name=folder, max_train_samples=100, max_eval_samples=10)
    prepared = prepare_data(data, tokenizer, max_length=max_length, with_eval=True)
    record = check_data([data.dataset_name], data, tokenizer=tokenizer, max_length=max_length)
    for split, tally in zip(record["splits"], prepared.tallies.values(), strict=True):
        assert {name: split[name] for name in tally.record()} == tally.record()


def test_the_table_of_limits_agrees_with_the_cuts(shared, plain_tokenizer):
    data = DataArguments(dataset_name=str(shared / "data" / "hh-rlhf" / "harmless-base"), max_train_samples=60)
    record = check_data([data.dataset_name], data, tokenizer=plain_tokenizer, max_length=512)
    (cut,) = (finding for finding in record["findings"] if finding["kind"] == "cut")
    (row,) = (row for row in record["limits"] if row["max_length"] == 512)
    assert cut["count"] > 0
    assert row["cut"] == pytest.approx(cut["count"] / cut["total"])
    shares = [row["cut"] for row in record["limits"]]
    assert shares == sorted(shares, reverse=True)


def test_without_rensa_the_record_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "can_sign", lambda: False)
    record = check_data([write(tmp_path / "pairs.jsonl", build_rows(5))], DataArguments())
    assert NO_RENSA in record["not_checked"]
    assert NO_HELD_OUT in record["not_checked"]
    assert not any(finding["kind"].startswith("near") for finding in record["findings"])
    assert near.can_sign()


def test_a_hold_out_by_prompt_is_named(tmp_path):
    record = check_data([write(tmp_path / "pairs.jsonl", build_rows(5))], DataArguments(eval_fraction=0.2))
    assert HELD_OUT_BY_PROMPT in record["not_checked"]
    assert NO_HELD_OUT not in record["not_checked"]


def test_a_named_source_is_checked_in_place_of_the_flags_own(tmp_path):
    named, other = (write(tmp_path / f"{number}.jsonl", build_rows(number)) for number in (4, 7))
    for flags in ({"datasets": [{"path": other}]}, {"dataset_mixer": {other: 0.5}}, {"dataset_name": other}):
        record = check_data([named], DataArguments(**flags))
        assert record["sources"] == [named]
        assert [split["rows"] for split in record["splits"]] == [4]
        assert not any("leave out" in line for line in record["not_checked"])


def test_the_sources_of_the_flags_are_checked_with_their_keys(tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    first = write(tmp_path / "first.jsonl", [{"q": row["prompt"]} | row for row in build_rows(4)])
    write(folder / "train.jsonl", build_rows(7, seed=1))
    write(folder / "validation.jsonl", build_rows(2, seed=2))
    entries = [{"path": first, "ignore_columns": ["q"], "count": 2}, {"path": str(folder), "test_split": "validation"}]
    record = check_data([], DataArguments(datasets=entries, drop_duplicates=True))
    assert [(split["rows"], split["held_out"]) for split in record["splits"]] == [(4, False), (7, False), (2, True)]
    assert record["sources"] == [first, str(folder)]
    (line,) = (line for line in record["not_checked"] if "leave out" in line)
    assert "--drop_duplicates, the count of a source" in line


def test_a_table_holds_pairs_of_many_splits_and_places():
    table = pairs.PairTable([])
    table.add(70_000, [Usable(Pair("Why?", "So.", "No."), 0, 80_000, ())])
    table.finish()
    assert (table.part[0], table._place[0]) == (70_000, 80_000)


def test_several_sources_are_checked_together(tmp_path):
    rows = build_rows(60)
    sources = [write(tmp_path / f"{number}.jsonl", rows) for number in range(2)]
    record = check_data(sources, DataArguments())
    counts = {finding["kind"]: finding["count"] for finding in record["findings"]}
    assert counts["repeated_pairs"] == 60
    assert len(record["splits"]) == 2


ODD = {
    "one row": [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}],
    "all rows dropped": [{"prompt": "Why?", "chosen": " ", "rejected": "No."}] * 3,
    "equal answers": [{"prompt": "Why?", "chosen": "So.", "rejected": "So."}] * 3,
    "white space": [{"prompt": "Why?", "chosen": "So.", "rejected": "So. "}] * 3,
    "conversations": [{"chosen": CONVERSATION, "rejected": [CONVERSATION[0], CONVERSATION[1] | {"content": "No."}]}],
    "tool calls": [
        {
            "prompt": [CONVERSATION[0]],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
            "rejected": [CONVERSATION[1]],
        }
    ],
    "Chinese": [{"prompt": "\u4e3a\u4ec0\u4e48" * 9, "chosen": "\u56e0\u4e3a" * 99, "rejected": "\u4e0d"}] * 2,
    "long": [{"prompt": "Why?" * 250_000, "chosen": "sk-" * 300_000, "rejected": "a@" * 400_000}],
    "white space of a million letters": [
        {"prompt": "Why?", "chosen": " " * 10**6 + "x", "rejected": "\n" * 10**6 + "y"}
    ],
    "one letter": [{"prompt": "?", "chosen": "a", "rejected": "b"}] * 2,
    "scored": [{"prompt": "Why?", "responses": ["So.", "No.", "Hm."], "scores": [3, 2, 1]}],
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_odd_rows_end_in_a_record(tmp_path, rows):
    record = check_data([write(tmp_path / "odd.jsonl", rows)], DataArguments(ranked="best_worst"))
    assert record["splits"][0]["rows"] == len(rows)
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("content", "flags", "says"),
    [
        ("", {}, "is empty"),
        ("[" * 2000 + "]" * 2000, {}, "pairs.jsonl"),
        ('{"prompt": "' + "\\ud800" + '", "chosen": "b", "rejected": "c"}\n', {}, "line 1"),
        ('{"text": "a"}\n', {}, "no known form"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', {"dataset_streaming": True}, "has no end"),
    ],
)
def test_a_file_without_pairs_is_one_message(tmp_path, content, flags, says):
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    with pytest.raises(DataError) as refusal:
        check_data([str(file)], DataArguments(**flags))
    assert says in str(refusal.value)


def test_the_first_rows_of_a_stream_are_checked(tmp_path):
    source = write(tmp_path / "pairs.jsonl", build_rows(30))
    record = check_data([source], DataArguments(dataset_streaming=True, max_train_samples=20))
    assert record["splits"][0]["rows"] == 20


def test_a_row_with_several_pairs_counts_pairs(tmp_path):
    source = write(tmp_path / "scored.jsonl", ODD["scored"])
    record = check_data([source], DataArguments(ranked="all"))
    assert record["splits"][0]["kept"] == 3
    assert all(finding["count"] == 0 for finding in record["findings"] if finding["kind"] in ("loops", "dropped"))


def test_a_tokenizer_without_a_fast_form_is_no_need(tmp_path):
    tokenizer = build_tokenizer(["<end>"], eos_token="<end>")
    record = check_data([write(tmp_path / "pairs.jsonl", build_rows(5))], DataArguments(), tokenizer=tokenizer)
    assert record["lengths"]["unit"] == "tokens"
