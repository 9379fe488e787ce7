"""The record of a run's end in run.json."""

import os
import threading

import pytest
from small_disk import small_disk

from dpokit.errors import RunFolderError
from dpokit.run_state import keep_record
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings


def test_a_full_disk_is_recorded_after_other_ranks_free_space(tiny_gpt2, tmp_path):
    disk, run = tmp_path / "disk", RunDir(tmp_path / "disk" / "run")
    flags = ["--model_name_or_path", str(tiny_gpt2), "--output_dir", str(run.path), "--use_cpu"]
    settings = load_settings("dpo_test", {}, [*flags, "--report_to", "none"])
    with small_disk(disk, "256k"):
        run.make()
        with pytest.raises(RunFolderError, match="no space is left"), keep_record(run, settings, 1):
            save = os.open(disk / "save", os.O_WRONLY | os.O_CREAT)
            (disk / "save").unlink()  # rank 0 removes a failed save in the same way while another rank still writes
            threading.Timer(2.0, os.close, [save]).start()
            while True:
                os.write(save, bytes(2**12))
        assert run.read_run()["state"] == "failed"
