"""A resumed run has the pairs, numbers and weights of an uninterrupted one, or is refused with one message."""

import json
import os
import shutil
import signal
from datetime import date, timedelta
from typing import Any

import datasets
import pytest
import torch
from compare_runs import check_same, interrupt, read_steps
from conftest import write_pairs
from transformers import AutoModelForCausalLM

from dpokit.checkpoint.resume import claim_folder, compare_settings, describe_identity
from dpokit.checkpoint.store import find_checkpoints, write_manifest
from dpokit.errors import DataError, ModelError, RunFolderError, SettingsError
from dpokit.interrupts import Preempted
from dpokit.run import train
from dpokit.rundir import RunDir, read_metrics
from dpokit.settings.load import Settings, load_settings, read_run_settings
from dpokit.train.callbacks import PreemptCallback

# Single options, and combinations of them that resume differently.
OPTIONS = {
    "plain": {},
    "dropout": {"disable_dropout": False},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "epochs that do not divide": {"max_train_samples": 10},
    "rare logs": {"logging_steps": 3},
    "kept reference": {"precompute_ref_log_probs": True},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "adapter, dropout, accumulation": {
        "use_peft": True,
        "lora_dropout": 0.1,
        "disable_dropout": False,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
    },
    "kept reference, uneven epochs, rare logs": {
        "precompute_ref_log_probs": True,
        "max_train_samples": 10,
        "logging_steps": 3,
    },
    "4 bit": {"use_peft": True, "load_in_4bit": True, "learning_rate": 1e-2, "dtype": "bfloat16"},
    "dropout, uneven epochs": {"disable_dropout": False, "max_train_samples": 10},
    "evaluations": {"eval_strategy": "steps", "eval_steps": 2, "eval_fraction": 0.2, "load_best_model_at_end": True},
}


@pytest.fixture
def defaults(tiny_gpt2, tmp_path) -> dict:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    places = {"model_name_or_path": tiny_gpt2, "dataset_name": pairs, "output_dir": tmp_path / "whole"}
    return {
        **{name: str(path) for name, path in places.items()},
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 7,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
    }


@pytest.fixture
def broken(defaults, tmp_path) -> RunDir:
    """A run that crashed after step 4, with checkpoints of steps 2 and 4."""
    whole = train("dpo_test", {**defaults, "max_steps": 4, "accept_changes": ["max_steps"]}, [])
    return interrupt(whole, tmp_path / "run", after=4)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_equals_an_uninterrupted_one(name, defaults, tmp_path):
    changed = {**defaults, **OPTIONS[name]}
    whole = train("dpo_test", changed, [])
    for after in (4, 7):  # in the middle, and after the last step but before the final weights
        run = interrupt(whole, tmp_path / f"run-{after}", after=after)
        train("dpo_test", {**changed, "output_dir": str(run.path)}, [])
        check_same(run, whole)
        assert [entry["resumed_step"] for entry in run.read_run()["generations"]] == [0, after]


def test_pairs_of_one_prompt_are_together_after_a_resume(defaults, tmp_path):
    pairs = write_pairs(tmp_path / "repeated.jsonl", 22, of_a_prompt=3)
    changed = {**defaults, "dataset_name": str(pairs), "gradient_accumulation_steps": 2}
    changed |= {"per_device_train_batch_size": 3, "max_steps": 9, "save_steps": 1}  # an epoch has 4 steps
    whole = train("dpo_test", changed, [])
    for after in (2, 4, 7):
        run = interrupt(whole, tmp_path / f"run-{after}", after=after)
        train("dpo_test", {**changed, "output_dir": str(run.path)}, [])
        check_same(run, whole)


