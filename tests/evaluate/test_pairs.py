"""Evaluations of a finished run: numbers equal to the trainer's, drift, another base or data, and refusals."""

import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_pairs
from test_cli import dpokit
from transformers import AutoModelForCausalLM

from dpokit.errors import DataError, ModelError, RunFolderError, SettingsError
from dpokit.evaluate.command import run_evaluation
from dpokit.evaluate.inputs import load_subject
from dpokit.evaluate.pairs import DRIFT_TOKENS, find_drift_pairs, score_all
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
def test_numbers_equal_the_trainers_own_evaluation(changes, tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, **changes)
    trained = {name: value for line in read_metrics(run.metrics_jsonl) for name, value in line.items()}
    record = run_evaluation(str(run.path), **NOTHING, limit=None, argv=[])
    names = {
        "loss": "loss",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "rewards/chosen": "rewards/chosen",
        "rewards/rejected": "rewards/rejected",
        "logps/chosen": "logps/chosen",
        "logps/rejected": "logps/rejected",
    }
    assert record["tuned"]["margin"]["value"] != 0.0
    for name, metric in names.items():
        assert record["tuned"][name]["value"] == pytest.approx(trained[f"eval_{metric}"], rel=1e-4, abs=1e-5), name
    (files,) = run.evaluations()
    assert json.loads(files.pairs_json.read_text()) == json.loads(json.dumps(record))


def test_drift_is_the_kl_of_whole_distributions(run, tiny_gpt2):
    record = run_evaluation(str(run.path), **NOTHING, limit=3, argv=[])
    subject = load_subject(str(run.path), **NOTHING, argv=[])
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (run.model, tiny_gpt2)]
    drifts = []
    for row in subject.held_out.pairs.select(range(3)):
        ids, first = torch.tensor([row["prompt_ids"] + row["chosen_ids"]]), len(row["prompt_ids"]) - 1
        with torch.no_grad():
            tuned, base = (model(ids).logits[0, first:-1].softmax(-1) for model in models)
        drifts.append((tuned * (tuned / base).log()).sum(-1).mean().item())
    assert record["tuned"]["kl_per_token"]["value"] == pytest.approx(sum(drifts) / 3, rel=1e-4)


def test_a_batch_has_the_pairs_of_a_prompt_together():
    """Each score is that of its own pair, and no prompt is in more batches than it needs."""
    prompts, choose = [[number] * 5 for number in range(10)], random.Random(0)
    rows = [
        {"prompt_ids": prompt, "chosen_ids": [number] * choose.randrange(1, 40), "rejected_ids": [1]}
        for number, prompt in enumerate(choose.sample(prompts * 4, 40))
    ]
    batches = []

    def score(pairs):
        batches.append([tuple(pair["prompt_ids"]) for pair in pairs])
        return torch.tensor([[pair["chosen_ids"][0], -pair["chosen_ids"][0]] for pair in pairs]).T

    assert score_all(score, rows, "model").tolist() == [list(range(40)), [-number for number in range(40)]]
    assert [len(set(batch)) for batch in batches] == [2] * 5


def test_drift_pairs_are_spread_evenly():
    assert find_drift_pairs([10] * 5) == [0, 1, 2, 3, 4]
    spread = find_drift_pairs([DRIFT_TOKENS // 2] * 100)
    assert spread == [0, 50]


def test_a_model_is_compared_with_a_base_on_named_data(run, tiny_gpt2, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_pairs(folder / "test.jsonl", 9)
    record = run_evaluation(str(run.model), base=str(tiny_gpt2), data=str(folder), split="test", limit=7, argv=[])
    assert record["data"]["pairs"] == 7
    assert record["base"]["model"] == str(tiny_gpt2)
    assert "verdict" in record
    assert not run.eval.exists()
    alone = run_evaluation(str(run.model), base=None, data=str(folder), split="test", limit=7, argv=[])
    assert alone["tuned"]["ranking_accuracy"] == record["tuned"]["ranking_accuracy"]
    assert "verdict" not in alone


def test_an_adapter_by_itself_is_compared_with_its_own_base(tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, use_peft=True)
    of_run = run_evaluation(str(run.path), **NOTHING, limit=None, argv=[])
    data = {"base": None, "data": str(tmp_path / "pairs.jsonl"), "split": "train"}
    of_adapter = run_evaluation(str(run.adapter), **data, limit=None, argv=["--max_length", "64"])
    assert of_adapter["base"]["model"] == str(tiny_gpt2)
    assert of_adapter["data"]["pairs"] > of_run["data"]["pairs"]
    assert of_adapter["tuned"]["margin"]["value"] != 0.0


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_process(run):
    record = run_evaluation(str(run.path), **NOTHING, limit=None, argv=[])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "ddp_cpu.yaml")]
    command = [sys.executable, *launcher, "-m", "dpokit.cli", "evaluate", str(run.path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    of_two = json.loads(done.stdout[done.stdout.index("{") :])
    assert of_two == json.loads(json.dumps(record)) | {"made": of_two["made"]}
    assert len(run.evaluations()) == 2


def test_the_command_prints_table_and_verdict_in_80_columns(run):
    done = dpokit("evaluate", str(run.path), "--limit", "5")
    assert done.returncode == 0, done.stderr
    assert "5 held-out pairs" in done.stdout
    assert "ranking accuracy" in done.stdout
    assert "No difference to its base is shown: 5 held-out prompts are too few" in " ".join(done.stdout.split())
    table = done.stdout[: done.stdout.index("accuracy of always")]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("run_or_model", "data", "error", "message"),
    [
        ("", None, RunFolderError, "holds neither a run"),
        ("nothing", "pairs.jsonl", ModelError, "no tokenizer could be loaded"),
        ("run/model", None, SettingsError, "no data was named"),
        ("run/model", "none.jsonl", DataError, "none.jsonl"),
    ],
)
@pytest.mark.usefixtures("run")
def test_an_invalid_model_or_data_is_refused(run_or_model, data, error, message, tmp_path):
    arguments = NOTHING | {"data": data and str(tmp_path / data)}
    with pytest.raises(error, match=message):
        run_evaluation(str(tmp_path / run_or_model), **arguments, limit=None, argv=[])


def test_a_run_without_weights_is_refused(run):
    run.model.rename(run.path / "elsewhere")
    with pytest.raises(RunFolderError, match="holds no weights"):
        run_evaluation(str(run.path), **NOTHING, limit=None, argv=[])


def test_a_base_with_another_vocabulary_is_refused(run, tiny_qwen2):
    with pytest.raises(ModelError, match="has another vocabulary"):
        run_evaluation(str(run.path), **NOTHING | {"base": str(tiny_qwen2)}, limit=None, argv=[])
