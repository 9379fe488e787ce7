"""The record of a run's end in run.json."""

import os
import shutil
import threading

import pytest
import torch
from small_disk import small_disk

from dpokit.errors import RunFolderError
from dpokit.run_state import keep_record
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings


def build_settings(model, run):
    flags = ["--model_name_or_path", str(model), "--output_dir", str(run.path), "--use_cpu", "--report_to", "none"]
    return load_settings("dpo_test", {}, flags)


def test_a_full_disk_is_recorded_after_other_ranks_free_space(tiny_gpt2, tmp_path):
    disk, run = tmp_path / "disk", RunDir(tmp_path / "disk" / "run")
    settings = build_settings(tiny_gpt2, run)
    with small_disk(disk, "256k"):
        run.make()
        with pytest.raises(RunFolderError, match="no space is left"), keep_record(run, settings, 1):
            save = os.open(disk / "save", os.O_WRONLY | os.O_CREAT)
            (disk / "save").unlink()  # rank 0 removes a failed save in the same way while another rank still writes
            threading.Timer(2.0, os.close, [save]).start()
            while True:
                os.write(save, bytes(2**12))
        assert run.read_run()["state"] == "failed"


def test_a_run_folder_is_lost_though_its_run_json_goes_last(tiny_gpt2, tmp_path):
    run = RunDir(tmp_path / "run")
    run.make()
    settings = build_settings(tiny_gpt2, run)
    with pytest.raises(RunFolderError, match="was deleted, moved or replaced"), keep_record(run, settings, 1):
        run.take_possession(0)
        deletion = threading.Timer(0.5, shutil.rmtree, [run.path])
        deletion.start()
        torch.save({}, run.path / "checkpoint-1" / "rng_state.pth")
    deletion.join()
    assert not run.path.exists()