def test_a_checkpoint_from_before_grouping_has_no_groups(defaults, tmp_path):
    pairs = write_pairs(tmp_path / "repeated.jsonl", 20, of_a_prompt=4)
    apart = {**defaults, "dataset_name": str(pairs), "group_by_prompt": False}
    whole = train("dpo_test", apart, [])
    run = interrupt(whole, tmp_path / "run", after=4)
    for path in run.checkpoints():
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["settings"]["group_by_prompt"]
        facts = {name: manifest[name] for name in manifest.keys() - {"format", "step", "files", "signature", "sha256"}}
        write_manifest(path, manifest["step"], manifest["files"], facts)
    changed = {**apart, "output_dir": str(run.path)}
    with pytest.raises(RunFolderError, match="group_by_prompt was False, now True"):
        train("dpo_test", {**changed, "group_by_prompt": True}, [])
    train("dpo_test", changed, [])
    check_same(run, whole)


class Tomorrow(date):
    @classmethod
    def today(cls) -> date:
        return date.today() + timedelta(days=1)


def test_a_run_keeps_the_date_that_its_template_writes(defaults, tiny_qwen2, tmp_path, monkeypatch):
    model = shutil.copytree(tiny_qwen2, tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)
    changed = {**defaults, "model_name_or_path": str(model)}
    whole = train("dpo_test", changed, [])
    run = interrupt(whole, tmp_path / "run", after=4)
    monkeypatch.setattr("dpokit.checkpoint.resume.date", Tomorrow)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    refused = {**changed, "output_dir": str(run.path), "template_date": "2020-02-03"}
    with pytest.raises(SettingsError, match=f"began with {date.today().isoformat()}"):
        train("dpo_test", refused, [])
    train("dpo_test", {**changed, "output_dir": str(run.path)}, [])
    check_same(run, whole)
    assert read_run_settings(run.read_run())["template_date"] == date.today().isoformat()
    new = claim_folder(RunDir(tmp_path / "new"), load_settings("dpo_test", changed, []), world_size=1, placement="one")
    assert new.template_date == Tomorrow.today().isoformat()


@pytest.mark.parametrize("after", [4, 8, 12])
def test_an_epochs_missed_log_and_evaluation_are_made_on_resume(after, defaults, tmp_path):
    """The checkpoint of an epoch's last step is written before its log, and a run may end between the two."""
    by_epochs = {"logging_strategy": "epoch", "eval_strategy": "epoch", "eval_fraction": 0.2, "max_steps": 12}
    changed = {**defaults, **by_epochs, "save_steps": 4}  # 16 pairs: an epoch has 4 steps
    whole = train("dpo_test", changed, [])
    run = interrupt(whole, tmp_path / "run", after=after)
    records = [record for record in read_metrics(run.metrics_jsonl) if record["step"] != after]
    run.metrics_jsonl.write_text("".join(json.dumps(record) + "\n" for record in records))
    train("dpo_test", {**changed, "output_dir": str(run.path)}, [])
    check_same(run, whole)
    assert {"loss", "grad_norm", "eval_loss"} <= next(r for r in read_steps(run) if r["step"] == after).keys()


