"""A recipe that writes a run folder and trains nothing, for tests of searches.

A step takes 0.1 s, and every second step writes a checkpoint. Of `run_tags`, `crash` raises at step 3, `early` before
the first step, `mistake` ends with a SettingsError, `hang` writes nothing from step 3 on, `nan` logs an eval_loss that
is not finite, and `slow` takes 0.5 s a step.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import yaml

from dpokit.rundir import MetricsFile, RunDir

DEFAULTS = {"output_dir": "runs/stand_in", "eval_strategy": "steps", "max_steps": 8}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("config", "output_dir", "run_group"):
        parser.add_argument(f"--{name}")
    arguments = parser.parse_args()
    settings = {**DEFAULTS, **yaml.safe_load(Path(arguments.config).read_text())}
    tags, run = settings.get("run_tags") or [], RunDir(arguments.output_dir)
    if "mistake" in tags:
        sys.exit("SettingsError: this cannot be")
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
    run.make()
    done = max((int(path.name.partition("-")[2]) for path in run.checkpoints()), default=0)
    run.take_possession(done)
    run.write_run(
        recipe="stand_in", state="running", settings={n: {"value": v, "origin": "x"} for n, v in settings.items()}
    )
    with Path(os.environ["STAND_IN_STARTS"]).open("a") as file:
        file.write(json.dumps({"run": run.path.name, "from": done}) + "\n")
    metrics, began = MetricsFile(run, after_step=done), time.monotonic()
    for step in range(done + 1, settings["max_steps"] + 1):
        time.sleep(0.5 if "slow" in tags else 0.1)
        if step == 3 and "hang" in tags:
            time.sleep(1000)
        if (step == 3 and "crash" in tags) or "early" in tags:
            run.write_run(state="failed", why="it broke", error="RuntimeError")
            raise RuntimeError("it broke")
        loss = abs(settings["learning_rate"] - 3e-5) * 1e4 + 1 / step + settings.get("seed", 0) % 7 * 1e-3
        metrics.log(step, time.monotonic() - began, {"loss": loss, "eval_loss": math.nan if "nan" in tags else loss})
        if step % 2 == 0 or signals:
            part = run.path / f".part-{step}"
            part.mkdir(exist_ok=True)
            shutil.rmtree(run.path / f"checkpoint-{step}", ignore_errors=True)
            part.rename(run.path / f"checkpoint-{step}")
        if signals:
            run.write_run(state="preempted", why="ended by a signal")
            sys.exit(75)
    run.write_run(state="finished", why=None)


if __name__ == "__main__":
    main()
