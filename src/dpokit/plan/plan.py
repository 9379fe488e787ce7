"""A plan: parameters, steps, memory per placement and the command to run, from only the config and the tokenizer."""

import shlex
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from datasets.utils.logging import disable_progress_bar

from dpokit.console import say
from dpokit.errors import SettingsError
from dpokit.model.load import find_max_length, load_tokenizer
from dpokit.plan.blueprint import Blueprint, build_blueprint, find_dtype, load_config
from dpokit.plan.devices import GIB
from dpokit.plan.lengths import Data, Row, Steps, count_steps, find_worst, load_data
from dpokit.plan.placements import (
    CONFIGS,
    CONTEXT_GIB,
    HOST_FACTOR,
    NCCL_GIB,
    ONE_DEVICE,
    PARTS,
    Estimate,
    Model,
    list_estimates,
)
from dpokit.plan.request import PlanRequest
from dpokit.plan.trace import Shape, StepMemory, trace_step
from dpokit.settings.load import Settings

# The source of each part of the memory.
SOURCES = {
    "GPU": dict.fromkeys(("weights", "gradients", "optimizer", "reference", "logits"), "arithmetic")
    | {"activations": "traced", "other": "assumed"},
    "CPU": dict.fromkeys(("gradients", "optimizer", "activations", "logits"), "traced")
    | {"weights": "arithmetic", "reference": "arithmetic", "other": "measured"},
}


@dataclass(frozen=True)
class Plan:
    """A plan; `record` returns it as JSON.

    Attributes:
        request: recipe, settings and devices.
        blueprint: the model without weights.
        steps: pairs, steps and tokens.
        train: the largest micro-batch.
        estimates: memory per placement, simplest first.
        recommended: the first placement that fits; None if no placement fits.
        advice: changes that lower the memory, if no placement fits.
        notes: unknowns, assumptions and refused placements.
        longest: token ids of the longest pairs.
        max_length: the most tokens of a row.
    """

    request: PlanRequest
    blueprint: Blueprint
    steps: Steps
    train: Shape
    estimates: list[Estimate]
    recommended: Estimate | None
    advice: list[str]
    notes: list[str]
    longest: list[Row]
    max_length: int | None

    @property
    def command(self) -> str | None:
        """The command that trains under the recommended placement."""
        return None if self.recommended is None else build_command(self.request, self.recommended.placement)

    def record(self) -> dict[str, Any]:
        """Returns the plan as JSON values, memory in GiB."""
        model = self.request.settings.model
        return {
            "recipe": str(self.request.recipe),
            "model": model.model_name_or_path,
            "method": describe_method(self.request.settings),
            "parameters": {
                "total": self.blueprint.parameters + self.blueprint.adapter_parameters,
                "trained": self.blueprint.trained_parameters,
                "adapter": self.blueprint.adapter_parameters,
            },
            "devices": {
                "kind": self.request.devices.kind,
                "count": self.request.devices.count,
                "memory_gib": round(self.request.devices.memory_gib, 2),
                "from": self.request.devices.origin,
            },
            "steps": self.steps.record(),
            "worst_micro_batch": {
                "pairs": self.train.pairs,
                "row_tokens": self.train.row_tokens,
                "answer_tokens": self.train.answer_tokens,
            },
            "sources": SOURCES[self.request.devices.kind],
            "placements": [_record_estimate(estimate) for estimate in self.estimates],
            "recommended": None if self.recommended is None else self.recommended.placement,
            "command": self.command,
            "advice": self.advice,
            "notes": self.notes,
        }


def build_plan(request: PlanRequest) -> Plan:
    """Reads config, tokenizer and rows, traces a step, and computes the memory of each placement.

    Raises:
        ModelError: config or tokenizer are missing, or the model is not a causal language model.
        DataError: unusable local data.
        SettingsError: settings that do not suit the model, or a recipe of another kind.
    """
    settings = request.settings
    if settings.kind != "dpo":
        raise SettingsError(
            f"{request.recipe} is supervised (kind {settings.kind}); dpokit plans preference runs",
            expected="a DPO recipe",
            do="plan the DPO run that follows: with the same model and batch, it needs more memory",
        )
    disable_progress_bar()
    config = load_config(settings)
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.training.trust_remote_code)
    blueprint = build_blueprint(settings, config)
    max_length = find_max_length(settings, blueprint.policy)
    data = load_data(settings, tokenizer, max_length=max_length)
    training = settings.training
    # The longest row of a sample is not the longest of the data.
    whole = data if data.exact else replace(data, train=[], evaluation=[])
    train = find_worst(whole.train, settings, pairs=training.per_device_train_batch_size, max_length=max_length)
    evaluation = None
    if training.eval_strategy != "no":
        rows = whole.evaluation or whole.train
        evaluation = find_worst(rows, settings, pairs=training.per_device_eval_batch_size, max_length=max_length)
    say(f"tracing a step of {train.pairs} pairs of {train.row_tokens:,} tokens without weights")
    notes = list_notes(request, data)
    if request.devices.kind == "CPU":
        estimates = [_trace_on_cpu(request, blueprint, train, evaluation)]
    else:
        estimates = list_estimates(
            _trace_for_gpus(request, config, blueprint, train, evaluation), settings, request.devices
        )
    notes += [f"{estimate.placement} is refused: {estimate.refused}" for estimate in estimates if estimate.refused]
    recommended = next((estimate for estimate in estimates if is_choice(estimate, request)), None)
    return Plan(
        request=request,
        blueprint=blueprint,
        steps=count_steps(data, settings, devices=request.devices.count),
        train=train,
        estimates=estimates,
        recommended=recommended,
        advice=[] if recommended is not None else list_advice(settings, train),
        notes=notes,
        longest=data.longest,
        max_length=max_length,
    )


