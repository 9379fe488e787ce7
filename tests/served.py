"""Small runs to chat with, and the real `dpokit serve` for them."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, write_pairs

from dpokit.run import train
from dpokit.rundir import RunDir

AILING = (str(Path(__file__).with_name("ailing.py")),)  # a program for `serve`


def make_run(folder: Path, model: Path, **changes) -> RunDir:
    """A run of a few steps, with held-out pairs."""
    settings = {
        "model_name_or_path": str(model),
        "dataset_name": str(write_pairs(folder / "pairs.jsonl", 30)),
        "output_dir": str(folder / "run"),
        "eval_fraction": 0.4,
        "eval_strategy": "no",
        "max_steps": 3,
        "learning_rate": 1e-2,
        "beta": 0.3,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "load_best_model_at_end": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    settings |= changes
    if settings.get("kind") == "sft":
        del settings["beta"]
    made = train("test", settings, [])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return made


@dataclass
class Served:
    """A running `dpokit serve`.

    Attributes:
        url: the URL that it printed.
        said: the lines of its log.
    """

    url: str
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)


@contextmanager
def serve(*flags: str, program: tuple[str, ...] = ("-m", "dpokit.cli"), **environment: str) -> Iterator[Served]:
    """Runs `dpokit serve` on a free port while the block runs."""
    command = [sys.executable, *program, "serve", *flags, "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, **pipes, env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"} | environment
    )
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)
    reader.start()
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), "".join(log)
        yield Served(url, process, log)
    finally:
        process.terminate()
        process.wait(timeout=60)
        reader.join(timeout=10)
