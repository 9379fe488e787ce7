"""The models and pairs that `dpokit evaluate` loads, and the arguments that it refuses before it scores."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from transformers import GPT2Config, GPT2LMHeadModel

from dpokit.data.columns import fingerprint_ids
from dpokit.errors import DataError, ModelError, RunFolderError, SettingsError
from dpokit.evaluate.answers import Sampling
from dpokit.evaluate.command import Judge, run_evaluation
from dpokit.evaluate.inputs import load_subject
from dpokit.evaluate.judge import estimate_win_rate
from dpokit.report.read import load_run
from dpokit.rundir import EvaluationFiles, RunDir

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture
def make_model(plain_tokenizer, tmp_path):
    """Builds a random GPT-2 with embedding rows beyond the tokenizer's tokens, and a number of positions."""

    def make(name: str, *, seed: int, more_rows: int = 0, positions: int = 256, damaged: bool = False) -> str:
        torch.manual_seed(seed)
        size = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": positions}
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), plain_tokenizer.eos_token_id)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(plain_tokenizer) + more_rows, **size, **ends))
        if damaged:
            [word] = plain_tokenizer(" old")["input_ids"][:1]
            model.transformer.wte.weight.data[word] = 3e38  # finite, so that loading accepts it; a sum of two overflows
        model.save_pretrained(tmp_path / name)
        plain_tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def pairs(tmp_path) -> str:
    return str(write_pairs(tmp_path / "pairs.jsonl", 12))


@pytest.fixture
def run(make_model, pairs, tmp_path) -> RunDir:
    """Writes the folder of a finished run that holds out a part of its pairs."""
    folder = RunDir(tmp_path / "run")
    shutil.copytree(make_model("tuned", seed=0), folder.model)
    settings = {"model_name_or_path": make_model("base", seed=1), "dataset_name": pairs, "eval_fraction": 0.4}
    write_settings(folder, **settings, max_length=256)
    return folder


def write_settings(run: RunDir, **settings) -> None:
    entries = {name: {"value": value, "origin": "command line"} for name, value in settings.items()}
    kept = (run.read_run() or {}).get("settings", {})
    run.run_json.write_text(json.dumps({"state": "finished", "settings": kept | entries}))


def evaluate(run_or_model, *, base=None, data=None, split=None, limit=None, argv=(), **more) -> dict:
    return run_evaluation(str(run_or_model), base=base, data=data, split=split, limit=limit, argv=argv, **more)


def test_a_base_with_more_embedding_rows_is_compared(make_model, pairs):
    record = evaluate(make_model("tuned", seed=0), base=make_model("wide", seed=1, more_rows=64), data=pairs)
    assert record["tuned"]["kl_per_token"]["value"] > 0


def test_rows_are_cut_to_the_shorter_model(make_model, pairs):
    record = evaluate(make_model("tuned", seed=0), base=make_model("short", seed=1, positions=40), data=pairs)
    assert record["data"]["pairs"] == 12


def test_log_probs_that_are_not_finite_are_an_error_with_rows(make_model, pairs):
    tuned, base = make_model("damaged", seed=0, damaged=True), make_model("base", seed=1)
    with pytest.raises(ModelError, match=r"damaged gives log-probs that are not finite for \d+ of 12 .* in rows"):
        evaluate(tuned, base=base, data=pairs)
    with pytest.raises(ModelError, match="damaged gives log-probs that are not finite"):
        evaluate(base, base=tuned, data=pairs)


def test_a_missing_split_is_reported_with_the_split_flag(run, pairs):
    assert evaluate(run.model, data=pairs)["data"]["pairs"] == 12
    with pytest.raises(DataError, match=r"(?s)no split 'dev'; there is train.*do this:   --split with one of them"):
        evaluate(run.path, split="dev")


def test_a_named_split_is_used_whole_and_is_not_the_runs_own(run):
    own, named = evaluate(run.path), evaluate(run.path, split="train")
    assert own["data"]["pairs"] < named["data"]["pairs"] == 12
    assert (own["data"]["own"], named["data"]["own"]) == (True, False)
    write_settings(run, eval_fraction=None, dataset_test_split="train")
    assert evaluate(run.path, split="train")["data"]["own"]  # the flag names the run's own split


def test_the_columns_of_the_run_name_its_held_out_pairs(run, tmp_path):
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 12).read_text().splitlines()]
    file = tmp_path / "renamed.jsonl"
    rows = [
        {"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "image": 1} for row in rows
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_settings(run, dataset_name=str(file), columns=["prompt=question"], ignore_columns=["image"])
    record = evaluate(run.path)["data"]
    assert record["own"]
    assert record["pairs"] > 0


def test_the_config_and_columns_of_the_run_are_not_of_other_data(run, tmp_path):
    write_settings(run, dataset_config="helpful", columns=["prompt=question"], ignore_columns=["image"])
    folder = tmp_path / "other"
    folder.mkdir()
    write_pairs(folder / "test.jsonl", 9)
    record = evaluate(run.path, data=str(folder))["data"]
    assert (record["pairs"], record["own"]) == (9, False)


def test_the_base_may_be_a_run_folder(run, make_model, pairs):
    record = evaluate(make_model("third", seed=2), base=str(run.path), data=pairs)
    assert record["base"]["model"] == str(run.model)


def test_pairs_are_grouped_by_source_and_by_number_of_turns(run, tmp_path):
    rows = [json.loads(line) for line in write_pairs(tmp_path / "raw.jsonl", 12).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["source"] = "helpful" if number < 8 else "harmless"
        if number % 3 == 0:
            row["prompt"] = "\n\nHuman: Hello.\n\nAssistant: Yes?" + row["prompt"]
    file = tmp_path / "sources.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = evaluate(run.path, data=str(file))["groups"]
    assert {group["name"]: group["pairs"] for group in groups["source"]} == {"helpful": 8, "harmless": 4}
    assert {group["name"]: group["pairs"] for group in groups["turns"]} == {"1": 8, "2": 4}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sampling": Sampling(max_new_tokens=256)}, SettingsError, "only 256 positions"),
        ({"base": None, "sampling": SHORT}, ModelError, "no base was given"),
    ],
)
def test_unsampleable_answers_are_refused_before_scoring(changes, error, message, run, pairs, capfd):
    arguments = {"base": str(run.path), "data": pairs, "answers": 2}
    with pytest.raises(error, match=message):
        evaluate(run.model, **arguments | changes)
    assert "scoring" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("url", "model", "message"), [("nonsense", "m", "http"), ("http://127.0.0.1/v1", "", "judge-model")]
)
def test_an_invalid_judge_is_refused_at_once(url, model, message):
    with pytest.raises(SettingsError, match=message):
        Judge(url, model, "JUDGE_KEY", 1)


