"""A finished run evaluated: the trainer's own numbers, and what it has none for."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_pairs
from test_cli import dpokit
from transformers import AutoModelForCausalLM

from dpokit.errors import DataError, ModelError, RunFolderError, SettingsError
from dpokit.evaluate.command import evaluate_model
from dpokit.evaluate.inputs import load_subject
from dpokit.evaluate.pairs import DRIFT_TOKENS, find_drift_pairs
from dpokit.run import train
from dpokit.rundir import RunDir, read_metrics

NOTHING = {"base": None, "data": None, "split": None}


def make_run(folder, model, **changes) -> RunDir:
    pairs = write_pairs(folder / "pairs.jsonl", 30)
    settings = {
        "model_name_or_path": str(model),
        "dataset_name": str(pairs),
        "output_dir": str(folder / "run"),
        "eval_fraction": 0.4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "gradient_accumulation_steps": 1,
        "load_best_model_at_end": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    return train("dpo_test", settings | changes, [])


@pytest.fixture
def run(tiny_gpt2, tmp_path) -> RunDir:
    return make_run(tmp_path, tiny_gpt2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_peft": True}, {"beta": 0.3}, {"attn_implementation": "eager"}],
    ids=["full", "lora", "beta", "padded"],
)
def test_the_numbers_are_those_of_the_trainers_own_evaluation(changes, tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, **changes)
    trained = {name: value for record in read_metrics(run.metrics_jsonl) for name, value in record.items()}
    found = evaluate_model(str(run.path), **NOTHING, limit=None, argv=[])
    names = {
        "loss": "loss",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "rewards/chosen": "rewards/chosen",
        "rewards/rejected": "rewards/rejected",
        "logps/chosen": "logps/chosen",
        "logps/rejected": "logps/rejected",
    }
    assert found["tuned"]["margin"]["value"] != 0.0
    for ours, theirs in names.items():
        assert found["tuned"][ours]["value"] == pytest.approx(trained[f"eval_{theirs}"], rel=1e-4, abs=1e-5), ours
    assert json.loads(run.pairs_json.read_text()) == json.loads(json.dumps(found))


def test_drift_is_the_divergence_of_whole_distributions(run, tiny_gpt2):
    found = evaluate_model(str(run.path), **NOTHING, limit=3, argv=[])
    subject = load_subject(str(run.path), **NOTHING, argv=[])
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (run.model, tiny_gpt2)]
    drifts = []
    for row in subject.held_out.pairs.select(range(3)):
        ids, first = torch.tensor([row["prompt_ids"] + row["chosen_ids"]]), len(row["prompt_ids"]) - 1
        with torch.no_grad():
            tuned, base = (model(ids).logits[0, first:-1].softmax(-1) for model in models)
        drifts.append((tuned * (tuned / base).log()).sum(-1).mean().item())
    assert found["tuned"]["kl_per_token"]["value"] == pytest.approx(sum(drifts) / 3, rel=1e-4)


def test_drift_is_measured_on_answers_spread_over_all():
    assert find_drift_pairs([10] * 5) == [0, 1, 2, 3, 4]
    spread = find_drift_pairs([DRIFT_TOKENS // 2] * 100)
    assert spread == [0, 50]


def test_a_model_is_compared_with_a_base_on_data_that_is_named(run, tiny_gpt2, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_pairs(folder / "test.jsonl", 9)
    found = evaluate_model(str(run.model), base=str(tiny_gpt2), data=str(folder), split="test", limit=7, argv=[])
    assert found["data"]["pairs"] == 7
    assert found["base"]["model"] == str(tiny_gpt2)
    assert "verdict" in found
    assert not run.eval.exists()
    alone = evaluate_model(str(run.model), base=None, data=str(folder), split="test", limit=7, argv=[])
    assert alone["tuned"]["ranking_accuracy"] == found["tuned"]["ranking_accuracy"]
    assert "verdict" not in alone


def test_an_adapter_without_its_run_is_compared_with_its_own_base(tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, use_peft=True)
    of_run = evaluate_model(str(run.path), **NOTHING, limit=None, argv=[])
    data = {"base": None, "data": str(tmp_path / "pairs.jsonl"), "split": "train"}
    of_adapter = evaluate_model(str(run.adapter), **data, limit=None, argv=["--max_length", "64"])
    assert of_adapter["base"]["model"] == str(tiny_gpt2)
    assert of_adapter["data"]["pairs"] > of_run["data"]["pairs"]
    assert of_adapter["tuned"]["margin"]["value"] != 0.0


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run):
    one = evaluate_model(str(run.path), **NOTHING, limit=None, argv=[])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "ddp_cpu.yaml")]
    words = [sys.executable, *launcher, "-m", "dpokit.cli", "evaluate", str(run.path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout[done.stdout.index("{") :]) == json.loads(json.dumps(one))


def test_the_verb_shows_a_table_and_the_verdict_in_80_columns(run):
    done = dpokit("evaluate", str(run.path), "--limit", "5")
    assert done.returncode == 0, done.stderr
    assert "5 held-out pairs" in done.stdout
    assert "ranking accuracy" in done.stdout
    assert "base:" in " ".join(done.stdout.split())
    table = done.stdout[: done.stdout.index("whoever")]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("what", "data", "error", "says"),
    [
        ("", None, RunFolderError, "holds neither a run"),
        ("nothing", "pairs.jsonl", ModelError, "no tokenizer could be loaded"),
        ("run/model", None, SettingsError, "no data was named"),
        ("run/model", "none.jsonl", DataError, "none.jsonl"),
    ],
)
@pytest.mark.usefixtures("run")
def test_what_cannot_be_evaluated_is_one_message(what, data, error, says, tmp_path):
    given = NOTHING | {"data": data and str(tmp_path / data)}
    with pytest.raises(error, match=says):
        evaluate_model(str(tmp_path / what), **given, limit=None, argv=[])


def test_a_run_without_weights_is_one_message(run):
    run.model.rename(run.path / "elsewhere")
    with pytest.raises(RunFolderError, match="holds no weights"):
        evaluate_model(str(run.path), **NOTHING, limit=None, argv=[])


def test_a_base_with_other_words_does_not_fit(run, tiny_qwen2):
    with pytest.raises(ModelError, match="has another vocabulary"):
        evaluate_model(str(run.path), **NOTHING | {"base": str(tiny_qwen2)}, limit=None, argv=[])