def test_a_bad_checkpoint_is_skipped_and_the_result_is_the_same(defaults, tmp_path, capfd):
    whole = train("dpo_test", defaults, [])
    run = interrupt(whole, tmp_path / "run", after=4)
    os.truncate(run.path / "checkpoint-4" / "optimizer.pt", 100)
    train("dpo_test", {**defaults, "output_dir": str(run.path)}, [])
    output = capfd.readouterr().err
    assert "checkpoint-4 is skipped: optimizer.pt has 100 bytes" in output
    assert "resuming from" in output
    check_same(run, whole)


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: data[:0],
    "zeroed": lambda data: bytes(len(data)),
    "one bit flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "deleted": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_detected(damage, broken):
    checkpoint = broken.path / "checkpoint-4"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "manifest.json"} <= {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        if damage != "deleted":
            path.write_bytes(DAMAGE[damage](whole))
        newest, before = find_checkpoints(broken, deep=True)
        assert newest.problem is not None, path.name
        assert before.problem is None
        path.write_bytes(whole)
    assert find_checkpoints(broken, deep=True)[0].problem is None


def test_without_a_usable_checkpoint_a_run_starts_from_step_0(defaults, broken, capfd):
    for path in broken.checkpoints():
        (path / "manifest.json").write_text("{")
    train("dpo_test", {**defaults, "output_dir": str(broken.path), "max_steps": 4}, [])
    assert "holds no checkpoint that can be used: starting from step 0" in capfd.readouterr().err
    assert broken.read_run()["generations"][-1]["resumed_step"] == 0


CHANGES = {
    "seed": ("seed", "7"),
    "learning_rate": ("learning_rate", "0.01"),
    "beta": ("beta", "0.5"),
    "global_batch": ("per_device_train_batch_size", "2"),
    "data": ("max_train_samples", "12"),
    "max_steps": ("max_steps", "9"),
    "loss_type": ("loss_type", "ipo"),
    "group_by_prompt": ("group_by_prompt", "false"),
    "prompt_format": ("prompt_format", "raw"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_unless_it_is_accepted(name, defaults, broken):
    flag, value = CHANGES[name]
    defaults = {**defaults, "output_dir": str(broken.path), "max_steps": 4}
    with pytest.raises(RunFolderError, match=f"was started with other settings: {name} was") as error:
        train("dpo_test", defaults, [f"--{flag}", value])
    assert f"--accept_changes {name}" in error.value.do
    assert len(broken.checkpoints()) == 2
    train("dpo_test", defaults, [f"--{flag}", value, "--accept_changes", name])
    (accepted,) = broken.read_run()["accepted_changes"]
    assert list(accepted) == [name]


def test_changes_are_accepted_in_a_list_and_by_short_names(defaults, broken):
    flags = ["--learning_rate", "0.01", "--seed", "7", "--accept_changes", "lr,seed"]
    train("dpo_test", {**defaults, "output_dir": str(broken.path), "max_steps": 4}, flags)
    assert set(broken.read_run()["accepted_changes"][0]) == {"learning_rate", "seed"}


# the data's fingerprint in a checkpoint from before --prompt_format, and now; the refused settings
OLDER_CHECKPOINTS = [("a", "a", None), ("a", "b", "data was a, now b"), (None, None, "prompt_format was None")]


@pytest.mark.parametrize(("before", "now", "refused"), OLDER_CHECKPOINTS)
def test_a_checkpoint_from_before_raw_prompts_names_the_flag(before, now, refused, tmp_path):
    settings = load_settings("dpo_test", {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}, [])
    values = describe_identity(settings, world_size=1, data_fingerprint=now, model="m")
    newer = ("prompt_format", "ranked", "format", "mixture_seed", "balance_sources", "drop_duplicates", "datasets")
    older = {name: value for name, value in values.items() if name not in newer}
    if refused is None:
        assert compare_settings(older | {"data": before}, values, settings) == {}
        return
    with pytest.raises(RunFolderError, match=refused) as error:
        compare_settings(older | {"data": before}, values, settings)
    assert "--prompt_format raw" in error.value.do


def test_sources_in_another_order_are_another_mixture(tmp_path):
    def describe(**data: Any) -> tuple[dict[str, Any], Settings]:
        defaults = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
        settings = load_settings("dpo_test", {**defaults, **data}, [])
        return describe_identity(settings, world_size=1, data_fingerprint=None, model="m"), settings

    then, _ = describe(dataset_mixer={"a": 0.5, "b": 1.0})
    same, settings = describe(dataset_mixer={"a": 0.5, "b": 1.0})
    assert compare_settings(then, same, settings) == {}
    now, settings = describe(dataset_mixer={"b": 1.0, "a": 0.5})
    with pytest.raises(RunFolderError, match="dataset_mixer was"):
        compare_settings(then, now, settings)


def test_a_setting_that_no_resume_compares_cannot_be_accepted(defaults, broken):
    with pytest.raises(SettingsError, match="accept_changes names logging_steps"):
        train("dpo_test", {**defaults, "output_dir": str(broken.path)}, ["--accept_changes", "logging_steps"])


def test_the_steps_between_logs_and_saves_may_change(defaults, broken):
    flags = ["--logging_steps", "2", "--save_steps", "3"]
    train("dpo_test", {**defaults, "output_dir": str(broken.path), "max_steps": 4}, flags)
    assert broken.read_run()["state"] == "finished"


def test_other_weights_under_the_same_model_name_are_refused(defaults, tiny_gpt2, tmp_path):
    moved = shutil.copytree(tiny_gpt2, tmp_path / "model")
    first = {**defaults, "model_name_or_path": str(moved), "max_steps": 2, "accept_changes": ["max_steps"]}
    whole = train("dpo_test", {**first, "output_dir": str(tmp_path / "other")}, [])
    run = interrupt(whole, tmp_path / "again", after=2)
    model = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        model.transformer.ln_f.weight += 1
    model.save_pretrained(moved)
    with pytest.raises(RunFolderError, match="was started with other settings: model was"):
        train("dpo_test", {**first, "output_dir": str(run.path)}, [])


def test_a_checkpoint_of_a_newer_version_ends_the_resume(defaults, broken):
    newest = find_checkpoints(broken, deep=False)[0]
    write_manifest(newest.path, 4, newest.manifest["files"], {"format": 99})
    with pytest.raises(RunFolderError, match="written by a newer version"):
        train("dpo_test", {**defaults, "output_dir": str(broken.path)}, [])


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "there is no checkpoint"),
        ("run", "there is no checkpoint"),
        ("run/checkpoint-9", "there is no checkpoint"),
        ("bare/checkpoint-9", "it has no manifest"),
    ],
)
def test_a_resume_path_that_is_no_whole_checkpoint_is_refused(path, message, defaults, tmp_path):
    (tmp_path / "bare" / "checkpoint-9").mkdir(parents=True)
    with pytest.raises(SettingsError, match=message):
        train("dpo_test", defaults, ["--resume_from_checkpoint", str(tmp_path / path), "--overwrite_run", "false"])


