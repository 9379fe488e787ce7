"""Shared prompts and a cached reference: they change no number, and a run goes on without them."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpokit.interrupts import Preempted
from dpokit.model import reference
from dpokit.model.reference import PartScores, ReferenceCache
from dpokit.run import prepare_run, train
from dpokit.rundir import RunDir, read_metrics
from dpokit.train.scoring import ScoringTrainer

TIMING = ("seconds", "runtime", "per_second", "wasted", "total_flos")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """A cache for each test, in parts of 8 pairs."""
    monkeypatch.setenv("DPOKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "PART_PAIRS", 8)
    return tmp_path / "cache" / "reference"


@pytest.fixture
def run(tiny_gpt2, pairs_file, tmp_path):
    """Trains with the given flags, each run in a folder of its own."""
    made = []

    def train_with(*flags: str) -> RunDir:
        made.append(flags)
        defaults = {
            "model_name_or_path": str(tiny_gpt2),
            "dataset_name": str(pairs_file),
            "output_dir": str(tmp_path / f"run{len(made)}"),
            "eval_fraction": 0.2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_length": 96,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "report_to": "none",
        }
        return train("dpo_test", defaults, list(flags))

    return train_with


def check_same_numbers(first: RunDir, second: RunDir) -> None:
    lines = list(zip(read_metrics(first.metrics_jsonl), read_metrics(second.metrics_jsonl), strict=True))
    assert len(lines) == 8
    for line, expected in lines:
        assert line.keys() == expected.keys()
        # Before the first update each margin is 0, and its sign is rounding.
        skipped = [*TIMING, "accuracies"] if line["step"] == 1 else TIMING
        for name in (name for name in line if not any(word in name for word in skipped)):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (line["step"], name)


def find_lines(screen: str, start: str) -> list[str]:
    return [line for line in screen.replace("\r", "\n").splitlines() if line.startswith(start)]


@pytest.mark.parametrize("kind", [[], ["--use_peft", "--lora_r", "4", "--lora_target_modules", "c_attn", "c_fc"]])
def test_shared_prompts_and_a_cached_reference_change_no_number(kind, run):
    plain = run("--shared_prefix", "false", "--precompute_ref_log_probs", "false", *kind)
    shared = run("--precompute_ref_log_probs", "false", *kind)
    cached = run(*kind)
    assert plain.read_run()["shared_prefix"] == "off: --shared_prefix false"
    assert shared.read_run()["shared_prefix"] == cached.read_run()["shared_prefix"] == "on"
    assert cached.read_run()["settings"]["precompute_ref_log_probs"] == {"value": True, "origin": "this machine"}
    check_same_numbers(shared, plain)
    check_same_numbers(cached, plain)
    assert read_metrics(plain.metrics_jsonl)[0]["wasted_positions"] > 0.3
    assert read_metrics(shared.metrics_jsonl)[0]["wasted_positions"] == 0
    assert read_metrics(shared.metrics_jsonl)[0]["tokens_per_second"] > 0


def test_pairs_of_one_prompt_change_no_number(run, pairs_file, capfd):
    write_pairs(pairs_file, 40, of_a_prompt=4)
    plain = run("--shared_prefix", "false", "--precompute_ref_log_probs", "false")
    shared = run("--precompute_ref_log_probs", "false")
    cached = run()
    assert shared.read_run()["shared_prefix"] == "on"
    check_same_numbers(shared, plain)
    check_same_numbers(cached, plain)
    positions = [read_metrics(made.metrics_jsonl)[0]["wasted_positions"] for made in (plain, shared)]
    assert positions[0] > 0.5
    assert positions[1] == 0
    capfd.readouterr()
    apart = run("--group_by_prompt", "false")
    assert len(find_lines(capfd.readouterr().err, "reference log-probs: 32 of 32 pairs were cached")) == 1
    steps = [read_metrics(made.metrics_jsonl)[0]["logps/chosen"] for made in (cached, apart)]
    assert steps[0] != pytest.approx(steps[1], rel=1e-4), "other pairs in a step"


def test_with_dropout_prompts_are_not_shared(run, capfd):
    made = run("--disable_dropout", "false")
    assert "dropout is on" in made.read_run()["shared_prefix"]
    assert len(find_lines(capfd.readouterr().err, "shared prefix: off, as dropout is on")) == 1


def test_a_first_batch_that_differs_turns_sharing_off(run, capfd, monkeypatch):
    monkeypatch.setattr("dpokit.model.score.LARGEST_IN_FP32", -1.0)
    made = run("--precompute_ref_log_probs", "false")
    assert "the first pairs' log-probs differ" in made.read_run()["shared_prefix"]
    assert len(find_lines(capfd.readouterr().err, "shared prefix: off")) == 1
    assert made.read_run()["state"] == "finished"


def test_runs_of_other_rates_and_folders_use_the_cache(run, cache, capfd):
    first = run()
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(written) == 4 + 1  # 32 pairs to train on, 8 held out
    second = run("--learning_rate", "1e-4", "--beta", "0.3")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == written
    assert len(find_lines(capfd.readouterr().err, "reference log-probs: 32 of 32 pairs were cached")) == 1
    before, after = (read_metrics(made.metrics_jsonl)[0]["logps/chosen"] for made in (first, second))
    assert after == pytest.approx(before)


@pytest.mark.parametrize("changed", [["--ld_alpha", "0.5"], ["--max_length", "40"], ["--dtype", "bfloat16"]])
def test_another_truncation_or_dtype_is_cached_apart(changed, run, cache):
    run()
    folders = set(cache.iterdir())
    run(*changed)
    assert len(set(cache.iterdir()) - folders) == 2


@pytest.mark.parametrize("damage", ["torn", "changed", "missing"])
def test_a_damaged_part_is_computed_again(damage, run, cache, capfd):
    first = run()
    part = sorted(cache.rglob("00000008.safetensors"))[0]
    before = load_file(part)["log_probs"].clone()  # a copy, as the file is damaged below
    if damage == "torn":
        part.write_bytes(part.read_bytes()[:40])
    elif damage == "changed":
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(bytes(content))
    else:
        part.unlink()
    second = run()
    screen = capfd.readouterr().err
    assert (f"{part}" in screen) == (damage != "missing")
    torch.testing.assert_close(load_file(part)["log_probs"], before)
    check_same_numbers(second, first)


def test_a_cache_of_other_weights_is_computed_again(run, cache, capfd):
    first = run()
    for part in cache.rglob("*.safetensors"):
        scores = PartScores(**{name: values + 5 for name, values in load_file(part).items()})
        save_file(scores.tensors(), part, metadata={"sha256": reference._hash(scores)})
    second = run()
    assert "the cache is of other weights" in capfd.readouterr().err
    check_same_numbers(second, first)


@pytest.fixture
def lively_gpt2(tiny_gpt2, tmp_path) -> Path:
    """A random GPT-2 with weights so large that its log-probs depend on every token, as a pretrained model's do."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_gpt2, initializer_range=0.3)
    folder = tmp_path / "lively"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", [["--bf16", "false"], ["--bf16", "true"], ["--dtype", "bfloat16"]])
