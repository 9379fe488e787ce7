"""Tries settings that only other libraries can judge, on a layer of two weights, before anything is loaded."""

import inspect
from collections.abc import Callable
from copy import copy
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler

from dpokit.errors import SettingsError
from dpokit.metrics import TIMES, list_evaluated
from dpokit.settings.load import Settings

COMPILE_MODES = ("default", "lite", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
STEPS = 10  # of the learning-rate schedule


def check_values(settings: Settings) -> None:
    """Raises SettingsError, which names the flag, for a value that would stop training at its start or its end."""
    training = settings.training
    _check_machine(training)
    _check_compilation(training)
    _check_checkpointing(training.gradient_checkpointing_kwargs)
    if training.load_best_model_at_end:
        check_metric(training.metric_for_best_model, settings.kind)
    _try("--optim, --optim_args", lambda: _build_optimizer(training))
    _try("--lr_scheduler_type, --lr_scheduler_kwargs", lambda: _step_schedule(training))


def _check_machine(training: Any) -> None:
    """Raises SettingsError for a flag that needs a GPU or a package which this machine lacks."""
    if training.activation_offloading and training.use_cpu:
        raise SettingsError(
            "activation_offloading moves activations from a GPU to the CPU, and this run has no GPU",
            expected="a GPU",
            do="leave activation_offloading out",
        )
    if training.use_liger_kernel and find_spec("liger_kernel") is None:
        raise SettingsError(
            "use_liger_kernel is set, and the package liger-kernel is not installed",
            expected="liger-kernel, which needs a GPU",
            do="pip install liger-kernel, or leave use_liger_kernel out",
        )


def _try(flags: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except Exception as error:  # any library's
        raise SettingsError(
            f"{flags}: {' '.join(str(error).split())[:300]}",
            expected="values that transformers and the optimizer take, and the packages that they need",
            do=f"correct {flags}, or leave them out",
        ) from error


def _build_optimizer(training: Any) -> None:
    kind, options = Trainer.get_optimizer_cls_and_kwargs(training, nn.Linear(1, 1))
    if kind.__module__.startswith("torch.optim"):  # others may need a GPU
        kind(nn.Linear(1, 1).parameters(), **options)
    ignored = _find_ignored_options(training, options)
    if ignored:
        raise ValueError(f"{kind.__name__} has no option {' or '.join(ignored)}")


def _find_ignored_options(training: Any, options: dict[str, Any]) -> list[str]:
    """The options in `optim_args` without which the optimizer gets the same arguments."""
    items = (training.optim_args or "").replace(" ", "").split(",")
    ignored = []
    for item in items if "params" not in options else ():  # GaLore and APOLLO keep options with their parameters
        name = item.partition("=")[0]
        if name.startswith("beta") and "betas" in options:  # beta1 and others become one option
            continue
        others = copy(training)
        others.optim_args = ",".join(other for other in items if other != item) or None
        if item and name not in options and Trainer.get_optimizer_cls_and_kwargs(others, nn.Linear(1, 1))[1] == options:
            ignored.append(name)
    return ignored


def _step_schedule(training: Any) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=training.learning_rate)
    options = training.lr_scheduler_kwargs
    name = training.lr_scheduler_type
    schedule = get_scheduler(name, optimizer, 1, STEPS, scheduler_specific_kwargs=options)
    optimizer.step()
    steps: list[Any] = [1.0] if "metrics" in inspect.signature(schedule.step).parameters else []
    for _ in range(STEPS):
        schedule.step(*steps)


def _check_compilation(training: Any) -> None:
    backends = [backend.value.lower() for backend in DynamoBackend]
    for flag, value, allowed in (
        ("torch_compile_backend", training.torch_compile_backend, backends),
        ("torch_compile_mode", training.torch_compile_mode, COMPILE_MODES),
    ):
        if value is not None and value.lower() not in allowed:
            raise SettingsError(f"{flag} is {value}", expected=" or ".join(allowed), do=f"correct --{flag}")


def _check_checkpointing(options: Any) -> None:
    allowed = {name for name in inspect.signature(checkpoint).parameters if name not in ("function", "args", "kwargs")}
    allowed.add("preserve_rng_state")
    unknown = sorted(set(options or {}) - allowed)
    if unknown:
        raise SettingsError(
            f"gradient_checkpointing_kwargs has {', '.join(unknown)}",
            expected=f"some of: {', '.join(sorted(allowed))}",
            do="correct --gradient_checkpointing_kwargs",
        )


def check_metric(name: str | None, kind: str) -> None:
    """Raises SettingsError for a metric that no evaluation of this kind of recipe has.

    Args:
        name: the metric of `--metric_for_best_model`, with `eval_` or without.
        kind: `dpo` or `sft`.
    """
    metrics = list_evaluated(kind)
    if name is not None and name.removeprefix("eval_") not in metrics:
        raise SettingsError(
            f"metric_for_best_model is {name}, which no evaluation has",
            expected=", ".join(f"eval_{metric}" for metric in metrics if metric not in TIMES),
            do="correct --metric_for_best_model",
        )
