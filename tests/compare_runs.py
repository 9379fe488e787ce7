"""Compares the metrics and weights of two runs, one of them interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

from dpokit.rundir import RunDir, read_metrics

# Parts of the names of metrics that differ between two equal runs.
TIMING = ("seconds", "runtime", "per_second", "total_flos")


def read_steps(run: RunDir) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without times; records that hold only times are left out."""
    records = [
        {name: value for name, value in record.items() if not any(word in name for word in TIMING)}
        for record in read_metrics(run.metrics_jsonl)
    ]
    return [record for record in records if record.keys() - {"step"}]


def read_weights(run: RunDir) -> bytes:
    """The bytes of the final weights."""
    folder = run.adapter if run.adapter.exists() else run.model
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def check_same(run: RunDir, whole: RunDir) -> None:
    """Raises AssertionError if a logged number or a weight differs, or if a step is logged twice."""
    steps = [record["step"] for record in read_metrics(run.metrics_jsonl)]
    assert steps == sorted(set(steps))
    assert read_steps(run) == read_steps(whole)
    assert read_weights(run) == read_weights(whole) != b""


def interrupt(whole: RunDir, folder: Path, *, after: int) -> RunDir:
    """A copy of a finished run in the state after a crash, with no checkpoint later than step `after`."""
    shutil.copytree(whole.path, folder)
    run = RunDir(folder)
    for path in (run.model, run.adapter):
        shutil.rmtree(path, ignore_errors=True)
    for path in run.checkpoints():
        if int(path.name.rpartition("-")[2]) > after:
            shutil.rmtree(path)
    record = run.read_run() or {}
    record["settings"]["output_dir"]["value"] = str(folder)
    run.run_json.write_text(json.dumps({**record, "state": "running"}))
    return run
