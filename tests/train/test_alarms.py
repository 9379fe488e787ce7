"""Alarms of an evaluation, and a run that overfits on purpose."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import GPT2Config, GPT2LMHeadModel
from trl import DPOConfig

from dpokit.run import train
from dpokit.rundir import RunDir, read_metrics
from dpokit.train.alarms import find_alarms, find_answer_alarms, find_lowest_loss

SIDES = ("chosen", "rejected")
HEALTHY = {
    "eval_loss": 0.6,
    "eval_rewards/accuracies": 0.7,
    "eval_rewards/chosen": -0.5,
    "eval_logps/chosen": -105.0,
}


@pytest.fixture
def args(tmp_path) -> DPOConfig:
    return DPOConfig(output_dir=str(tmp_path), beta=0.1, report_to="none", use_cpu=True, bf16=False)


def test_a_healthy_evaluation_raises_no_alarm(args):
    assert find_alarms(HEALTHY, args) == {}


def test_a_loss_above_ln_2_raises_an_alarm_with_the_accuracy(args):
    text = find_alarms(HEALTHY | {"eval_loss": 1.57, "eval_rewards/accuracies": 0.64}, args)["worse_than_base"]
    assert "1.570 is above 0.693" in text
    assert "64%" in text


def test_loss_weights_scale_the_limit_of_the_alarm(args):
    args.loss_weights = [2.0]
    assert find_alarms(HEALTHY | {"eval_loss": 1.2}, args) == {}
    assert "1.386" in find_alarms(HEALTHY | {"eval_loss": 1.4}, args)["worse_than_base"]


def test_ln_2_is_no_limit_for_a_loss_that_starts_elsewhere(args):
    args.loss_type = ["ipo"]
    assert find_alarms(HEALTHY | {"eval_loss": 25.0}, args) == {}


@pytest.mark.parametrize(("best", "kinds"), [(21.0, set()), (20.0, {"past_its_best"}), (-30.0, {"past_its_best"})])
def test_any_loss_far_above_its_lowest_value_raises_an_alarm(best, kinds, args):
    args.loss_type = ["ipo"]
    assert find_alarms(HEALTHY | {"eval_loss": 25.0}, args, best=(best, 4)).keys() == kinds


def test_chosen_log_probs_that_fall_by_half_raise_an_alarm(args):
    # The base gives -100 (-105 + 0.5 / 0.1), so the limit is -150.
    assert find_alarms(HEALTHY | {"eval_logps/chosen": -149.0, "eval_rewards/chosen": -4.9}, args) == {}
    text = find_alarms(HEALTHY | {"eval_logps/chosen": -151.0, "eval_rewards/chosen": -5.1}, args)["chosen_collapse"]
    assert "fallen by 51 on average (the base gives -100)" in text


BASE_ANSWERS = {"repetition": 0.05, "mean_tokens": 40.0, "ended": 0.5}


@pytest.mark.parametrize(
    ("now", "kinds"),
    [
        ({}, set()),
        ({"repetition": 0.29, "mean_tokens": 5.0}, set()),
        ({"repetition": 0.31}, {"answers_repeat"}),
        ({"mean_tokens": 3.0}, {"answers_vanish"}),
        ({"ended": 0.125}, set()),
        ({"ended": 0.0}, {"answers_endless"}),
    ],
)
def test_answers_much_worse_than_the_bases_raise_alarms(now, kinds):
    assert find_answer_alarms(BASE_ANSWERS, BASE_ANSWERS | now).keys() == kinds


def test_no_endless_alarm_if_the_bases_answers_seldom_end():
    base = BASE_ANSWERS | {"ended": 0.25}
    assert find_answer_alarms(base, base | {"ended": 0.0}) == {}


def test_the_lowest_loss_ignores_losses_that_are_not_finite():
    history = [{"step": 2, "eval_loss": 0.6}, {"step": 4, "eval_loss": 0.5}, {"step": 6, "eval_loss": float("nan")}]
    assert find_lowest_loss(history) == (0.5, 4)


def write_noise(path: Path) -> Path:
    """Pairs that can only be memorised: the chosen answer is random."""
    chance, vocabulary = random.Random(0), ["flour", "water", "salt", "bread", "garden", "sky", "green", "blue"]
    rows = [
        {"prompt": f"Human: number {row}?", **{side: " " + " ".join(chance.choices(vocabulary, k=6)) for side in SIDES}}
        for row in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_overfitting_run_alarms_once_and_keeps_its_best_model(tiny_gpt2, tmp_path, capfd):
    """Few rows, a high learning rate and many epochs, as in the published runs."""
    settings = {
        "model_name_or_path": str(tiny_gpt2),
        "dataset_name": str(write_noise(tmp_path / "pairs.jsonl")),
        "output_dir": str(tmp_path / "run"),
        "eval_fraction": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_steps": 5,
        "max_steps": 60,
        "learning_rate": 5e-3,
        "beta": 0.5,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "report_to": "none",
        "use_cpu": True,
    }
    train("dpo_test", settings, [])
    screen, run = capfd.readouterr().err, RunDir(tmp_path / "run")
    losses = {
        record["step"]: record["eval_loss"] for record in read_metrics(run.metrics_jsonl) if "eval_loss" in record
    }
    assert max(losses.values()) > 0.7
    assert screen.count("is above 0.693, the loss of the untrained base") == 1
    alarm = next(alarm for alarm in run.read_run()["alarms"] if alarm["kind"] == "worse_than_base")
    assert (
        losses[alarm["step"]]
        > 0.693
        >= max((loss for step, loss in losses.items() if step < alarm["step"]), default=0.0)
    )
    assert run.read_run()["answers_of_base"]["mean_tokens"] > 0
    assert run.read_run()["best"]["step"] == min(losses, key=losses.get)


@pytest.mark.slow
@pytest.mark.long
def test_a_published_run_of_200_rows_raises_an_alarm(shared, plain_tokenizer, tmp_path, capfd):
    """Its own settings on real rows; the model and its vocabulary are small, in place of GPT-2 124M."""
    model = tmp_path / "model"
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": len(plain_tokenizer)}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(model)
    plain_tokenizer.save_pretrained(model)
    preset = ROOT / "recipes" / "presets" / "gpt2_hh_200_rows.yaml"
    flags = ["--config", str(preset), "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "run")]
    rows = ["--dataset_name", str(shared / "data" / "hh-rlhf" / "harmless-base")]
    run = train("dpo_gpt2", {}, [*flags, *rows, "--bf16", "false", "--use_cpu", "--report_to", "none"])
    (alarm,) = run.read_run()["alarms"]
    assert (alarm["kind"], alarm["step"]) == ("worse_than_base", 1000)
    assert "It was best at step 500" in alarm["text"]
    assert alarm["text"] in capfd.readouterr().err
    assert run.read_run()["best"]["step"] == 500
