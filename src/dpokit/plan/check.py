"""A plan against reality: the longest rows are trained on for two steps, in a process of their own that leaves nothing.

    python -m dpokit.plan.check FOLDER

is that process; FOLDER holds the job and receives the result. The second step meets the optimizer states that the
first one made, as all steps of a run but the first do.
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
from dpokit.plan.plan import Plan
from dpokit.plan.target import GIB

STEPS = 2
MICRO_BATCHES = 2  # a second one meets the gradients of the first


def check_plan(plan: Plan) -> dict[str, Any]:
    """Runs the longest rows for real; predicted and measured peak in GiB, and how far they are apart in percent.

    On the CPU the peak is the process's resident memory, on a GPU what the caching allocator reserved.

    Raises:
        SettingsError: the plan is for devices that are not here.
        MachineError: the step needs more memory than there is.
        DpokitError: what a run would stop with.
    """
    asked = plan.asked
    if asked.target.host_gib is None:
        raise SettingsError(
            "--check measures on this machine, and --gpus gives devices that need not be here",
            expected="one of them",
            do="leave out --gpus to plan and check for this machine, or --check",
        )
    room = plan.rooms[0]
    with tempfile.TemporaryDirectory(prefix="dpokit-plan-") as folder:
        job = {
            "recipe": str(asked.recipe.resolve()),
            "flags": list(asked.flags),
            "rows": plan.longest or make_rows(plan),
            "folder": folder,
        }
        Path(folder, "job.json").write_text(json.dumps(job))
        say(f"checking: {STEPS} real steps of the longest rows, in a process of their own")
        done = subprocess.run(
            [*PYTHON, "-m", "dpokit.plan.check", folder],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TQDM_DISABLE": "1"},
        )
        result = Path(folder, "result.json")
        record: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    raise_failure(done, record, predicted_gib=room.total / GIB)
    predicted, measured = room.total / GIB, record["peak_bytes"] / GIB
    return {
        "placement": room.placement,
        "predicted_gib": round(predicted, 3),
        "measured_gib": round(measured, 3),
        "difference_percent": round(100 * (predicted / measured - 1), 2),
        "measured_as": record["measured_as"],
    }


def make_rows(plan: Plan) -> list[dict[str, list[int]]]:
    """Where no data was reached: pairs of `max_length` tokens, half of them the prompt's."""
    tokens = plan.train.row_tokens
    half = tokens // 2
    return [{"prompt_ids": [0] * half, "chosen_ids": [1] * (tokens - half), "rejected_ids": [2] * (tokens - half)}]


def raise_failure(done: "subprocess.CompletedProcess[str]", record: dict[str, Any], *, predicted_gib: float) -> None:
    """Raises what the process met; nothing where it met nothing."""
    if done.returncode == 0 and "peak_bytes" in record:
        return
    if done.returncode in (-9, 137) or OUT_OF_MEMORY.search(done.stderr):
        raise MachineError(
            f"the check ran out of memory (the plan says {predicted_gib:.1f} GiB)",
            expected="as much free memory as the plan says, and some to spare",
            do="end what else runs here, or lower per_device_train_batch_size or max_length",
        )
    if "seen" in record:
        raise DpokitError(record["seen"], expected=record["expected"], do=record["do"])
    raise RuntimeError(f"the check's process ended with {done.returncode}:\n{done.stderr[-3000:]}")


def run_check(folder: Path) -> None:
    """The process's own part: load, train `STEPS` steps, evaluate one batch where a run would, write result.json."""
    from datasets import Dataset

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
    asked = decide_reference(load_settings(str(recipe), defaults, job["flags"]))
    first = asked.training
    micro_batches = min(MICRO_BATCHES, first.gradient_accumulation_steps)
    evaluates = first.eval_strategy != "no"
    overrides = {
        "output_dir": str(folder / "run"),
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": "false",
        "max_steps": STEPS,
        "precompute_ref_log_probs": str(first.precompute_ref_log_probs),
        "gradient_accumulation_steps": micro_batches,
        "logging_steps": 1,
    }
    settings = load_settings(
        str(recipe), defaults, [*job["flags"], *(word for k, v in overrides.items() for word in (f"--{k}", str(v)))]
    )
    training = settings.training
    tokenizer = load_tokenizer(settings.model, trust_remote_code=training.trust_remote_code)
    policy = load_policy(settings, tokenizer)
    rows = [{**row, "row": i} for i, row in enumerate(job["rows"])]
    batch = [rows[i % len(rows)] for i in range(training.per_device_train_batch_size)]
    held_out = [rows[i % len(rows)] for i in range(training.per_device_eval_batch_size)]
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


def read_peak(*, on_cpu: bool) -> dict[str, Any]:
    """This process's own peak. Not `ru_maxrss`, in which Linux counts the process that started this one."""
    import torch

    if not on_cpu and torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_reserved(), "measured_as": "max_memory_reserved"}
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found is not None:
            return {"peak_bytes": int(found[1]) * 1024, "measured_as": "VmHWM"}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": peak if sys.platform == "darwin" else peak * 1024, "measured_as": "ru_maxrss"}


def prefer_to_be_killed() -> None:
    """Where memory runs out, the system ends this process and none of the user's."""
    score = Path("/proc/self/oom_score_adj")
    if score.is_file():
        score.write_text("1000")


def main() -> None:
    """Runs the job in the folder that the command line names; the user's errors go into result.json."""
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
