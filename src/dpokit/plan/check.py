"""Checks a plan: a separate process trains two steps on the longest rows, and its peak memory is measured.

    python -m dpokit.plan.check FOLDER

starts this process; it reads FOLDER/job.json and writes FOLDER/result.json. It takes two steps because optimizer states
exist only from the second step on.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dpokit.console import quiet_dependencies, say
from dpokit.errors import OUT_OF_MEMORY, DpokitError, MachineError, SettingsError
from dpokit.interpreter import PYTHON
from dpokit.plan.devices import GIB
from dpokit.plan.plan import Plan

STEPS = 2
MICRO_BATCHES = 2  # the second runs with the gradients of the first in memory


def check_plan(plan: Plan) -> dict[str, Any]:
    """Trains the longest rows; returns predicted and measured peak in GiB, and their difference in percent.

    On a CPU the peak is the process's resident memory, on a GPU the memory that the caching allocator reserved.

    Raises:
        SettingsError: the plan is for devices of another machine.
        MachineError: the step needs more memory than this machine has.
        DpokitError: the error of the step, as of a run.
    """
    request = plan.request
    if request.devices.host_gib is None:
        raise SettingsError(
            "--check measures on this machine, but --gpus plans for other devices",
            expected="one of the two",
            do="leave out --gpus to plan and check for this machine, or leave out --check",
        )
    estimate = plan.estimates[0]
    with tempfile.TemporaryDirectory(prefix="dpokit-plan-") as folder:
        job = {
            "recipe": str(request.recipe.resolve()),
            "flags": list(request.flags),
            "rows": plan.longest or make_rows(plan),
            "folder": folder,
        }
        Path(folder, "job.json").write_text(json.dumps(job))
        say(f"checking: {STEPS} real steps of the longest rows, in a separate process")
        done = subprocess.run(
            [*PYTHON, "-m", "dpokit.plan.check", folder],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TQDM_DISABLE": "1"},
        )
        result = Path(folder, "result.json")
        record: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    raise_failure(done, record, predicted_gib=estimate.total / GIB)
    predicted, measured = estimate.total / GIB, record["peak_bytes"] / GIB
    return {
        "placement": estimate.placement,
        "predicted_gib": round(predicted, 3),
        "measured_gib": round(measured, 3),
        "difference_percent": round(100 * (predicted / measured - 1), 2),
        "measured_as": record["measured_as"],
    }


def make_rows(plan: Plan) -> list[dict[str, list[int]]]:
    """One pair of `max_length` tokens, half of them the prompt, for a plan that could not read the data."""
    tokens = plan.train.row_tokens
    half = tokens // 2
    return [{"prompt_ids": [0] * half, "chosen_ids": [1] * (tokens - half), "rejected_ids": [2] * (tokens - half)}]


def raise_failure(done: "subprocess.CompletedProcess[str]", record: dict[str, Any], *, predicted_gib: float) -> None:
    """Raises the error of the check's process; returns if it succeeded."""
    if done.returncode == 0 and "peak_bytes" in record:
        return
    if done.returncode in (-9, 137) or OUT_OF_MEMORY.search(done.stderr):
        raise MachineError(
            f"the check ran out of memory (the plan says {predicted_gib:.1f} GiB)",
            expected="more free memory than the plan says",
            do="end other programs, or lower per_device_train_batch_size or max_length",
        )
    if "seen" in record:
        raise DpokitError(record["seen"], expected=record["expected"], do=record["do"])
    raise RuntimeError(f"the check's process ended with {done.returncode}:\n{done.stderr[-3000:]}")


def run_check(folder: Path) -> None:
    """Runs in the separate process: trains `STEPS` steps, evaluates one batch if a run would, writes result.json."""
    from datasets import Dataset
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    from dpokit.model.load import build_peft_config, load_policy, load_reference, load_tokenizer
    from dpokit.model.reference import decide_reference
    from dpokit.rundir import RunDir
    from dpokit.settings.layers import read_defaults
    from dpokit.settings.load import load_settings
    from dpokit.train.dpo_trainer import PairTrainer

    prefer_to_be_killed()
    job = json.loads((folder / "job.json").read_text())
    recipe = Path(job["recipe"])
    defaults = read_defaults(recipe)
    requested = decide_reference(load_settings(str(recipe), defaults, job["flags"]))
    first = requested.training
    micro_batches = min(MICRO_BATCHES, first.gradient_accumulation_steps)
    evaluates = first.eval_strategy != "no"
    settings = requested.with_training(
        "dpokit plan --check",
        output_dir=str(folder / "run"),
        report_to=[],
        save_strategy=SaveStrategy.NO,
        eval_strategy=IntervalStrategy.NO,
        load_best_model_at_end=False,
        max_steps=STEPS,
        gradient_accumulation_steps=micro_batches,
        logging_steps=1,
    )
    training = settings.training
    tokenizer = load_tokenizer(settings.model, trust_remote_code=training.trust_remote_code)
    policy = load_policy(settings, tokenizer)
    rows = [{**row, "row": i} for i, row in enumerate(job["rows"])]
    batch = repeat_rows(rows, training.per_device_train_batch_size)
    held_out = repeat_rows(rows, training.per_device_eval_batch_size)
    trainer = PairTrainer(
        run=RunDir(training.output_dir),
        identity={},  # no checkpoint is written
        model=policy,
        ref_model=load_reference(settings),
        args=training,
        train_dataset=Dataset.from_list(batch * micro_batches * STEPS),
        eval_dataset=Dataset.from_list(held_out) if evaluates else None,
        processing_class=tokenizer,
        peft_config=build_peft_config(settings, policy),
        shared_prefix=settings.data.shared_prefix,
        longest=training.max_length,
    )
    trainer.train()
    if evaluates:
        trainer.evaluate()
    (folder / "result.json").write_text(json.dumps(read_peak(on_cpu=training.use_cpu)))


def repeat_rows(rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Returns this number of rows, in turn; no two have the same prompt, which would be computed once for both."""
    repeated = (rows[i % len(rows)] for i in range(number))
    return [{**row, "prompt_ids": [i, *row["prompt_ids"][1:]]} for i, row in enumerate(repeated)]


def read_peak(*, on_cpu: bool) -> dict[str, Any]:
    """Returns this process's peak memory: VmHWM first, since `ru_maxrss` on Linux also counts the parent process."""
    import torch

    if not on_cpu and torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_reserved(), "measured_as": "max_memory_reserved"}
    status = Path("/proc/self/status")
    if status.is_file():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match is not None:
            return {"peak_bytes": int(match[1]) * 1024, "measured_as": "VmHWM"}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": peak if sys.platform == "darwin" else peak * 1024, "measured_as": "ru_maxrss"}


def prefer_to_be_killed() -> None:
    """Makes the system kill this process first if memory runs out, not another program of the user."""
    score = Path("/proc/self/oom_score_adj")
    if score.is_file():
        score.write_text("1000")


def main() -> None:
    """Runs the job in the folder that the command line names; writes a user's error into result.json."""
    folder = Path(sys.argv[1])
    quiet_dependencies()
    try:
        run_check(folder)
    except DpokitError as error:
        record = {"seen": error.seen, "expected": error.expected, "do": error.do}
        (folder / "result.json").write_text(json.dumps(record))
        sys.exit(2)


if __name__ == "__main__":
    main()
