"""dpokit: preference training (DPO) on one to many GPUs, with exact resumes, measured merges and evaluations.

`import dpokit` imports nothing heavy: each function of the public API is loaded when it is first used.
"""

import logging
import os
import sys
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

# Libraries open connections of their own: to count users and data sets, and to fetch or convert files. dpokit opens
# only those that the user asks for, so it switches the others off, here and in the processes that it starts. A value
# that the user has set stays.
_SILENT = {
    # TRL reports each trainer, and the Hub's client asks the Hub for a list of programs that may have started this one.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets reports each load, also that of a local file, to s3.amazonaws.com
    "USE_HUB_KERNELS": "NO",  # transformers downloads programs for some models, such as Mamba
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a server of the Hub to convert weights to safetensors
    "GRADIO_ANALYTICS_ENABLED": "False",
}
# Modules that read their variable at import; if one is imported already, its own value is set, too.
_READ_AT_IMPORT = {
    "HF_HUB_DISABLE_TELEMETRY": ("huggingface_hub.constants", "HF_HUB_DISABLE_TELEMETRY", True),
    "HF_UPDATE_DOWNLOAD_COUNTS": ("datasets.config", "HF_UPDATE_DOWNLOAD_COUNTS", False),
    "USE_HUB_KERNELS": ("transformers.integrations.hub_kernels", "_kernels_enabled", False),
}
for _variable, _value in _SILENT.items():
    if _variable not in os.environ:
        os.environ[_variable] = _value
        _module, _constant, _setting = _READ_AT_IMPORT.get(_variable, ("", "", None))
        if _module in sys.modules:
            setattr(sys.modules[_module], _constant, _setting)

# bitsandbytes logs about a missing optional CPU kernel whenever it is imported, and PEFT always imports it. The level
# is set before both imports. Delete when bitsandbytes looks for the kernel only on use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dpokit' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
