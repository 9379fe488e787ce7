"""Short versions of the faults in tests/soak/: real processes that are killed, signalled, or out of disk."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from compare_runs import check_same
from safetensors.torch import load_file
from small_disk import enlarge, small_disk
from soak.faults import make_flags, soak_files
from soak.lives import LIFE_SECONDS, Lives

from dpokit.checkpoint.store import find_checkpoints
from dpokit.rundir import RunDir, read_metrics

pytestmark = pytest.mark.slow


LONG = 60  # steps of a run that a test interrupts: enough that the run does not end before the test acts


def build_lives(folder: Path, name: str, *more: str, config: str | None, steps: int = 20) -> Lives:
    flags = [*make_flags(folder, list(more)), "--max_steps", str(steps)]
    return Lives(RunDir(folder / name), flags, config, folder / "cache")


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (None, ["--disable_dropout", "false"]),
        ("ddp_cpu", ["--gradient_accumulation_steps", "2", "--max_train_samples", "30"]),
        ("zero2_cpu", ["--disable_dropout", "false"]),
        ("zero3_cpu", ["--precompute_ref_log_probs"]),
        ("fsdp2_cpu", []),
        ("ddp_cpu", ["--use_peft", "--load_in_4bit"]),
    ],
    ids=["one", "ddp", "zero2", "zero3", "fsdp2", "qlora"],
)
def test_a_run_killed_at_random_times_ends_the_same(config, more, tmp_path):
    whole = build_lives(tmp_path, "whole", *more, config=config)
    whole.finish()
    lives = build_lives(tmp_path, "killed", *more, config=config)
    chance = random.Random(str(config))
    for _ in range(2):
        lives.kill_at_random(chance, most_seconds=0.6)
    if (lives.run.read_run() or {}).get("state") != "finished":
        lives.finish()
    check_same(lives.run, whole.run)


@pytest.mark.alone  # the last file of a checkpoint exists under its temporary name only for a moment
def test_a_run_killed_while_it_writes_any_file_ends_the_same(tmp_path):
    assert "manifest.json" in soak_files(tmp_path)["files"]


@pytest.mark.parametrize(
    ("config", "numbers"),
    [("ddp_cpu", (2, 1, 2)), ("zero2_cpu", (2, 1, 2)), ("zero3_cpu", (2, 3)), ("fsdp2_cpu", (2, 3))],
)
def test_another_number_of_processes_keeps_losses_and_weights(config, numbers, tmp_path):
    """They are equal up to rounding: sums over ranks are added in another order."""
    more = ["--loss_type", "sigmoid", "--loss_weights", "1", "--gradient_accumulation_steps", "3"]
    whole = build_lives(tmp_path, "whole", *more, config=config)
    whole.finish()
    lives = build_lives(tmp_path, "moved", *more, config=config)
    for number, step in zip(numbers, (6, 11, 99), strict=False):
        alone = config == "ddp_cpu" and number == 1  # accelerate's DDP launcher needs several processes
        lives.config, lives.launcher = None if alone else config, ["--num_processes", str(number)]
        if number != numbers[-1] or step == 6:
            lives.kill_when(lambda step=step: lives.last_step() >= step)
    lives.finish()
    ends = [load_file(run.model / "model.safetensors") for run in (lives.run, whole.run)]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-5) for name in ends[1])
    counts, losses = zip(*(read_numbers(run) for run in (lives.run, whole.run)), strict=True)
    assert counts[0] == counts[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    worlds = [json.loads((path / "manifest.json").read_text())["world_size"] for path in lives.run.checkpoints()]
    assert set(worlds) <= set(numbers)
    accumulation = lives.run.read_run()["settings"]["gradient_accumulation_steps"]
    changed = {"value": 2, "origin": "resume"}
    assert accumulation == (changed if numbers[-1] == 3 else {"value": 3, "origin": "command line"})


def read_numbers(run: RunDir) -> tuple[list[tuple[int, float]], list[float]]:
    """Step and token count of each log, and its loss."""
    records = [record for record in read_metrics(run.metrics_jsonl) if "loss" in record]
    return [(record["step"], record["num_tokens"]) for record in records], [record["loss"] for record in records]


def workers_of(launcher: subprocess.Popen) -> dict[str, psutil.Process]:
    workers = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        try:
            workers[child.environ().get("RANK", "")] = child
        except psutil.Error:
            continue
    workers.pop("", None)
    return workers


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_rank_saves_all_at_the_same_step(sign, tmp_path):
    whole = build_lives(tmp_path, "whole", config="ddp_cpu", steps=LONG)
    whole.finish()
    lives = build_lives(tmp_path, "preempted", config="ddp_cpu", steps=LONG)
    lives.launcher = ["--max_restarts", "1"]  # for crashes only: a preempted worker is not restarted
    with lives.living() as launcher:
        while lives.last_step() < 6:
            assert launcher.poll() is None, lives.last_log()[-3000:]
            time.sleep(0.01)
        workers_of(launcher)["1"].send_signal(sign)
        time.sleep(0.3)  # the other rank gets its signal later, or after the end
        for worker in workers_of(launcher).values():
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(sign)
        assert launcher.wait(timeout=120) != 0, "it must not look completed"
    record = lives.run.read_run()
    assert record["state"] == "preempted"
    assert f"{sign.name} on rank 1" in record["why"]
    newest = find_checkpoints(lives.run, deep=True)[0]
    assert newest.resume_problem is None
    assert newest.step == read_metrics(lives.run.metrics_jsonl)[-1]["step"]
    assert "saving step" in lives.last_log()
    lives.finish()
    check_same(lives.run, whole.run)


def test_a_signal_to_a_single_process_ends_it_with_75(tmp_path):
    lives = build_lives(tmp_path, "run", config=None, steps=LONG)
    with lives.living() as process:
        while lives.last_step() < 3:
            assert process.poll() is None, lives.last_log()[-3000:]
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    assert "Traceback" not in lives.last_log()
    lives.finish()


@pytest.mark.parametrize("config", [None, "zero2_cpu", "zero3_cpu", "fsdp2_cpu"])
def test_a_full_disk_during_a_save_keeps_earlier_checkpoints(config, tmp_path):
    small = tmp_path / "small"
    with small_disk(small, "4m"):
        lives = Lives(RunDir(small / "run"), make_flags(tmp_path, []), config, tmp_path / "cache")
        with lives.living() as process:
            assert process.wait(timeout=LIFE_SECONDS) == (2 if config is None else 1), lives.last_log()[-3000:]
        assert "no space is left" in lives.last_log()
        record = json.loads((small / "run" / "run.json").read_text())
        assert record["state"] == "failed", lives.last_log()[-3000:]
        checkpoints = find_checkpoints(lives.run, deep=True)
        assert checkpoints
        assert not any(checkpoint.resume_problem for checkpoint in checkpoints)
        assert not list((small / "run").glob(".checkpoint-*"))
        enlarge(small, "64m")
        lives.finish()


def test_a_launcher_restarts_a_killed_rank_without_loss(tmp_path):
    whole = build_lives(tmp_path, "whole", config="ddp_cpu", steps=LONG)
    whole.finish()
    lives = build_lives(tmp_path, "restarted", config="ddp_cpu", steps=LONG)
    lives.launcher = ["--max_restarts", "1"]
    with lives.living() as launcher:
        while lives.last_step() < 6:
            assert launcher.poll() is None, lives.last_log()[-3000:]
            time.sleep(0.01)
        workers_of(launcher)["1"].kill()
        assert launcher.wait(timeout=180) == 0, lives.last_log()[-3000:]
    check_same(lives.run, whole.run)
    assert len(lives.run.read_run()["generations"]) == 2


def test_a_start_that_was_taken_over_writes_nothing_more(tmp_path):
    whole = build_lives(tmp_path, "whole", config=None, steps=LONG)
    whole.finish()
    lives = build_lives(tmp_path, "twice", config=None, steps=LONG)
    with lives.living() as cut_off:
        while lives.last_step() < 6:
            assert cut_off.poll() is None, lives.last_log()[-3000:]
            time.sleep(0.001)
        os.kill(cut_off.pid, signal.SIGSTOP)
        log_of_the_first = lives.run.path.with_name(f"twice.{lives.starts}.log")
        lives.finish()
        os.kill(cut_off.pid, signal.SIGCONT)
        assert cut_off.wait(timeout=60) == 2
    log = log_of_the_first.read_text()
    assert "was taken over by a later start of this run" in log
    assert "Traceback" not in log
    check_same(lives.run, whole.run)
    assert lives.run.read_run()["state"] == "finished"


def test_a_run_saves_and_ends_ahead_of_a_known_time_limit(tmp_path, monkeypatch):
    lives = build_lives(tmp_path, "limited", "--save_before_seconds", "1000", "--save_steps", "1000", config=None)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 900))
    with lives.living() as process:
        assert process.wait(timeout=120) == 75, lives.last_log()[-3000:]
    assert lives.run.read_run()["why"] == "the job's time limit is near"
    assert lives.last_good() == 1