@pytest.mark.parametrize("share", [0.0, 0.01])
def test_a_cache_is_used_if_and_only_if_the_weights_are_the_same(
    share, precision, lively_gpt2, run, monkeypatch, capfd
):
    """Weights that were changed by 1 % under the same name are found, in 16 bits too."""
    monkeypatch.setattr("dpokit.run.find_identity", lambda _: {})
    flags = ["--model_name_or_path", str(lively_gpt2), "--gates", "warn", *precision]
    run(*flags)
    assert not find_lines(capfd.readouterr().err, "gate")
    model = AutoModelForCausalLM.from_pretrained(lively_gpt2)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + share * torch.randn(weight.shape))
    model.save_pretrained(lively_gpt2)
    made = run(*flags, "--per_device_train_batch_size", "2")
    screen = capfd.readouterr().err
    assert screen.count("pairs were cached") == (0 if share else 2), "one for each split"
    assert screen.count("the cache is of other weights") == (2 if share else 0)
    assert made.read_run()["shared_prefix"] == "on"


def test_a_cache_that_cannot_be_written_costs_one_line(run, monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPOKIT_CACHE", str(tmp_path / "file"))
    assert run().read_run()["state"] == "finished"
    # One line for each split.
    assert len(find_lines(capfd.readouterr().err, "reference log-probs: not kept")) == 2


def test_two_writers_of_a_part_leave_one_complete_file(tmp_path):
    caches = [ReferenceCache(tmp_path, {"a": 1}, 8) for _ in range(2)]
    scores = PartScores(torch.arange(16.0).view(2, 8), torch.tensor([0.0, 8.0]))
    for cache in caches:
        cache.write(range(8), scores)
    assert caches[0].is_complete()
    read = caches[1].read(range(8)).tensors()
    assert all(torch.equal(read[name], values) for name, values in scores.tensors().items())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["00000000.safetensors"]


def test_for_one_epoch_the_reference_is_not_precomputed(run):
    made = run("--num_train_epochs", "1")
    assert made.read_run()["settings"]["precompute_ref_log_probs"]["value"] is False


def test_a_run_of_one_epoch_uses_what_prepare_has_cached(tiny_gpt2, pairs_file, cache, tmp_path, capfd):
    flags = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file), "--eval_fraction", "0.2"]
    flags += ["--max_length", "96", "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1"]
    flags += ["--eval_strategy", "epoch", "--logging_steps", "1", "--per_device_train_batch_size", "8"]
    record = prepare_run("dpo_test", {}, flags)
    assert record["train"]["kept"] == 32
    assert not (tmp_path / "run").exists()
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    capfd.readouterr()
    made = train("dpo_test", {}, flags)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == written
    assert made.read_run()["settings"]["precompute_ref_log_probs"] == {"value": True, "origin": "this machine"}
    assert "32 of 32 pairs were cached" in capfd.readouterr().err


