"""The stages of a GPU day. `day.py` starts each as a process: python day_stages.py STAGE --records FILE --work FOLDER.

A stage is a function that returns its cases by name, or runs and records them itself. Each result is appended to the
records as soon as it is there, so a stage that is cut keeps the cases that it has done.
"""

import argparse
import ctypes
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from day import Records, is_done, summarise
from day_context import TESTS, Cases, Context, Values, wait_for_gpu
from day_equality import run_equality
from day_machine import GIB, LackError, read_versions
from day_runs import run_memory, run_placements, run_whole
from day_steps import SHAPES, run_steps

PR_SET_PDEATHSIG = 1


# -- machine -----------------------------------------------------------------------------------------------------------


def run_machine(context: Context) -> Cases:
    return {"versions": lambda: describe_machine(context), "matrix peak": lambda: measure_peak(context)}


def describe_machine(context: Context) -> Values:
    values: Values = {"python": sys.version.split()[0], **read_versions(), "CPU cores": len(os.sched_getaffinity(0))}
    values["disk, GiB free"] = round(shutil.disk_usage(context.work).free / GIB)
    if not context.dry_run:
        facts = torch.cuda.get_device_properties(0)
        values |= {"GPU": facts.name, "capability": f"{facts.major}.{facts.minor}"}
        values |= {"multiprocessors": facts.multi_processor_count, "GPU GiB": round(facts.total_memory / GIB, 1)}
        values |= {"CUDA of torch": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    return values


def measure_peak(context: Context) -> Values:
    """TFLOP/s of bf16 matrix products (fp32 in a dry run): the best and the median of some rounds."""
    size, products, dtype = (256, 2, torch.float32) if context.dry_run else (8192, 20, torch.bfloat16)
    left, right = (torch.randn(size, size, device=context.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    rates = []
    for _ in range(8):
        wait_for_gpu()
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right, out=out)
        wait_for_gpu()
        rates.append(products * 2 * size**3 / (time.perf_counter() - began) / 1e12)
    return {"best": max(rates), "median": statistics.median(rates), "dtype": str(dtype).removeprefix("torch.")}


# -- tests -------------------------------------------------------------------------------------------------------------


def run_tests(context: Context) -> Cases:
    """Runs the fast tests that are marked `gpu`, each a case."""
    from day_pytest import find_files, run_pytest

    run_pytest(find_files(TESTS), "gpu and not slow", context.record, context.done, context.work / "pytest")
    return {}


# -- the process -------------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Context], Cases]] = {
    "machine": run_machine,
    "equality": run_equality,
    "tests": run_tests,
    **dict.fromkeys(SHAPES, run_steps),
    "run": run_whole,
    "memory": run_memory,
    "placements": run_placements,
}


def find_gpu_trouble() -> str | None:
    """Why torch cannot use the GPU; None if it can."""
    try:
        torch.cuda.init()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as error:  # of several classes: no CUDA in torch, an old driver, a GPU that fails
        return f"torch {torch.__version__} cannot use the GPU: {' '.join(str(error).split())[:300]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--memory-gib", type=float)
    options = parser.parse_args()
    # A warm process has another parent until that one ends.
    deadline = time.monotonic() + 5
    while os.getppid() != options.parent and time.monotonic() < deadline:
        time.sleep(0.01)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a day that is killed leaves no process on the GPU
    records = Records(options.records)
    begun = {record["case"] for record in records.read() if record.get("stage") == options.stage and "case" in record}
    cases_so_far = summarise(records)["stages"].get(options.stage, {"cases": {}})["cases"]
    done = {name for name, case in cases_so_far.items() if is_done(case)}
    context = Context(options.stage, options.dry_run, options.work, records, done)
    if not options.dry_run:
        if trouble := find_gpu_trouble():
            context.record("torch", lacked=trouble)
            return 0
        if options.memory_gib is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib * GIB / total))
    try:
        cases = STAGES[options.stage](context)
    except LackError as lack:
        context.record(options.stage, lacked=str(lack))
        return 0
    for name, compute in sorted(cases.items(), key=lambda case: case[0] in begun):  # one that hung comes last
        if name not in done:
            context.attempt(name, compute)
    return 0


if __name__ == "__main__":
    sys.exit(main())
