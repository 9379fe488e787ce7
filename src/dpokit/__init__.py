"""dpokit: preference training (DPO) on one to many GPUs, with exact resumes, measured merges and evaluations.

`import dpokit` imports nothing heavy: each function of the public API is loaded when it is first used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpokit.api import evaluate_model, load_pairs, merge_model, train_model
    from dpokit.errors import DpokitError
    from dpokit.rundir import RunDir, read_metrics

# Name -> the module that has it.
_PUBLIC = {
    **dict.fromkeys(("load_pairs", "train_model", "evaluate_model", "merge_model"), "dpokit.api"),
    **dict.fromkeys(("RunDir", "read_metrics"), "dpokit.rundir"),
    "DpokitError": "dpokit.errors",
}

__all__ = [
    "DpokitError",
    "RunDir",
    "evaluate_model",
    "load_pairs",
    "merge_model",
    "read_metrics",
    "train_model",
]

# bitsandbytes logs about a missing optional CPU kernel whenever it is imported, and PEFT always imports it. The level
# is set before both imports. Delete when bitsandbytes looks for the kernel only on use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dpokit' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
