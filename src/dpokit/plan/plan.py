"""A plan: parameters, steps, memory per placement, and what to run; nothing is downloaded but config and tokenizer."""

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
from dpokit.plan.lengths import Data, Row, Steps, count_steps, find_worst, load_data
from dpokit.plan.placements import (
    CONFIGS,
    CONTEXT_GIB,
    HOST_FACTOR,
    NCCL_GIB,
    ONE_DEVICE,
    PARTS,
    Model,
    Room,
    list_rooms,
)
from dpokit.plan.request import Asked
from dpokit.plan.target import GIB
from dpokit.plan.trace import Shape, Traced, trace_step
from dpokit.settings.load import Settings

# How each part of a row is known.
SOURCES = {
    "GPU": dict.fromkeys(("weights", "gradients", "optimizer", "reference", "logits"), "arithmetic")
    | {"activations": "traced", "other": "assumed"},
    "CPU": dict.fromkeys(("gradients", "optimizer", "activations", "logits"), "traced")
    | {"weights": "arithmetic", "reference": "arithmetic", "other": "measured"},
}


@dataclass(frozen=True)
class Plan:
    """All a plan says; `record` is its JSON.

    Attributes:
        asked: recipe, settings and devices.
        blueprint: the model's numbers.
        steps: pairs, steps and tokens.
        train: the largest micro-batch.
        rooms: memory per placement, simplest first.
        recommended: the first that fits; None where none does.
        advice: what to change where none fits.
        notes: what is not known, assumed or refused.
        longest: token ids of the longest pairs.
        max_length: the most tokens of a row.
    """

    asked: Asked
    blueprint: Blueprint
    steps: Steps
    train: Shape
    rooms: list[Room]
    recommended: Room | None
    advice: list[str]
    notes: list[str]
    longest: list[Row]
    max_length: int | None

    @property
    def command(self) -> str | None:
        """What trains under the recommended placement."""
        return None if self.recommended is None else build_command(self.asked, self.recommended.placement)

    def record(self) -> dict[str, Any]:
        """JSON values; memory in GiB."""
        model = self.asked.settings.model
        return {
            "recipe": str(self.asked.recipe),
            "model": model.model_name_or_path,
            "method": describe_method(self.asked.settings),
            "parameters": {
                "total": self.blueprint.parameters + self.blueprint.adapter_parameters,
                "trained": self.blueprint.trained_parameters,
                "adapter": self.blueprint.adapter_parameters,
            },
            "devices": {
                "kind": self.asked.target.kind,
                "count": self.asked.target.count,
                "memory_gib": round(self.asked.target.memory_gib, 2),
                "from": self.asked.target.origin,
            },
            "steps": self.steps.record(),
            "worst_micro_batch": {
                "pairs": self.train.pairs,
                "row_tokens": self.train.row_tokens,
                "answer_tokens": self.train.answer_tokens,
            },
            "sources": SOURCES[self.asked.target.kind],
            "placements": [_room_record(room) for room in self.rooms],
            "recommended": None if self.recommended is None else self.recommended.placement,
            "command": self.command,
            "advice": self.advice,
            "notes": self.notes,
        }


def build_plan(asked: Asked) -> Plan:
    """Reads config, tokenizer and rows, traces a step, and counts.

    Raises:
        ModelError: no config or tokenizer, or no causal language model.
        DataError: local data that cannot be used.
        SettingsError: settings that the model does not bear, or a recipe of another kind.
    """
    settings = asked.settings
    if settings.kind != "dpo":
        raise SettingsError(
            f"{asked.recipe} is supervised (kind {settings.kind}), and plans are of preference runs",
            expected="a DPO recipe",
            do="plan the DPO run that follows: with the same model and batch it needs more memory",
        )
    disable_progress_bar()
    config = load_config(settings)
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.training.trust_remote_code)
    blueprint = build_blueprint(settings, config)
    max_length = find_max_length(settings, blueprint.policy)
    data = load_data(settings, tokenizer, max_length=max_length)
    training = settings.training
    # A sample's longest row is not the data's.
    known = data if data.exact else replace(data, train=[], evaluation=[])
    train = find_worst(known.train, settings, pairs=training.per_device_train_batch_size, max_length=max_length)
    evaluation = None
    if training.eval_strategy != "no":
        rows = known.evaluation or known.train
        evaluation = find_worst(rows, settings, pairs=training.per_device_eval_batch_size, max_length=max_length)
    say(f"tracing a step of {train.pairs} pairs of {train.row_tokens:,} tokens, without weights")
    notes = list_notes(asked, data)
    if asked.target.kind == "CPU":
        rooms = [_trace_on_cpu(asked, blueprint, train, evaluation)]
    else:
        rooms = list_rooms(_trace_for_gpus(asked, config, blueprint, train, evaluation), settings, asked.target)
    notes += [f"{room.placement} is refused: {room.refused}" for room in rooms if room.refused]
    recommended = next((room for room in rooms if is_choice(room, asked)), None)
    return Plan(
        asked=asked,
        blueprint=blueprint,
        steps=count_steps(data, settings, devices=asked.target.count),
        train=train,
        rooms=rooms,
        recommended=recommended,
        advice=[] if recommended is not None else list_advice(settings, train),
        notes=notes,
        longest=data.longest,
        max_length=max_length,
    )


