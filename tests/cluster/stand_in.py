"""A recipe that writes a run folder and trains nothing, for tests of Slurm and train.sbatch.

Rank 0 writes run.json and a checkpoint at each step; the other ranks end after a signal.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from dpokit.atomic_files import write_json
from dpokit.checkpoint.store import write_manifest

DEFAULTS = {"output_dir": "runs/stand_in"}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--crash_at", type=int, nargs="*", default=[], help="First start, second start, ...")
    parser.add_argument("--error", default="MachineError", help="The name of the error that a crash records.")
    parser.add_argument("--save_from", type=int, default=1, help="No checkpoint before this step.")
    parser.add_argument("--overwrite_run", default="false")
    arguments, signals = parser.parse_args(), []
    signal.signal(signal.SIGUSR1, lambda *_: signals.append("end"))
    signal.signal(signal.SIGTERM, lambda *_: signals.append("end"))
    if int(os.environ.get("RANK", "0")) > 0:
        while "end" not in signals:
            time.sleep(0.1)
        time.sleep(1)
        sys.exit(75)
    run = arguments.output_dir / "run.json"
    saved_record = json.loads(run.read_text()) if run.exists() else {"generations": []}
    done = max((int(path.name.partition("-")[2]) for path in arguments.output_dir.glob("checkpoint-*")), default=0)
    generations = saved_record["generations"]
    if generations:
        generations[-1] |= {"ended": saved_record["state"], "ended_step": saved_record["step"]}
    generations.append({"resumed_step": done, "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID")})
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    def record(state: str, step: int, **more: str) -> None:
        write_json(run, {"state": state, "step": step, "generations": generations, **more})

    crash_at = dict(enumerate(arguments.crash_at, start=1)).get(len(generations))
    for step in range(done, arguments.steps + 1):
        record("running", step)
        if step == crash_at:
            record("failed", step, error=arguments.error, why=f"a crash at step {step}")
            sys.exit(1)
        if step >= arguments.save_from:
            checkpoint = arguments.output_dir / f"checkpoint-{step}"
            checkpoint.mkdir(exist_ok=True)
            write_manifest(checkpoint, step, {}, {})
        if "end" in signals:
            record("preempted", step)
            sys.exit(75)
        time.sleep(0.3)
    record("finished", arguments.steps)


if __name__ == "__main__":
    main()
