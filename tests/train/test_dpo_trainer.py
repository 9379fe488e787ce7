"""Losses against a float64 oracle; steps that do not depend on how they are split."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from reference_dpo import answer_log_prob, dpo_loss
from transformers import AutoModelForCausalLM

from dpokit.checkpoint.resume import claim_folder
from dpokit.run import build_trainer, train
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings
from dpokit.train.gates import Gates

LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
BASE = {
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "report_to": "none",
}


def build(model: Path, pairs: Path, output: Path, **changes):
    settings = load_settings(
        "dpo_test",
        {**BASE, "model_name_or_path": str(model), "dataset_name": str(pairs), "output_dir": str(output), **changes},
        [],
    )
    run = RunDir(output)
    claim_folder(run, settings, world_size=1, placement="one device")
    return build_trainer(run, settings, Gates(settings.data.gates))


def run_steps(model: Path, pairs: Path, output: Path, **changes) -> tuple[list[dict], dict[str, torch.Tensor]]:
    defaults = {**BASE, "model_name_or_path": str(model), "dataset_name": str(pairs), "output_dir": str(output)}
    run = train("dpo_test", {**defaults, **changes}, [])
    records = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    return records, AutoModelForCausalLM.from_pretrained(run.model).state_dict()


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_log_probs_equal_the_float64_oracle(kind, tiny_gpt2, pairs_file, tmp_path):
    smoothing, beta = 0.1, 0.3
    trainer, data = build(
        tiny_gpt2,
        pairs_file,
        tmp_path / "run",
        loss_type=kind,
        beta=beta,
        label_smoothing=smoothing,
        max_length=64,
        precompute_ref_log_probs=False,
    )
    policy = trainer.model
    torch.manual_seed(1)
    with torch.no_grad():  # away from the reference, where every loss would be trivial
        for weight in policy.parameters():
            weight += 0.05 * torch.randn_like(weight)
    rows = [data.train[i] for i in range(6)]
    policy.eval()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    loss = trainer.compute_loss(policy, batch)

    exact = {"policy": policy.double(), "reference": trainer.ref_model.double()}
    parts = {}
    for name, model in exact.items():
        model.forward = type(model).forward.__get__(model)  # without TRL's replaced head
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                values = [answer_log_prob(model, row["prompt_ids"], row[f"{side}_ids"]) for row in rows]
            parts[name, side] = torch.stack(values)
    lengths = [torch.tensor([len(row[f"{side}_ids"]) for row in rows]).double() for side in ("chosen", "rejected")]
    expected = dpo_loss(
        kind,
        parts["policy", "chosen"],
        parts["policy", "rejected"],
        parts["reference", "chosen"],
        parts["reference", "rejected"],
        *lengths,
        beta,
        smoothing,
    )
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    means = trainer._sums["eval"].take(trainer.accelerator)[0] | trainer._eval_loss.take(trainer.accelerator)[0]
    assert means["logps/chosen"] == pytest.approx(parts["policy", "chosen"].mean().item(), rel=1e-5)
    assert means["logps/rejected"] == pytest.approx(parts["policy", "rejected"].mean().item(), rel=1e-5)


@pytest.mark.parametrize("pairs", [40, 37])
def test_batch_8_equals_batch_1_with_accumulation_8(pairs, tiny_gpt2, tmp_path):
    """Also at the end of an epoch, where fewer pairs are left than a step takes."""
    file = write_pairs(tmp_path / "pairs.jsonl", pairs)
    whole, whole_weights = run_steps(
        tiny_gpt2, file, tmp_path / "a", per_device_train_batch_size=8, num_train_epochs=2, disable_dropout=True
    )
    parts, part_weights = run_steps(
        tiny_gpt2,
        file,
        tmp_path / "b",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        num_train_epochs=2,
        disable_dropout=True,
    )
    assert len(whole) == len(parts) == 10
    for a, b in zip(whole, parts, strict=True):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy", "mean_token_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (a["step"], name)
        assert a["num_tokens"] == b["num_tokens"]
    for name, weight in whole_weights.items():
        torch.testing.assert_close(weight, part_weights[name], rtol=1e-3, atol=2e-5)


def test_evaluation_counts_every_pair_once(tiny_gpt2, pairs_file, tmp_path):
    """13 pairs in batches of 5 give the numbers of 13 pairs in one batch."""
    results = []
    for batch_size in (5, 13):
        trainer, _ = build(
            tiny_gpt2,
            pairs_file,
            tmp_path / str(batch_size),
            eval_strategy="steps",
            eval_fraction=0.325,
            per_device_eval_batch_size=batch_size,
        )
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight += 0.02
        results.append(trainer.evaluate())
        assert len(trainer.eval_dataset) == 13
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_entropy"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5, abs=1e-6)


def test_first_loss_is_ln_2(tiny_gpt2, pairs_file, tmp_path):
    records, _ = run_steps(tiny_gpt2, pairs_file, tmp_path / "run", max_steps=1)
    assert records[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_building_a_trainer_leaves_the_settings_unchanged(tiny_gpt2, pairs_file, tmp_path):
    places = {"model_name_or_path": tiny_gpt2, "dataset_name": pairs_file, "output_dir": tmp_path / "run"}
    changes = {"num_train_epochs": 2, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {}}
    settings = load_settings("dpo_test", {**BASE, **changes, **{name: str(path) for name, path in places.items()}}, [])
    before = settings.record()
    run = RunDir(tmp_path / "run")
    claim_folder(run, settings, world_size=1, placement="one device")
    trainer, _ = build_trainer(run, settings, Gates("stop"))
    assert settings.record() == before
    assert not before["precompute_ref_log_probs"]["value"]
    assert trainer.args.precompute_ref_log_probs
    recorded = run.read_run()["settings"]
    assert recorded.pop("precompute_ref_log_probs") == {"value": True, "origin": "this machine"}
    assert recorded == {name: entry for name, entry in before.items() if name in recorded}


def test_lora_trains_the_adapter_alone_and_saves_it(tiny_gpt2, pairs_file, tmp_path):
    defaults = {**BASE, "model_name_or_path": str(tiny_gpt2), "dataset_name": str(pairs_file), "use_peft": True}
    run = train("dpo_test", {**defaults, "output_dir": str(tmp_path / "run"), "max_steps": 3}, [])
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert not run.model.exists()
    records = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert records[-1]["loss"] < 0.6931


def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_gpt2, pairs_file, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "per_device_train_batch_size": 6}
    _, weights = run_steps(tiny_gpt2, pairs_file, tmp_path / "whole", **changes)
    records, _ = run_steps(tiny_gpt2, pairs_file, tmp_path / "cut", **changes)
    run = RunDir(tmp_path / "cut")
    for later in run.checkpoints()[1:]:
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    run.write_run(state="failed", why="cut off by the test")
    resumed, resumed_weights = run_steps(tiny_gpt2, pairs_file, tmp_path / "cut", **changes)
    assert [r["step"] for r in resumed] == [r["step"] for r in records] == list(range(1, 15))
    for name, weight in weights.items():
        assert torch.equal(weight, resumed_weights[name]), name