def test_a_signal_while_the_reference_is_computed_ends_the_run(run, monkeypatch, capfd):
    score = ScoringTrainer._score_rows

    def score_with_a_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(ScoringTrainer, "_score_rows", score_with_a_signal)
        run()
    assert "SIGTERM on rank 0: ending" in capfd.readouterr().err
    run()
    assert "reference log-probs: 8 of 32 pairs were cached" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_cpu", "zero2_cpu", "zero3_cpu", "fsdp2_cpu"])
def test_two_processes_share_and_cache_as_one_does(config, tiny_gpt2, tmp_path, cache):
    """17 and 7 pairs: in the last batch one rank has only a dummy."""
    from conftest import ROOT
    from test_launch import launch

    data = tmp_path / "data"
    data.mkdir()
    write_pairs(data / "train.jsonl", 17)
    write_pairs(data / "test.jsonl", 7)
    flags = [
        *("--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(data), "--num_train_epochs", "2"),
        *("--logging_steps", "1", "--max_length", "96", "--learning_rate", "1e-3", "--warmup_steps", "0"),
        *("--eval_steps", "2", "--save_steps", "2", "--gradient_accumulation_steps", "2", "--use_cpu"),
        *("--loss_type", "sigmoid", "--loss_weights", "1.0"),
    ]
    folders = []
    for name, config_file, per_device in (("one", "single_gpu", "4"), ("two", config, "2")):
        folders.append(tmp_path / name)
        launcher = ["--config_file", str(ROOT / "accelerate_configs" / f"{config_file}.yaml")]
        done = launch(
            launcher, *flags, "--per_device_train_batch_size", per_device, "--output_dir", str(tmp_path / name)
        )
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["state"] == "finished"
        assert record["shared_prefix"] == "on"
        assert record["settings"]["precompute_ref_log_probs"]["value"] is True
    assert len(list(cache.rglob("*.safetensors"))) == 2, "the second run used the cache of the first"
    for line, expected in zip(*(read_metrics(RunDir(folder).metrics_jsonl) for folder in folders), strict=True):
        for name in (name for name in line if not any(word in name for word in TIMING)):
            assert line[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-6), (line["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero3_cpu", "fsdp2_cpu"])
def test_two_processes_share_prompts_in_bf16(config, tiny_gpt2, pairs_file, tmp_path):
    """Sharded weights in 16 bits are compared in 16 bits: a comparison in fp32 would break their gathering."""
    from conftest import ROOT
    from test_launch import launch

    flags = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file), "--eval_fraction", "0.2"]
    flags += ["--max_length", "96", "--max_steps", "2", "--bf16", "true", "--precompute_ref_log_probs", "true"]
    flags += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--use_cpu"]
    flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    screens = []
    for name in ("first", "second"):
        launcher = ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
        done = launch(launcher, *flags, "--output_dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert (record["state"], record["shared_prefix"]) == ("finished", "on")
        screens.append(done.stderr)
    assert "pairs were cached" in screens[1]


def test_a_run_goes_on_without_permission_to_read_the_cache(run, cache, monkeypatch):
    original = Path.is_file

    def refuse(path):
        if cache in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "is_file", refuse)  # no file mode keeps root from reading
    assert run().read_run()["state"] == "finished"


def test_a_stream_is_prepared_without_its_reference(tiny_gpt2, pairs_file, tmp_path, capfd):
    flags = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file), "--max_length", "96"]
    flags += ["--dataset_streaming", "true", "--max_steps", "2", "--eval_strategy", "no"]
    prepare_run("dpo_test", {}, [*flags, "--output_dir", str(tmp_path / "run")])
    assert "reference log-probs are not computed" in capfd.readouterr().err
