"""Sharded checkpoints of real runs with hostile changes: resume, merge and `dpokit verify` refuse them."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, write_pairs
from payloads import archive, hostile
from test_cli import dpokit
from test_launch import launch

from dpokit.checkpoint.store import MANIFEST, check_checkpoint, describe_files, list_files, write_manifest
from dpokit.errors import RunFolderError
from dpokit.merge.merge import MergeOptions, merge_run
from dpokit.rundir import RunDir

pytestmark = pytest.mark.slow
FOREIGN, GO_ON = (
    "another user or machine wrote it",
    ("--resume_from_checkpoint", "auto", "--accept_changes", "max_steps"),
)


class Sharded:
    """A run of two processes with checkpoints at steps 2 and 4."""

    def __init__(self, config: str, folder: Path, model: Path) -> None:
        self.config, self.run = ROOT / "accelerate_configs" / f"{config}.yaml", RunDir(folder / "run")
        self.flags = [
            *("--model_name_or_path", str(model), "--dataset_name", str(write_pairs(folder / "pairs.jsonl", 20))),
            *("--output_dir", str(self.run.path), "--use_cpu", "--max_length", "96", "--save_steps", "2"),
            *("--eval_strategy", "no", "--load_best_model_at_end", "false", "--per_device_train_batch_size", "2"),
            *("--gradient_accumulation_steps", "1", "--report_to", "none", "--warmup_steps", "0"),
        ]
        done = self.train("--max_steps", "4")
        assert done.returncode == 0, done.stderr[-3000:]

    def train(self, *flags: str):
        return launch(["--config_file", str(self.config)], *self.flags, *flags)

    def reseal(self, step: int) -> None:
        """Writes a manifest of the folder's present files, signed by this user."""
        path = self.run.path / f"checkpoint-{step}"
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).unlink()
        files = describe_files(path, list_files(path))
        facts = {name: manifest[name] for name in ("world_size", "placement", "settings", "weights_alone")}
        write_manifest(path, step, files, facts)


def test_a_resume_of_zero_loads_no_shards_of_others(tiny_gpt2, tmp_path, monkeypatch):
    sharded, ran = Sharded("zero2_cpu", tmp_path, tiny_gpt2), tmp_path / "it-ran"
    (shard, *_) = sorted((sharded.run.path / "checkpoint-4").glob("global_step4/*_optim_states.pt"))
    honest = shard.read_bytes()
    shard.write_bytes(archive(hostile(ran)))
    sharded.reseal(4)
    monkeypatch.setenv("DPOKIT_STATE", str(tmp_path / "another home"))
    refused = sharded.train("--max_steps", "6", *GO_ON)
    assert refused.returncode == 1, "the exit code is the launcher's"
    assert "optim_states.pt names posix.system" in refused.stdout + refused.stderr
    assert FOREIGN in refused.stderr
    shard.write_bytes(honest)
    sharded.reseal(4)
    monkeypatch.setenv("DPOKIT_STATE", str(tmp_path / "a third home"))
    trusted = sharded.train("--max_steps", "6", *GO_ON, "--trust_checkpoint", "true")
    assert trusted.returncode == 0, trusted.stderr[-3000:]
    assert sharded.run.read_run()["generations"][-1]["resumed_step"] == 4
    assert not ran.exists()


def test_a_merge_of_fsdp2_loads_no_shards_of_others(tiny_gpt2, tmp_path, monkeypatch):
    sharded, ran = Sharded("fsdp2_cpu", tmp_path, tiny_gpt2), tmp_path / "it-ran"
    run = sharded.run
    home = os.environ["DPOKIT_STATE"]
    monkeypatch.setenv("DPOKIT_STATE", str(tmp_path / "another home"))
    with pytest.raises(RunFolderError, match=FOREIGN):
        merge_run(run, MergeOptions(checkpoint=2, proof=False))
    merge_run(run, MergeOptions(checkpoint=2, proof=False), argv=["--trust_checkpoint", "true"])
    shutil.rmtree(run.merged)
    monkeypatch.setenv("DPOKIT_STATE", home)
    table = run.path / "checkpoint-2" / "pytorch_model_fsdp_0" / ".metadata"
    table.write_bytes(hostile(ran))
    sharded.reseal(2)
    with pytest.raises(RunFolderError, match=r"cannot be merged: it must not be loaded: .*posix\.system"):
        merge_run(run, MergeOptions(checkpoint=2, proof=False), argv=["--trust_checkpoint", "true"])
    shown = dpokit("verify", str(run.path))
    assert "checkpoint-4: whole" in shown.stdout
    assert "checkpoint-2: it must not be loaded: pytorch_model_fsdp_0/.metadata names posix.system" in shown.stdout
    run.model.rename(run.path / "aside")
    (run.path / "model").mkdir()
    table.parent.rename(run.model / table.parent.name)  # shards as final weights, without a manifest
    with pytest.raises(RunFolderError, match="is not loaded"):
        merge_run(run, MergeOptions(proof=False), argv=["--trust_checkpoint", "true"])
    assert not ran.exists()


def test_every_pickle_of_a_real_checkpoint_is_searched(tiny_gpt2, tmp_path):
    """The files of ZeRO-3 pass, and each of them is found if a hostile pickle replaces it."""
    sharded, ran = Sharded("zero3_cpu", tmp_path, tiny_gpt2), tmp_path / "it-ran"
    path = sharded.run.path / "checkpoint-4"
    assert check_checkpoint(path, deep=True).problem is None
    pickles = [file for file in path.rglob("*") if file.suffix in (".pt", ".pth")]
    assert len(pickles) >= 7
    for file in pickles:
        honest = file.read_bytes()
        for content in (archive(hostile(ran)), hostile(ran), pickle.dumps({})):
            file.write_bytes(content)
            sharded.reseal(4)
            assert f"{file.relative_to(path).as_posix()} " in check_checkpoint(path, deep=True).problem
        file.write_bytes(honest)
    sharded.reseal(4)
    assert check_checkpoint(path, deep=True).problem is None
    assert not ran.exists()