def test_an_earlier_checkpoint_resumes_only_in_another_folder(defaults, broken, tmp_path):
    early = str(broken.path / "checkpoint-2")
    defaults = {**defaults, "max_steps": 4}
    with pytest.raises(RunFolderError, match="holds checkpoint-4, later than checkpoint-2"):
        train("dpo_test", {**defaults, "output_dir": str(broken.path)}, ["--resume_from_checkpoint", early])
    branch = {**defaults, "output_dir": str(tmp_path / "branch")}
    assert train("dpo_test", branch, ["--resume_from_checkpoint", early]).read_run()["state"] == "finished"


def claim(defaults: dict, run: RunDir, *flags: str, world_size: int, placement: str = "DDP"):
    settings = load_settings("dpo_test", {**defaults, "output_dir": str(run.path), "max_steps": 4}, list(flags))
    return claim_folder(RunDir(run.path), settings, world_size=world_size, placement=placement)


def test_another_number_of_processes_keeps_the_global_batch(defaults, broken):
    start = claim(defaults, broken, "--per_device_train_batch_size", "1", world_size=2)
    assert start.accumulation == 2
    assert start.checkpoint == broken.path / "checkpoint-4"


def test_sizes_are_named_if_the_global_batch_cannot_be_kept(defaults, broken):
    with pytest.raises(RunFolderError, match="a step of this run has 4 pairs, which 2 processes cannot split") as error:
        claim(defaults, broken, "--per_device_train_batch_size", "3", world_size=2)
    assert "--per_device_train_batch_size 1 or 2" in error.value.do


# The mistakes of a start that ends before its first step, and the error of it
MISTAKES = {
    "no such data": ({"dataset_name": "/no/such/pairs.jsonl"}, DataError),
    "no such model": ({"model_name_or_path": "/no/such/model"}, ModelError),
    "another recipe, and data without a usable pair": ({"max_length": 2}, DataError),
    "a conflict that TRL finds": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, SettingsError),
}


def test_a_corrected_command_works_after_starts_without_a_step(defaults, tmp_path, capfd):
    run = RunDir(tmp_path / "run")
    changed = {**defaults, "output_dir": str(run.path), "max_steps": 2}
    for number, (mistake, error) in enumerate(MISTAKES.values()):
        with pytest.raises(error):
            train(f"recipe_{number}", {**changed, **mistake}, [])
    train("dpo_test", changed, [])
    record = run.read_run()
    assert (record["state"], record["recipe"], len(record["generations"])) == ("finished", "dpo_test", 1)
    assert "held only a start of another run that ended before its first step" in capfd.readouterr().err
    with pytest.raises(RunFolderError, match="holds another run"):
        train("another", changed, [])


