"""The short check at the start of every run: many dropped rows, and length as a shortcut."""

import json

import pytest

from dpokit.data.doctor.short import describe_length_bias
from dpokit.data.prepare import prepare_data
from dpokit.data.tally import Tally, describe_losses
from dpokit.run import prepare_run
from dpokit.settings.flags import DataArguments


def prepare(tmp_path, rows, tokenizer, **flags):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_data(DataArguments(dataset_name=str(file), **flags), tokenizer, max_length=None, with_eval=False)


def build_rows(number: int, chosen: str, rejected: str) -> list[dict[str, str]]:
    return [{"prompt": f"Why {n}?", "chosen": f"{chosen} {n}", "rejected": f"{rejected} {n}"} for n in range(number)]


@pytest.mark.parametrize(("dropped", "is_finding"), [(0, False), (5, False), (6, True), (49, True)])
def test_a_finding_names_the_reason_of_many_dropped_rows(tmp_path, plain_tokenizer, dropped, is_finding):
    rows = build_rows(50, "So", "No")
    for row in rows[:dropped]:
        row["chosen"] = " "
    findings = prepare(tmp_path, rows, plain_tokenizer).findings
    expected = (
        f"{dropped} of 50 train rows ({dropped * 2}%) are dropped, {dropped} of them as empty_answer (an answer has no "
        "word): write an answer, or leave out such rows"
    )
    assert findings == ([expected] if is_finding else [])


def test_the_main_reason_is_named_with_its_own_remedy():
    tally = Tally("pairs", "HH", rows=10)
    tally.dropped.update({"empty_answer": 1, "unknown_role (narrator)": 3, "over_max_eval_samples": 2, "over_share": 3})
    line = describe_losses("eval", tally)
    assert line.startswith(
        "4 of 10 eval rows (40%) are dropped, 3 of them as unknown_role (narrator) (a message has a "
    )
    assert "write one of the roles" in line
    assert "max_eval_samples" not in line


def test_a_stream_and_an_empty_split_have_no_losses():
    stream = Tally("pairs", "HH", rows=10, is_stream=True)
    stream.dropped["empty_answer"] = 9
    assert describe_losses("train", stream) == describe_losses("eval", Tally("pairs", "HH")) == ""


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"),
    [
        ("So it is, and here is why", "No", "always taking the longer answer is right in 100% of 80 training pairs"),
        ("So", "No, it is not, as you know", "always taking the shorter answer is right in 100% of 80 training pairs"),
        ("So", "No", ""),
    ],
)
def test_length_bias_is_a_finding(tmp_path, plain_tokenizer, chosen, rejected, says):
    lines = describe_length_bias(prepare(tmp_path, build_rows(80, chosen, rejected), plain_tokenizer).train)
    assert [line.startswith(says) and "--ld_alpha 0.5" in line for line in lines] == ([True] if says else [])


def test_few_pairs_are_no_evidence(tmp_path, plain_tokenizer):
    assert describe_length_bias(prepare(tmp_path, build_rows(20, "So it is", "No"), plain_tokenizer).train) == []


@pytest.mark.parametrize(("kind", "number"), [("dpo", 1), ("sft", 0)])
def test_a_run_records_the_length_bias(tmp_path, tiny_gpt2, kind, number):
    """Only a loss that compares answers can learn their length."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in build_rows(80, "So it is, and here is why", "No")))
    flags = {"model_name_or_path": str(tiny_gpt2), "dataset_name": str(file), "max_length": 64, "use_cpu": True}
    defaults = {"kind": kind, "output_dir": str(tmp_path / "run"), "report_to": "none", **flags}
    findings = prepare_run("short.py", defaults, [])["findings"]
    assert sum("always taking the longer answer" in line for line in findings) == number