def test_a_file_in_place_of_the_eval_folder_is_refused(run):
    run.eval.write_text("")
    with pytest.raises(RunFolderError, match="a file is where a folder is needed"):
        evaluate(run.path, limit=2)


def test_an_evaluation_replaces_no_other_one(run, pairs, capfd):
    """Neither that of an older version, nor one in the same second, nor its answers and judgement."""
    run.eval.mkdir()
    old = EvaluationFiles(run.eval)
    judgement = {"wins": 40, "win_rate": estimate_win_rate(40, ties=0, losses=0)}
    for path, content in ((old.pairs_json, {"format": 1}), (old.answers_json, {}), (old.judge_json, judgement)):
        path.write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in run.eval.iterdir()}
    sizes = [evaluate(run.path, limit=limit, answers=2, sampling=SHORT)["data"]["pairs"] for limit in (None, 2, 2)]
    evaluate(run.path, data=pairs, limit=3)
    assert {path: path.read_bytes() for path in before} == before
    written = run.evaluations()[1:]
    assert sorted(json.loads(files.pairs_json.read_text())["data"]["pairs"] for files in written) == sorted([*sizes, 3])
    names = sorted(re.sub(r"^\d{8}-\d{6}-", "", files.folder.name) for files in written)
    assert [name.removesuffix("-2") for name in names[:2]] == ["own-2-pairs"] * 2
    assert names[2:] == [f"own-{sizes[0]}-pairs", "pairs.jsonl-split-train-3-pairs"]
    assert sum(files.answers_json.is_file() for files in written) == 3
    shown = load_run(run.path, name="run")
    assert (shown.pairs or {})["data"]["pairs"] == sizes[0]
    assert capfd.readouterr().err.count(f"reports and the card show {shown.evaluation.name}") == 3


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ({}, []),
        ({"argv": ["--beta", "0.5"]}, ["beta"]),
        ({"argv": ["--max_length", "256", "--per_device_eval_batch_size", "3"]}, []),
        ({"argv": ["--max_length", "40"]}, ["max_length"]),
        ({"argv": ["--dtype", "bfloat16"]}, ["dtype"]),
        ({"base": "OTHER"}, ["base"]),
        ({"argv": ["--model_name_or_path", "OTHER"]}, ["base"]),
        ({"argv": ["--model_name_or_path", "BASE"]}, []),
    ],
)
def test_flags_that_change_the_numbers_are_recorded(arguments, changed, run, make_model):
    places = {"OTHER": make_model("other", seed=2), "BASE": run.read_run()["settings"]["model_name_or_path"]["value"]}
    arguments = {
        name: [places.get(part, part) for part in value] if isinstance(value, list) else places[value]
        for name, value in arguments.items()
    }
    evaluate(run.path)
    record = evaluate(run.path, **arguments)
    assert record["changed"] == changed
    assert bool(load_run(run.path, name="run").pairs["changed"]) is False


# Flags of an evaluation, and whether its pairs are those that the run held out: by their fingerprint, and by the flags
# of a run without one. "CHANGED" adds rows to the data file first.
OWN_CASES = {
    "no flags": ([], True, True),
    "other tokens of the same pairs": (["--max_length", "20"], True, True),
    "a flag without an effect": (["--prompt_format", "raw"], True, False),
    "fewer training rows": (["--max_train_samples", "6"], False, False),
    "a part of the training rows": (["--dataset_train_split", "train[:50%]"], False, False),
    "another fraction": (["--eval_fraction", "0.6"], False, False),
    "a file that changed": (["CHANGED"], False, True),
    "a file that changed, and another limit": (["CHANGED", "--max_length", "20"], False, True),
}


@pytest.mark.parametrize("case", OWN_CASES)
def test_own_pairs_are_those_of_the_recorded_fingerprint(case, run, pairs, capfd):
    argv, *expected = OWN_CASES[case]
    subject = load_subject(str(run.path), base=None, data=None, split=None, argv=[])
    fingerprint = fingerprint_ids([subject.held_out.pairs])
    if "CHANGED" in argv:
        write_pairs(Path(pairs), 40)
    flags = [part for part in argv if part != "CHANGED"]
    for record, is_own in zip(({"eval": {"fingerprint": fingerprint}}, {"eval": {}}), expected, strict=True):
        run.data_json.write_text(json.dumps(record))
        assert load_subject(str(run.path), base=None, data=None, split=None, argv=flags).own_data is is_own
    assert ("has changed since training" in capfd.readouterr().err) is ("CHANGED" in argv)
