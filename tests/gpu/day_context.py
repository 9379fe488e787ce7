"""How a stage of a GPU day runs and records its cases; shared by all stages."""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from day import Records
from day_machine import ROOT, LackError

TESTS = ROOT / "tests"
sys.path[1:1] = [str(TESTS), str(TESTS / "model"), str(TESTS / "benchmarks")]

Values = dict[str, Any]
Cases = dict[str, Callable[[], Values]]
PYTHON = [sys.executable]


@dataclass(frozen=True)
class Context:
    """How a stage runs.

    Attributes:
        stage: its name.
        dry_run: on the CPU, with small shapes.
        work: a folder that is removed at its end.
        records: where results go.
        done: the cases that have a result.
    """

    stage: str
    dry_run: bool
    work: Path
    records: Records
    done: set[str]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    def record(self, case: str, **values: Any) -> None:
        self.records.append(stage=self.stage, case=case, **values)

    def attempt(self, case: str, compute: Callable[[], Values]) -> None:
        """Computes a case and records its values, what it lacked, or its error."""
        print(f"-- {case}", flush=True)
        self.record(case, began=True)
        began = time.monotonic()
        try:
            values = compute()
        except LackError as lack:
            values = {"lacked": str(lack)}
        except torch.OutOfMemoryError as error:
            values = {"lacked": f"memory: {' '.join(str(error).split())[:200]}"}
        except Exception as error:
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.record(case, **values, took_seconds=round(time.monotonic() - began, 1))


def import_rows() -> tuple[Path, Callable[[int], list[dict[str, str]]]]:
    """The tokenizer's folder and the reader of HH pairs that the benchmarks use. Raises: LackError without the data."""
    from workloads import TOKENIZER, read_pairs

    if not TOKENIZER.is_dir():
        raise LackError(f"HH rows and GPT-2's tokenizer: {TOKENIZER} does not exist; set DPOKIT_SHARED")
    return TOKENIZER, read_pairs


def wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
