"""Gates: they stop a run that cannot be right, with one error message; `--gates warn` makes them warn instead.

The gates of the training steps are here: wrong placement or adapter, a first loss that is not ln 2, an adapter without
a gradient, a loss that is not finite. Those before the first step are in `preflight`. A gate stops only a run that is
certainly wrong: it skips its check if dropout or the adapter's initialisation leaves a doubt. All ranks decide alike,
from values that they share or from rank 0's.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig

from dpokit.console import say
from dpokit.distributed.coordination import decide_on_main_process
from dpokit.distributed.placement import find_requested_placement
from dpokit.errors import GateError
from dpokit.model.score import find_dropout
from dpokit.train.steps import StepTrainer
from dpokit.untrained_loss import LN_2, LN_2_LOSSES

# The largest difference of policy and reference before the first update, as a share of the log-probs. Measured with 2
# and 8 layers: 0 if both are computed in the same batch, in every precision. Reference computed ahead in other batches:
# 3e-8 in fp32, 5e-4 in 8 bit. DoRA, 16 and 4 bit: 5e-4. Another model as reference: above 1e-1.
START_TOLERANCE_FP32 = 1e-4
START_TOLERANCE_16_BIT = 1e-2
# In 16 bits, short answers of a pretrained model differ by more; their rounding is measured on the first batch, and the
# limit is this many times as large.
START_ROUNDINGS = 6.0

# Loss scaling starts too high and skips steps until the gradients fit; it may take this many steps.
FP16_SETTLES_STEPS = 50


class Gates:
    """Stops the run or warns, for all gates.

    Args:
        mode: `stop` or `warn`, by the flag `--gates`.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._warned: set[str] = set()

    def trip(self, observed: str, *, expected: str, do: str) -> None:
        """Stops the run, or prints one warning and returns; each warning once. Raises: GateError in mode `stop`."""
        if self.mode == "stop":
            raise GateError(observed, expected=expected, do=f"{do}; or --gates warn to go on anyway")
        if observed not in self._warned:
            self._warned.add(observed)
            say(f"gate (warning): {observed}; expected: {expected}")


