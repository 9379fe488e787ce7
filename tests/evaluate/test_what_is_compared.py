"""Which models and which pairs `dpokit evaluate` compares, and what it refuses before it scores anything."""

import json
import shutil

import pytest
import torch
from conftest import write_pairs
from transformers import GPT2Config, GPT2LMHeadModel

from dpokit.errors import DataError, ModelError, RunFolderError, SettingsError
from dpokit.evaluate.answers import Sampling
from dpokit.evaluate.command import Judge, evaluate_model
from dpokit.evaluate.judge import estimate_win_rate
from dpokit.rundir import RunDir

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture
def make_model(plain_tokenizer, tmp_path):
    """A random GPT-2 with so many rows behind the tokenizer's last token, and so many positions."""

    def make(name: str, *, seed: int, more_rows: int = 0, positions: int = 256, damaged: bool = False) -> str:
        torch.manual_seed(seed)
        size = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": positions}
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), plain_tokenizer.eos_token_id)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(plain_tokenizer) + more_rows, **size, **ends))
        if damaged:
            [word] = plain_tokenizer(" old")["input_ids"][:1]
            model.transformer.wte.weight.data[word] = 3e38  # a number, as loading wants it; a sum of two is none
        model.save_pretrained(tmp_path / name)
        plain_tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def pairs(tmp_path) -> str:
    return str(write_pairs(tmp_path / "pairs.jsonl", 12))


@pytest.fixture
def run(make_model, pairs, tmp_path) -> RunDir:
    """A finished run, made by hand, that holds out a part of its pairs."""
    folder = RunDir(tmp_path / "run")
    shutil.copytree(make_model("tuned", seed=0), folder.model)
    settings = {"model_name_or_path": make_model("base", seed=1), "dataset_name": pairs, "eval_fraction": 0.4}
    write_settings(folder, **settings, max_length=256)
    return folder


def write_settings(run: RunDir, **settings) -> None:
    entries = {name: {"value": value, "origin": "command line"} for name, value in settings.items()}
    kept = (run.read_run() or {}).get("settings", {})
    run.run_json.write_text(json.dumps({"state": "finished", "settings": kept | entries}))


def evaluate(what, *, base=None, data=None, split=None, limit=None, argv=(), **more) -> dict:
    return evaluate_model(str(what), base=base, data=data, split=split, limit=limit, argv=argv, **more)


def test_a_base_with_more_rows_behind_the_same_words_is_compared(make_model, pairs):
    found = evaluate(make_model("tuned", seed=0), base=make_model("wide", seed=1, more_rows=64), data=pairs)
    assert found["tuned"]["kl_per_token"]["value"] > 0


def test_rows_are_cut_to_what_both_models_can_take(make_model, pairs):
    found = evaluate(make_model("tuned", seed=0), base=make_model("short", seed=1, positions=40), data=pairs)
    assert found["data"]["pairs"] == 12


def test_log_probs_that_are_not_finite_are_an_error_with_their_rows(make_model, pairs):
    tuned, base = make_model("damaged", seed=0, damaged=True), make_model("base", seed=1)
    with pytest.raises(ModelError, match=r"damaged gives log-probs that are not finite for \d+ of 12 .* in rows"):
        evaluate(tuned, base=base, data=pairs)
    with pytest.raises(ModelError, match="damaged gives log-probs that are not finite"):
        evaluate(base, base=tuned, data=pairs)


def test_a_file_is_its_only_split_and_a_split_that_is_not_there_is_named_by_this_verbs_flag(run, pairs):
    assert evaluate(run.model, data=pairs)["data"]["pairs"] == 12
    with pytest.raises(DataError, match=r"(?s)no split 'dev'; there is train.*do this:   --split with one of them"):
        evaluate(run.path, split="dev")


def test_a_split_that_is_named_is_taken_whole_and_is_not_the_runs_own(run):
    own, named = evaluate(run.path), evaluate(run.path, split="train")
    assert own["data"]["pairs"] < named["data"]["pairs"] == 12
    assert (own["data"]["own"], named["data"]["own"]) == (True, False)
    write_settings(run, eval_fraction=None, dataset_test_split="train")
    assert evaluate(run.path, split="train")["data"]["own"]  # the same pairs, though they were named


def test_the_configuration_of_the_runs_data_is_not_asked_of_other_data(run, tmp_path):
    write_settings(run, dataset_config="helpful")
    folder = tmp_path / "other"
    folder.mkdir()
    write_pairs(folder / "test.jsonl", 9)
    found = evaluate(run.path, data=str(folder))["data"]
    assert (found["pairs"], found["own"]) == (9, False)


def test_the_base_may_be_a_run_folder(run, make_model, pairs):
    found = evaluate(make_model("third", seed=2), base=str(run.path), data=pairs)
    assert found["base"]["model"] == str(run.model)


def test_groups_are_made_of_the_rows_sources_and_of_the_questions_in_their_prompts(run, tmp_path):
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
    ("more", "error", "says"),
    [
        ({"sampling": Sampling(max_new_tokens=256)}, SettingsError, "only 256 positions"),
        ({"base": None, "sampling": SHORT}, ModelError, "no base was given"),
    ],
)
def test_answers_that_cannot_be_sampled_are_refused_before_anything_is_scored(more, error, says, run, pairs, capfd):
    given = {"base": str(run.path), "data": pairs, "answers": 2}
    with pytest.raises(error, match=says):
        evaluate(run.model, **given | more)
    assert "scoring" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("url", "model", "says"), [("nonsense", "m", "http"), ("http://127.0.0.1/v1", "", "judge-model")]
)
def test_a_judge_that_nobody_can_ask_is_refused_at_once(url, model, says):
    with pytest.raises(SettingsError, match=says):
        Judge(url, model, "JUDGE_KEY", 1)


def test_a_file_where_the_evaluation_belongs_is_one_message(run):
    run.eval.write_text("")
    with pytest.raises(RunFolderError, match="a part of the path is a file"):
        evaluate(run.path, limit=2)


def test_new_answers_take_the_verdicts_on_the_old_ones_away(run):
    run.eval.mkdir()
    run.judge_json.write_text(json.dumps({"wins": 40, "win_rate": estimate_win_rate(40, ties=0, losses=0)}))
    evaluate(run.path, limit=2, answers=2, sampling=SHORT)
    assert run.answers_json.is_file()
    assert not run.judge_json.exists()
