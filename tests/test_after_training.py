"""The merge and the push after training: checked before it, run by rank 0 alone, under every placement."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_pairs
from huggingface_hub import HfApi
from local_hub import READ, WRITE, Fault, serve
from pushing import REPO, client_environment, connect
from run_folders import make_run, make_steps

from dpokit.after_training import check_after_training, describe_end, find_commands, run_commands
from dpokit.errors import DataError, HubError, ReleaseError, SettingsError
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings

PUSH = ["--push_to_hub", "--hub_model_id", REPO, "--hub_license", "mit"]
EVALUATE = ["--eval_strategy", "epoch"]
PLACEMENTS = {"one": "single_gpu", "DDP": "ddp_cpu", "ZeRO-3": "zero3_cpu", "FSDP2": "fsdp2_cpu"}


@pytest.fixture
def hub(tmp_path):
    with serve(tmp_path / "hub") as server:
        yield server


def load(folder: Path, *flags: str):
    return load_settings("dpo_test", {"output_dir": str(folder / "run"), "use_cpu": True, "report_to": "none"}, flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to_hub"], "hub_model_id is not set"),
        (["--push_to_hub", "--hub_model_id", "tiny"], "hub_model_id is tiny"),
        (["--push_to_hub", "--hub_model_id", REPO], "no licence"),
        ([*PUSH, "--hub_license", "mitt"], "mitt"),
        ([*PUSH, "--hub_license", "other"], "training has no flags for the licence's name and link"),
    ],
)
def test_incomplete_push_settings_are_refused_before_training(flags, message, tmp_path, hub, monkeypatch):
    connect(monkeypatch, hub)
    with pytest.raises(SettingsError, match=message):
        check_after_training(load(tmp_path, *flags))
    assert not hub.requests


def test_a_read_only_token_is_refused_before_training(tmp_path, hub, monkeypatch):
    connect(monkeypatch, hub, token=READ)
    with pytest.raises(HubError, match="may read, and not write"):
        check_after_training(load(tmp_path, *PUSH))
    check_after_training(load(tmp_path, *PUSH, "--hub_token", WRITE))


def test_an_unmerged_adapter_of_a_local_base_is_refused(tmp_path, hub, tiny_gpt2, monkeypatch):
    connect(monkeypatch, hub)
    flags = [*PUSH, "--use_peft", "--model_name_or_path", str(tiny_gpt2)]
    with pytest.raises(SettingsError, match=f"whose base is {tiny_gpt2}, a folder or file of this machine"):
        check_after_training(load(tmp_path, *flags))
    check_after_training(load(tmp_path, *flags, "--merge_after_training", *EVALUATE))


def test_a_repository_of_the_other_visibility_is_refused(tmp_path, hub, monkeypatch):
    connect(monkeypatch, hub)
    check_after_training(load(tmp_path, *PUSH))
    HfApi().create_repo(REPO, private=False)
    with pytest.raises(HubError, match="is public: everybody would see"):
        check_after_training(load(tmp_path, *PUSH))
    check_after_training(load(tmp_path, *PUSH, "--hub_private_repo", "false"))


def test_an_existing_merge_is_refused_before_training(tmp_path):
    RunDir(tmp_path / "run").merged.mkdir(parents=True)
    with pytest.raises(SettingsError, match="merged exists already"):
        check_after_training(load(tmp_path, "--merge_after_training", *EVALUATE))
    check_after_training(load(tmp_path, "--merge_after_training", "--overwrite_run", *EVALUATE))


def test_a_merge_without_held_out_pairs_is_refused(tmp_path):
    pairs = ["--dataset_name", str(write_pairs(tmp_path / "pairs.jsonl", 4)), "--eval_strategy", "no"]
    with pytest.raises(DataError, match="no held-out pairs to check it"):
        check_after_training(load(tmp_path, "--merge_after_training", *pairs))
    check_after_training(load(tmp_path, "--merge_after_training", *pairs, "--eval_fraction", "0.5"))
    for split in ("train[50%:]", "train[:1]+train[3:]"):
        check_after_training(load(tmp_path, "--merge_after_training", *pairs, "--dataset_test_split", split))
    with pytest.raises(DataError, match=r"no split 'train\+test'"):
        check_after_training(load(tmp_path, "--merge_after_training", *pairs, "--dataset_test_split", "train+test"))


def test_without_a_push_no_request_reaches_the_hub(tmp_path, hub, monkeypatch):
    connect(monkeypatch, hub)
    check_after_training(load(tmp_path, "--merge_after_training", *EVALUATE))
    assert not hub.requests


def test_the_commands_are_in_order_and_push_privately_by_default(tmp_path):
    run = RunDir(tmp_path / "run")
    assert list(find_commands(run, load(tmp_path))) == []
    assert [arguments[0] for arguments in find_commands(run, load(tmp_path, "--merge_after_training"))] == ["merge"]
    flags = [*PUSH, "--merge_after_training", "--eval_strategy", "epoch"]
    coded = find_commands(run, load(tmp_path, "--merge_after_training", "--trust_remote_code", "true"))
    assert [arguments[-2:] for arguments in coded] == [["--trust_remote_code", "true"]], "a run folder cannot grant it"
    evaluate, merge, push = find_commands(run, load(tmp_path, *flags))
    assert (evaluate[0], merge[0]) == ("evaluate", "merge")
    assert push == ["push", str(run.path), "--repo-id", REPO, "--license", "mit", "--yes"]
    *_, push = find_commands(run, load(tmp_path, *flags, "--hub_private_repo", "false", "--hub_revision", "v2"))
    assert push[-4:] == ["--public", "--revision", "v2", "--yes"]


def test_the_end_names_the_result_the_files_and_what_comes_next(tmp_path):
    run = RunDir(make_run(tmp_path / "my run", make_steps(20, every=5), state="finished"))
    text = describe_end(run, load(tmp_path))
    verdict, folder, *commands = (line for line in text.splitlines() if line)
    assert verdict.startswith("The lowest evaluation loss is ")
    assert "is below ln 2" in verdict
    assert folder.endswith(str(run.path))
    assert [shlex.split(line)[:3] for line in commands] == [
        ["dpokit", verb, str(run.path)] for verb in ("evaluate", "report", "chat")
    ]
    assert not any("trust" in line for line in commands)
    coded = describe_end(run, load(tmp_path, "--trust_remote_code", "true"))
    assert [line.count("--trust_remote_code true") for line in coded.splitlines() if "dpokit" in line[:8]] == [1, 0, 1]
    run.make_evaluation("own").pairs_json.write_text("{")
    assert "pairs.json" in describe_end(run, load(tmp_path)).splitlines()[1]


def test_a_failed_command_names_the_commands_to_repeat(tmp_path, capfd):
    commands = [["verify", str(tmp_path / "none")], ["push", "RUN"]]
    with pytest.raises(ReleaseError) as error:
        run_commands(commands)
    assert "dpokit verify ended with 2; the run itself is finished" in error.value.seen
    assert error.value.do.endswith(f"dpokit verify {tmp_path / 'none'} && dpokit push RUN")
    assert "there is no such run" in capfd.readouterr().err


@pytest.mark.cold  # it needs another package of the name dpokit
def test_a_command_gets_the_token_but_no_launcher_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "dpokit").mkdir()
    (tmp_path / "dpokit" / "__init__.py").write_text("")
    (tmp_path / "dpokit" / "cli.py").write_text(
        "import json, os; print(json.dumps(dict(os.environ)), file=open('e', 'w'))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_commands([["any"]], token="hf_secret")
    variables = json.loads((tmp_path / "e").read_text())
    assert variables["HF_TOKEN"] == "hf_secret"
    assert not {"RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"} & variables.keys()
    assert variables["OMP_NUM_THREADS"] == "3", "no launcher set this number"


def launch(hub, config: str, run: RunDir, model: Path, pairs: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a LoRA training that is merged and pushed at its end."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{config}.yaml"), str(ROOT / "recipes" / "dpo_gpt2.py"), "--use_cpu"]
    command += ["--model_name_or_path", str(model), "--dataset_name", str(pairs), "--output_dir", str(run.path)]
    command += ["--use_peft", "--lora_r", "4", "--max_steps", "3", "--max_length", "96", "--learning_rate", "1e-2"]
    command += [] if "--eval_strategy" in flags else ["--eval_steps", "3"]
    command += ["--save_steps", "3", "--report_to", "none", "--per_device_train_batch_size", "2"]
    command += ["--gradient_accumulation_steps", "1", "--bf16", "false", "--merge_after_training", *PUSH, *flags]
    environment = client_environment(hub, xet=False)
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, number in {"train": 16, "test": 8}.items():
        write_pairs(folder / f"{split}.jsonl", number)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_finished_run_is_evaluated_merged_and_pushed(placement, hub, tiny_gpt2, data, tmp_path):
    run = RunDir(tmp_path / "run")
    done = launch(hub, PLACEMENTS[placement], run, tiny_gpt2, data)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(run.evaluations()[-1].pairs_json.read_text())["data"]["pairs"] == 8
    assert json.loads(run.merge_json.read_text())["largest_drift"] < 1e-4
    files = hub.files(REPO)
    assert {"README.md", "config.json", "model.safetensors", "merge.json", "tokenizer.json"} <= files.keys()
    assert not any(path.startswith("checkpoint") or path.endswith((".pt", ".bin")) for path in files)
    assert hub.repos[REPO]["private"]
    assert hub.read(REPO, "model.safetensors") == (run.merged / "model.safetensors").read_bytes()
    card = hub.read(REPO, "README.md").decode()
    assert "license: mit" in card
    assert str(tmp_path) not in card
    assert len(hub.asked("POST .*/commit/")) == 1


@pytest.mark.slow
def test_a_failed_push_leaves_a_finished_run_and_a_command(hub, tiny_gpt2, data, tmp_path):
    run = RunDir(tmp_path / "run")
    hub.faults.append(Fault("POST .*/commit/", status=403, times=99))
    done = launch(hub, "ddp_cpu", run, tiny_gpt2, data, "--eval_strategy", "no", "--load_best_model_at_end", "false")
    assert done.returncode != 0
    assert run.read_run()["state"] == "finished"
    again = f"dpokit push {run.path} --repo-id {REPO} --license mit --yes"
    assert again in done.stderr
    hub.faults.clear()
    command = [sys.executable, "-m", "dpokit.cli", *again.split()[1:]]
    assert subprocess.run(command, env=client_environment(hub, xet=False), capture_output=True).returncode == 0
    pulled = tmp_path / "pulled.safetensors"
    pulled.write_bytes(hub.read(REPO, "model.safetensors"))
    assert pulled.read_bytes() == (run.merged / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_refusal_of_the_hub_stops_the_run_before_step_1(hub, tiny_gpt2, data, tmp_path):
    run = RunDir(tmp_path / "run")
    done = launch(hub, "ddp_cpu", run, tiny_gpt2, data, "--hub_token", READ)
    assert done.returncode != 0
    assert done.stderr.count("may read, and not write") == 1
    assert READ not in done.stderr
    assert not run.path.exists()
