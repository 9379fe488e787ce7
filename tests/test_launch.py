"""Training under the real launchers: with one process, with two, and with fewer than requested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_pairs

TWO = ["--config_file", str(ROOT / "accelerate_configs" / "ddp_cpu.yaml")]
ONE = ["--config_file", str(ROOT / "accelerate_configs" / "single_gpu.yaml")]


def launch(launcher: list[str], *flags: str, recipe: str = "dpo_gpt2") -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "recipes" / f"{recipe}.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, script, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=420, check=False)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("train_pairs", "steps"), [pytest.param(31, 8, marks=pytest.mark.cold), (33, 10)])
def test_two_processes_have_the_same_numbers_and_weights_as_one(train_pairs, steps, tiny_gpt2, tmp_path):
    """The batch divides neither training nor held-out pairs; with 33 pairs, one rank repeats a row in the last step."""
    from safetensors.torch import load_file

    data = tmp_path / "data"
    data.mkdir()
    write_pairs(data / "train.jsonl", train_pairs)
    write_pairs(data / "test.jsonl", 7)
    flags = [
        *("--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(data), "--num_train_epochs", "2"),
        *("--logging_steps", "1", "--max_length", "96", "--learning_rate", "1e-3", "--warmup_steps", "0"),
        *("--loss_type", "sigmoid", "--loss_weights", "1.0", "--eval_steps", "2", "--save_steps", "2"),
    ]
    one = [*flags, "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "4"]
    two = [*flags, "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    for launcher, argv in ((ONE, one), (TWO, two)):
        done = launch(launcher, *argv, "--gradient_accumulation_steps", "2", "--per_device_eval_batch_size", "2")
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["world_size"] == 2
    pairs = list(zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True))
    assert len(pairs) == steps
    timing = ("seconds", "runtime", "per_second", "total_flos", "wasted_positions")
    for a, b in pairs:
        assert a.keys() == b.keys()
        for name in a:
            if not any(word in name for word in timing):
                assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-6), (a["step"], name)
        assert a.get("num_tokens") == b.get("num_tokens")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert (weight - weights[1][name]).abs().max() < 2e-5, name


@pytest.mark.parametrize("config", [None, *sorted((ROOT / "accelerate_configs").glob("*.yaml"))], ids=str)
def test_a_placement_sets_every_value_that_accelerate_warns_of(config, monkeypatch, tmp_path):
    """Without a config, accelerate lists the values that it assumes, as docs/settings.md explains."""
    from accelerate.commands import launch as launcher

    warnings: list[str] = []
    monkeypatch.setattr(launcher.logger, "warning", lambda message, *_, **__: warnings.append(message))
    monkeypatch.setattr(launcher, "default_config_file", str(tmp_path / "none"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    argv = ["--config_file", str(config)] if config else []
    launcher._validate_launch_command(launcher.launch_command_parser().parse_args([*argv, "recipe.py"]))
    assert bool(warnings) == (config is None), warnings


def test_a_recipe_says_at_once_that_it_has_begun():
    """The line comes before the imports, which take seconds, and once for any number of processes."""
    done = launch(TWO, "--learning_rat", "1e-4")
    first = next(line for line in done.stderr.splitlines() if line)
    assert first == "dpo_gpt2: importing torch, transformers and TRL"
    assert done.stderr.count("importing torch") == 1


def test_a_launcher_that_drops_num_processes_is_refused(tiny_gpt2, pairs_file, tmp_path):
    done = launch(
        ["--cpu", "--num_processes", "2"],
        *("--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file)),
        *("--output_dir", str(tmp_path / "run"), "--eval_fraction", "0.2", "--max_length", "96"),
    )
    assert done.returncode != 0
    assert "2 processes were asked for (accelerate launch --num_processes 2), but 1 is training" in done.stderr
    assert "ddp_cpu.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.cold
def test_a_misspelt_flag_is_one_message_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "dpo_gpt2.py"), "--learning_rat", "1e-4"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean --learning_rate?" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_data_ends_two_processes_with_one_message(tiny_gpt2, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": \n')
    flags = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(tmp_path / "bad.jsonl")]
    flags += ["--output_dir", str(tmp_path / "run"), "--max_length", "96"]
    record = tmp_path / "run" / "run.json"
    for expected in ("DataError: ", "RunFolderError: "):
        done = launch(TWO, *flags)
        assert done.returncode != 0
        assert done.stderr.count(expected) == 1
        assert "[rank1]" not in done.stderr
        assert "failed" in record.read_text()
        # As after a first step: the folder then belongs to this run.
        record.write_text(json.dumps(json.loads(record.read_text()) | {"shared_prefix": "on"}))
        flags += ["--resume_from_checkpoint", "never"]


@pytest.mark.slow
def test_a_twelve_layer_gpt2_trains_on_real_hh_rows(shared, tmp_path):
    """Random weights, real tokenizer and rows, GPT-2's own depth and width."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "gpt2-tokenizer")
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config()).save_pretrained(model)
    tokenizer.save_pretrained(model)
    done = launch(
        TWO,
        *("--model_name_or_path", str(model), "--dataset_name", str(shared / "data" / "hh-rlhf" / "harmless-base")),
        *("--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--max_length", "96", "--logging_steps", "1"),
        *("--max_eval_samples", "8", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
        *("--eval_steps", "3", "--save_strategy", "no", "--load_best_model_at_end", "false"),
        *("--per_device_eval_batch_size", "4", "--loss_type", "sigmoid", "--loss_weights", "1.0"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["train"]["dropped"] == {"different_prompts": 4, "empty_answer": 1}
    logged = records(tmp_path / "run")
    assert [record["step"] for record in logged] == [1, 2, 3]
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert logged[-1]["eval_loss"] > 0