def star_layers(name: str) -> str:
    """The name of a parameter or module, with its layer numbers replaced by `*`."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def list_places(names: Iterable[str], shown: int = 4) -> str:
    """Names with layer numbers replaced by `*`, each once."""
    kinds = list(dict.fromkeys(map(star_layers, names)))
    return ", ".join(kinds[:shown]) + (f" and {len(kinds) - shown} more" if len(kinds) > shown else "")


class GateCallback(TrainerCallback):
    """The gates at the start of training and at each step.

    The last callback of a trainer: it must see each log and save that another callback requests.

    Args:
        trainer: the trainer.
        gates: where the gates report.
        with_adapter: whether `--use_peft` is set.
    """

    def __init__(self, trainer: StepTrainer, gates: Gates, *, with_adapter: bool) -> None:
        self.trainer = trainer
        self.gates = gates
        self.with_adapter = with_adapter
        self.first_step = 0  # of this start of the run
        self.gradient_due = True
        self.evaluation_was_bad = False
        self._reached: set[str] = set()
        self._hooks: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step = state.global_step + 1
        self._check_setup(args)
        if not any(weight.requires_grad for weight in self.trainer.model.parameters()):
            self._trip_gradient("no parameter of the model may be trained")

    def _check_setup(self, args: TrainingArguments) -> None:
        requested, placement = find_requested_placement(args), self.trainer.placement
        if placement != requested.removesuffix(" + CPU offload"):
            self.gates.trip(
                f"the model was to be placed by {requested} over {args.world_size} processes, but it is by {placement}",
                expected=requested,
                do="check the launcher's --config_file; accelerate_configs/ has a tested one for each placement",
            )
        has_adapter = isinstance(self.trainer.model, PeftModel)
        if has_adapter != self.with_adapter:
            self.gates.trip(
                "--use_peft requests an adapter, but the model has none"
                if self.with_adapter
                else "the model is trained through an adapter, but --use_peft is false",
                expected="an adapter if, and only if, --use_peft is true",
                do="--use_peft true for an adapter, --use_peft false with a model that has none",
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step + 1 != self.first_step or args.torch_compile:
            return
        # Hooks, as a parameter that DeepSpeed shards has no .grad.
        model = self.trainer.model
        self._hooks = [model.register_forward_hook(self._check_output)]
        for name, weight in find_adapter(model).items():
            self._hooks.append(weight.register_hook(lambda _, name=name: self._reached.add(name)))

    def _check_output(self, model: nn.Module, _: Any, output: Any) -> None:
        if output.loss is None:  # with --label_smoothing_factor, TRL computes the loss from the logits
            return
        if torch.is_grad_enabled() and model.training and not output.loss.requires_grad:
            self._trip_gradient("no parameter that is trained takes part in the loss")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        adapter = find_adapter(self.trainer.model)
        reached = {name: name in self._reached or weight.grad is not None for name, weight in adapter.items()}
        dead = decide_on_main_process(lambda: find_dead_modules(reached))
        if dead:
            self._trip_gradient(f"its weights in these modules take no part in the loss: {list_places(dead)}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 1:
            control.should_log = True  # the gate of the first step needs its log
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._check_finite()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._check_finite()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # an evaluation, or the end of the run
            return
        if state.global_step == 1 and isinstance(args, DPOConfig):
            self._check_start(args, logs)
        if self.gradient_due:
            self._check_gradient(args, state.global_step, logs.get("grad_norm"))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss", 0.0)
        if not math.isfinite(loss) and not self.evaluation_was_bad:
            self.evaluation_was_bad = True
            self._trip_finite(f"the evaluation's loss at step {state.global_step} is {loss}", state.global_step)

    def _check_finite(self) -> None:
        step = self.trainer.find_non_finite_step()
        if step is not None:
            self._trip_finite(f"the loss or its gradient is not finite at step {step}", step)

    def _trip_finite(self, observed: str, step: int) -> None:
        self.gates.trip(
            observed,
            expected="a finite loss; no weights of this step were saved",
            do="look at the model's weights, and load it with --dtype float32 or bfloat16, not float16"
            if step <= 1
            else "lower --learning_rate, set --max_grad_norm 1, or train in bf16 instead of fp16",
        )

    def _check_gradient(self, args: TrainingArguments, step: int, norm: float | None) -> None:
        if norm is None or (args.fp16 and not 0 < norm < math.inf and step < self.first_step + FP16_SETTLES_STEPS):
            return
        self.gradient_due = False
        # In a resumed run a gradient of 0 may be right: a hinge loss has none for pairs beyond its margin.
        if norm == 0 and self.first_step == 1:
            self._trip_gradient("the norm of its gradient is 0")
        elif not math.isfinite(norm):
            self._trip_finite(f"the gradient is not finite at step {step}", step)

    def _trip_gradient(self, why: str) -> None:
        is_adapter = isinstance(self.trainer.model, PeftModel)
        self.gates.trip(
            f"the {'adapter' if is_adapter else 'model'} receives no gradient: {why}",
            expected="a gradient for all trained weights",
            do="choose other --lora_target_modules (the LM head is scored by its base weight: no adapter works there), "
            "or load the adapter as trainable"
            if is_adapter
            else "train a model whose weights require gradients, or add --use_peft",
        )

    def _check_start(self, args: DPOConfig, logs: dict[str, Any]) -> None:
        """Trips if the first step has rewards, or a loss other than ln 2: policy and reference are still equal."""
        if not (math.isfinite(logs["loss"]) and is_start_certain(self.trainer.model, args)):
            return
        exact = self.trainer.accelerator.mixed_precision == "no" and not args.tf32
        exact = exact and all(weight.dtype == torch.float32 for weight in self.trainer.model.parameters())
        tolerance = START_TOLERANCE_FP32 if exact else START_TOLERANCE_16_BIT
        gaps = {side: logs[f"rewards/{side}"] / args.beta for side in ("chosen", "rejected")}
        limits = {side: tolerance * max(1.0, abs(logs[f"logps/{side}"])) for side in gaps}
        if not exact and (rounding := self.trainer.answer_rounding) is not None:
            limits = {side: max(limit, START_ROUNDINGS * rounding) for side, limit in limits.items()}
        same = all(abs(gaps[side]) <= limits[side] for side in gaps)
        # WPO's weights change the loss, and a mixture of experts adds its balancing loss.
        starts_at_ln_2 = set(args.loss_type) <= LN_2_LOSSES and not args.use_weighting and "aux_loss" not in logs
        loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
        total_weight, scale = sum(loss_weights), sum(map(abs, loss_weights))
        is_ln_2 = abs(logs["loss"] - total_weight * LN_2) <= scale * (args.beta * sum(limits.values()) / 2 + 1e-3)
        if same and (is_ln_2 or not starts_at_ln_2):
            return
        why = "its scale is wrong" if same else "policy and reference are not the same model at the start"
        ln_2 = f"{'' if total_weight == 1 else f'{total_weight:g} * '}ln 2 = {total_weight * LN_2:.4f}"
        first = f"the first loss is {logs['loss']:.4f}, not {ln_2}" if starts_at_ln_2 else "the first rewards are not 0"
        self.gates.trip(
            f"{first}: {why} "
            f"(log-probs differ by {gaps['chosen']:+.3g} for chosen and {gaps['rejected']:+.3g} for rejected answers)",
            expected="a reference with the policy's own weights, as nothing is trained yet",
            do="set --model_name_or_path to the model that is to be improved; with --precompute_ref_log_probs, delete "
            "the cached log-probs (DPOKIT_CACHE, else ~/.cache/dpokit)",
        )


def find_adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters that get a gradient in every step; empty without an adapter.

    Experts of a mixture are left out: a step may send no token to one of them.
    """
    if not isinstance(model, PeftModel):
        return {}
    return {n: weight for n, weight in model.named_parameters() if weight.requires_grad and "expert" not in n}


def find_dead_modules(reached: dict[str, bool]) -> list[str]:
    """Adapted modules without a gradient in any layer, although other modules of these layers have one.

    Names have `*` in place of layer numbers. Modules that only some layers leave out do not count (layers that share
    keys), nor does a whole tower (vision, if the pairs are text): the rest of the adapter is trained as it should be.

    Args:
        reached: for each parameter of the adapter, by name, whether it got a gradient.
    """
    modules = {name: star_layers(re.sub(r"\.(lora_|modules_to_save).*", "", name)) for name in reached}
    alive = {modules[name] for name in reached if reached[name]}
    dead = [module for module in dict.fromkeys(modules.values()) if module not in alive]
    layers = {m: m[: m.rindex("*") + 1] if "*" in m else m.rpartition(".")[0] for m in dead}
    return [m for m in dead if not alive or any(other.startswith(f"{layers[m]}.") for other in alive)]


def is_start_certain(model: nn.Module, args: DPOConfig) -> bool:
    """Whether policy and reference must agree at the start: without randomness, and with an adapter that adds 0."""
    if args.neftune_noise_alpha or find_dropout(model):
        return False
    if (
        isinstance(model, PeftModel) and "ref" not in model.peft_config
    ):  # with "ref", TRL keeps a copy of the adapter's start
        start = getattr(model.peft_config[model.active_adapter], "init_lora_weights", None)
        return start is True or start == "gaussian"
    return True
