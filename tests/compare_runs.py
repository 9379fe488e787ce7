"""Two runs side by side: what a user would compare to see that an interruption left no trace."""

import json
import shutil
from pathlib import Path
from typing import Any

from dpokit.rundir import RunDir, read_metrics

# What differs between two runs of the same thing.
OF_THE_CLOCK = ("seconds", "runtime", "per_second", "total_flos")


def read_steps(run: RunDir) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock, and without records that hold nothing else."""
    records = [
        {name: value for name, value in record.items() if not any(word in name for word in OF_THE_CLOCK)}
        for record in read_metrics(run.metrics_jsonl)
    ]
    return [record for record in records if record.keys() - {"step"}]


def read_weights(run: RunDir) -> bytes:
    """The final weights, every bit of them."""
    folder = run.adapter if run.adapter.exists() else run.model
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def check_same(run: RunDir, whole: RunDir) -> None:
    """Every logged number and every weight equal, each step once. Raises: AssertionError."""
    steps = [record["step"] for record in read_metrics(run.metrics_jsonl)]
    assert steps == sorted(set(steps))
    assert read_steps(run) == read_steps(whole)
    assert read_weights(run) == read_weights(whole) != b""


def interrupt(whole: RunDir, folder: Path, *, after: int) -> RunDir:
    """A copy of a finished run as a crash would have left it behind its checkpoint of step `after`."""
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