ENDS = [("preempted", "SIGINT on rank 0", True), ("preempted", "SIGTERM", False), ("failed", "no such data", True)]


@pytest.mark.parametrize(("state", "why", "is_free"), ENDS)
def test_another_run_replaces_only_a_start_that_is_over(state, why, is_free, defaults, tmp_path):
    """A preempted start waits in the queue to begin again; one that holds the folder is alive."""
    run = RunDir(tmp_path / "run")
    run.make()
    run.write_run(state=state, why=why, recipe="another", settings={}, generations=[{"token": "t"}])
    if not is_free:
        with pytest.raises(RunFolderError, match="holds another run"):
            claim(defaults, run, world_size=1)
        return
    claim(defaults, run, world_size=1)
    run.write_run(state=state, why=why, recipe="another", settings={})
    run.take_possession(0)  # by the other run
    with pytest.raises(RunFolderError, match="holds another run"):
        claim(defaults, run, world_size=1)


def test_a_run_whose_first_step_was_not_logged_is_kept(defaults, tmp_path, monkeypatch):
    """It is killed before its first log and its first checkpoint."""
    run = RunDir(tmp_path / "run")
    changed = {**defaults, "output_dir": str(run.path), "logging_steps": 100, "save_steps": 100}
    monkeypatch.setattr(PreemptCallback, "on_step_end", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("dpo_test", changed, [])
    assert not run.checkpoints() and not read_metrics(run.metrics_jsonl)
    with pytest.raises(RunFolderError, match="holds another run"):
        train("another", changed, [])


OVER = ("--overwrite_run", "true")


@pytest.mark.parametrize("flags", [OVER, ("--resume_from_checkpoint", "never"), ("--resume_from_checkpoint", "2")])
def test_a_restart_by_the_launcher_resumes_whatever_its_flags(flags, defaults, broken, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    flags = [flag if flag != "2" else str(broken.path / "checkpoint-2") for flag in flags]
    assert claim(defaults, broken, *flags, world_size=1).checkpoint == broken.path / "checkpoint-4"


def test_overwrite_run_deletes_a_run_of_an_earlier_launch(defaults, broken, monkeypatch):
    # The first start of this launch ended before it took over the folder.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    *before, last = broken.read_run()["generations"]
    broken.write_run(generations=[*before, {**last, "launcher": 1}])
    assert claim(defaults, broken, *OVER, world_size=1).checkpoint is None
    assert broken.checkpoints() == []


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_an_evaluation_cut_off_by_a_signal_is_done_on_resume(strategy, defaults, tmp_path, monkeypatch):
    changed = {**defaults, **OPTIONS["evaluations"], "disable_dropout": False, "per_device_eval_batch_size": 1}
    changed |= {"save_strategy": strategy, "metric_for_best_model": "eval_loss", "max_steps": 4}
    whole = train("dpo_test", changed, [])
    check, batches = PreemptCallback.on_prediction_step, []

    def signal_at_the_second_batch(*arguments, **named):
        batches.append(1)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(*arguments, **named)

    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(PreemptCallback, "on_prediction_step", signal_at_the_second_batch)
        for _ in range(2):  # the resumed run is cut off, too
            batches.clear()
            with pytest.raises(Preempted, match="75"):
                train("dpo_test", {**changed, "output_dir": str(run.path)}, [])
            assert len(batches) == 2
            assert [path.name for path in run.checkpoints()] == ["checkpoint-2"]
            assert (run.read_run()["state"], run.read_run()["why"]) == ("preempted", "SIGTERM on rank 0")
    train("dpo_test", {**changed, "output_dir": str(run.path)}, [])
    check_same(run, whole)


def test_another_placement_is_refused(defaults, broken):
    with pytest.raises(RunFolderError, match="written with one device, and this run uses ZeRO-3"):
        claim(defaults, broken, world_size=2, placement="ZeRO-3")