def is_choice(estimate: Estimate, request: PlanRequest) -> bool:
    """Whether the placement fits and uses all devices."""
    return estimate.fits and (request.devices.count == 1 or estimate.placement != ONE_DEVICE)


def _trace_on_cpu(request: PlanRequest, blueprint: Blueprint, train: Shape, evaluation: Shape | None) -> Estimate:
    """Returns about the memory of a run on this CPU: the tensors alive at the peak, and the process before training.

    This process has imported the same libraries as a run, so its resident memory is about that of a run before
    training. Memory that the C library keeps after tensors are freed is not counted.
    """
    before_bytes = psutil.Process().memory_info().rss
    traced = trace_step(
        blueprint, request.settings, train=train, evaluation=evaluation, autocast=request.autocast, on_gpu=False
    )
    parts = {part: traced.at_peak.get(part, 0) for part in PARTS if part != "other"} | {"other": before_bytes}
    estimate = Estimate(ONE_DEVICE, parts, 0, fits=False)
    return replace(estimate, fits=estimate.total <= request.devices.memory_gib * GIB)


def _trace_for_gpus(
    request: PlanRequest, config: Any, blueprint: Blueprint, train: Shape, evaluation: Shape | None
) -> Model:
    """Traces the step twice: with whole weights under autocast, and with weights in the compute dtype for sharding."""
    settings = request.settings
    compute = request.autocast or find_dtype(settings, config)
    shapes: dict[str, Any] = {"train": train, "evaluation": evaluation, "on_gpu": True}
    whole: StepMemory = trace_step(blueprint, settings, **shapes, autocast=request.autocast)
    sharded = whole
    if request.devices.count > 1 or compute != find_dtype(settings, config):
        again = build_blueprint(settings, config, dtype=compute)
        sharded = trace_step(again, settings, **shapes, autocast=None)
    size = torch.empty((), dtype=compute).element_size()
    quantised = settings.model.load_in_4bit or settings.model.load_in_8bit
    return Model(blueprint, whole, sharded, quantised, size, settings.training.optim)


def describe_method(settings: Settings) -> str:
    """Returns `full`, `LoRA` or `QLoRA`."""
    if not settings.model.use_peft:
        return "full"
    return "QLoRA" if settings.model.load_in_4bit else "LoRA"


def build_command(request: PlanRequest, placement: str) -> str:
    """Returns the shell command of a run under this placement, with the flags of the request."""
    launcher = ["accelerate", "launch"]
    if placement != ONE_DEVICE:
        launcher += ["--config_file", f"accelerate_configs/{CONFIGS[placement]}.yaml"]
    return shlex.join([*launcher, str(request.recipe), *request.flags])


def list_advice(settings: Settings, train: Shape) -> list[str]:
    """Changes that lower the peak, the cheapest first."""
    training, model = settings.training, settings.model
    advice = []
    if not training.gradient_checkpointing:
        advice.append("--gradient_checkpointing true: activations are recomputed instead of kept")
    if training.per_device_train_batch_size > 1:
        more = training.gradient_accumulation_steps * training.per_device_train_batch_size
        advice.append(
            f"--per_device_train_batch_size 1 --gradient_accumulation_steps {more}: the same step in smaller parts"
        )
    if train.row_tokens > 512:
        advice.append(f"--max_length {train.row_tokens // 2}: shorter rows")
    if not model.use_peft and not training.precompute_ref_log_probs:
        advice.append("--precompute_ref_log_probs true: no reference beside the policy")
    if not model.use_peft:
        advice.append("--use_peft: LoRA needs almost no gradients and optimizer states")
    if not model.load_in_4bit:
        advice.append("--use_peft --load_in_4bit: QLoRA keeps each weight in half a byte")
    return advice or ["more or larger devices, or a smaller model"]


def list_notes(request: PlanRequest, data: Data) -> list[str]:
    """Notes on what the numbers assume."""
    notes = list(request.settings.notes)
    if not data.exact:
        notes.append(data.how if not data.train else f"steps and tokens are {data.how}")
        notes.append("memory is that of rows of max_length")
    if request.devices.kind == "GPU":
        notes.append(
            f"other: {CONTEXT_GIB:g} GiB for CUDA's context and 5 % of the step for its allocator, {NCCL_GIB:g} GiB "
            f"for NCCL with several GPUs (assumed); buckets and gathered layers (arithmetic); host memory with "
            f"DeepSpeed's factor of {HOST_FACTOR:g}"
        )
        if request.settings.model.load_in_8bit:
            notes.append("8-bit layers are counted as 16-bit layers: they take less")
    return notes


def _record_estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "placement": estimate.placement,
        "config": f"accelerate_configs/{CONFIGS[estimate.placement]}.yaml",
        "device_gib": {part: round(size / GIB, 3) for part, size in estimate.parts.items()},
        "total_gib": round(estimate.total / GIB, 3),
        "host_gib": round(estimate.host / GIB, 3),
        "fits": estimate.fits,
        "refused": estimate.refused,
    }
