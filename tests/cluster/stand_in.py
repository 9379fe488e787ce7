"""A recipe that keeps a run folder as a run does and trains nothing: for what Slurm and train.sbatch do around a run.

Rank 0 writes run.json, metrics.jsonl and a checkpoint a step; the other ranks end when it does.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from dpokit.checkpoint.store import write_manifest

DEFAULTS = {"output_dir": "runs/stand_in"}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--crash_at", type=int, nargs="*", default=[], help="First start, second start, ...")
    parser.add_argument("--error", default="MachineError", help="What a crash is called.")
    parser.add_argument("--save_from", type=int, default=1, help="No checkpoint before this step.")
    parser.add_argument("--overwrite_run", default="false")
    asked, steps = parser.parse_args(), []
    signal.signal(signal.SIGUSR1, lambda *_: steps.append("end"))
    signal.signal(signal.SIGTERM, lambda *_: steps.append("end"))
    if int(os.environ.get("RANK", "0")) > 0:
        while "end" not in steps:
            time.sleep(0.1)
        time.sleep(1)
        sys.exit(75)
    run = asked.output_dir / "run.json"
    before = json.loads(run.read_text()) if run.exists() else {"generations": []}
    done = max((int(one.name.partition("-")[2]) for one in asked.output_dir.glob("checkpoint-*")), default=0)
    generations = before["generations"]
    if generations:
        generations[-1] |= {"ended": before["state"], "ended_step": before["step"]}
    generations.append({"resumed_step": done, "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID")})
    asked.output_dir.mkdir(parents=True, exist_ok=True)

    def record(state: str, step: int, **more: str) -> None:
        run.write_text(json.dumps({"state": state, "step": step, "generations": generations, **more}))

    crash_at = dict(enumerate(asked.crash_at, start=1)).get(len(generations))
    for step in range(done, asked.steps + 1):
        record("running", step)
        if step == crash_at:
            record("failed", step, error=asked.error, why=f"a crash at step {step}")
            sys.exit(1)
        if step >= asked.save_from:
            checkpoint = asked.output_dir / f"checkpoint-{step}"
            checkpoint.mkdir(exist_ok=True)
            write_manifest(checkpoint, step, {}, {})
        if "end" in steps:
            record("preempted", step)
            sys.exit(75)
        time.sleep(0.3)
    record("finished", asked.steps)


if __name__ == "__main__":
    main()