def is_choice(room: Room, asked: Asked) -> bool:
    """Whether the placement fits and uses all devices."""
    return room.fits and (asked.target.count == 1 or room.placement != ONE_DEVICE)


def _trace_on_cpu(asked: Asked, blueprint: Blueprint, train: Shape, evaluation: Shape | None) -> Room:
    """The memory of one step on this machine: all tensors alive at its peak, and what a run holds before it trains.

    This process has imported what a run imports, so that its resident memory is the run's before training. Free memory
    that the C library keeps is not counted.
    """
    before_bytes = psutil.Process().memory_info().rss
    traced = trace_step(
        blueprint, asked.settings, train=train, evaluation=evaluation, autocast=asked.autocast, on_gpu=False
    )
    parts = {part: traced.at_peak.get(part, 0) for part in PARTS if part != "other"} | {"other": before_bytes}
    room = Room(ONE_DEVICE, parts, 0, fits=False)
    return replace(room, fits=room.total <= asked.target.memory_gib * GIB)


def _trace_for_gpus(asked: Asked, config: Any, blueprint: Blueprint, train: Shape, evaluation: Shape | None) -> Model:
    """Two traces: whole weights under autocast, and weights in the type of the products as sharded placements hold."""
    settings = asked.settings
    compute = asked.autocast or find_dtype(settings, config)
    shapes: dict[str, Any] = {"train": train, "evaluation": evaluation, "on_gpu": True}
    whole: Traced = trace_step(blueprint, settings, **shapes, autocast=asked.autocast)
    sharded = whole
    if asked.target.count > 1 or compute != find_dtype(settings, config):
        again = build_blueprint(settings, config, dtype=compute)
        sharded = trace_step(again, settings, **shapes, autocast=None)
    size = torch.empty((), dtype=compute).element_size()
    quantised = settings.model.load_in_4bit or settings.model.load_in_8bit
    return Model(blueprint, whole, sharded, quantised, size, settings.training.optim)


def describe_method(settings: Settings) -> str:
    """`full`, `LoRA`, or `QLoRA`."""
    if not settings.model.use_peft:
        return "full"
    return "QLoRA" if settings.model.load_in_4bit else "LoRA"


def build_command(asked: Asked, placement: str) -> str:
    """The launcher's line, with the flags that were given."""
    words = ["accelerate", "launch"]
    if placement != ONE_DEVICE:
        words += ["--config_file", f"accelerate_configs/{CONFIGS[placement]}.yaml"]
    return shlex.join([*words, str(asked.recipe), *asked.flags])


def list_advice(settings: Settings, train: Shape) -> list[str]:
    """What lowers the peak, the cheapest first."""
    training, model = settings.training, settings.model
    advice = []
    if not training.gradient_checkpointing:
        advice.append("--gradient_checkpointing true: activations are computed again instead of kept")
    if training.per_device_train_batch_size > 1:
        more = training.gradient_accumulation_steps * training.per_device_train_batch_size
        advice.append(f"--per_device_train_batch_size 1 --gradient_accumulation_steps {more}: the same step in pieces")
    if train.row_tokens > 512:
        advice.append(f"--max_length {train.row_tokens // 2}: shorter rows")
    if not model.use_peft and not training.precompute_ref_log_probs:
        advice.append("--precompute_ref_log_probs true: no reference beside the policy")
    if not model.use_peft:
        advice.append("--use_peft: LoRA has almost no gradients and optimizer states")
    if not model.load_in_4bit:
        advice.append("--use_peft --load_in_4bit: QLoRA keeps weights in half a byte")
    return advice or ["more or larger devices, or a smaller model"]


def list_notes(asked: Asked, data: Data) -> list[str]:
    """What the numbers rest on."""
    notes = list(asked.settings.notes)
    if not data.exact:
        notes.append(data.how if not data.train else f"steps and tokens are {data.how}")
        notes.append("memory is counted for rows of max_length")
    if asked.target.kind == "GPU":
        notes.append(
            f"other: {CONTEXT_GIB:g} GiB for CUDA's context and 5 % of the step for its allocator, {NCCL_GIB:g} GiB "
            f"for NCCL with several GPUs (assumed); buckets and gathered layers (arithmetic); host memory with "
            f"DeepSpeed's factor of {HOST_FACTOR:g}"
        )
        if asked.settings.model.load_in_8bit:
            notes.append("8-bit layers are counted as 16-bit ones: their own memory is less")
    return notes


def _room_record(room: Room) -> dict[str, Any]:
    return {
        "placement": room.placement,
        "config": f"accelerate_configs/{CONFIGS[room.placement]}.yaml",
        "device_gib": {part: round(size / GIB, 3) for part, size in room.parts.items()},
        "total_gib": round(room.total / GIB, 3),
        "host_gib": round(room.host / GIB, 3),
        "fits": room.fits,
        "refused": room.refused,
    }
