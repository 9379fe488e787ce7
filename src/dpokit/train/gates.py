"""Gates: a run that cannot be right is stopped, in one plain sentence; `--gates warn` turns the stops into warnings.

Those of the steps are here: placement and adapter in force, a first loss away from ln 2, an adapter without a gradient,
a loss that is not finite. Those before the first step are in `start`. A gate stops only what is certain: where dropout
or an adapter's start leaves a doubt, it lets pass. Every rank takes the same decision, from values that all ranks share
or from rank 0's.
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
from dpokit.distributed.placement import find_placement, find_requested_placement
from dpokit.errors import GateError
from dpokit.model.score import find_dropout
from dpokit.train.steps import StepTrainer
from dpokit.untrained_loss import LN_2, LN_2_LOSSES

# How far policy and reference may be apart before the first update, as a share of the log-probs. Measured, 2 and 8
# layers: 0 wherever both are computed in the same batch, in every precision. Reference computed ahead in other batches:
# 3e-8 in fp32, 3e-5 in bf16, 5e-4 in 8 bit, 1.4e-3 in bf16 against a reference kept from an fp32 run. DoRA, 16 and
# 4 bit: 5e-4. Another model as reference: above 1e-1.
TOLERANCE_FP32 = 1e-4
TOLERANCE_16_BIT = 1e-2

# Loss scaling starts too high and skips steps until the gradients fit; as many steps it may take.
FP16_SETTLES_STEPS = 50


class Gates:
    """Where all gates report.

    Args:
        mode: `stop` or `warn`, the flag `--gates`.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._said: set[str] = set()

    def trip(self, seen: str, *, expected: str, do: str) -> None:
        """Stops the run, or says one line and returns; the same line only once. Raises: GateError in mode `stop`."""
        if self.mode == "stop":
            raise GateError(seen, expected=expected, do=f"{do}; or --gates warn to go on anyway")
        if seen not in self._said:
            self._said.add(seen)
            say(f"gate (warning): {seen}; expected: {expected}")


def star_layers(name: str) -> str:
    """A parameter's or module's name with its layer numbers as stars."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def list_places(names: Iterable[str], shown: int = 4) -> str:
    """Names with layer numbers as stars, each kind once."""
    kinds = list(dict.fromkeys(map(star_layers, names)))
    return ", ".join(kinds[:shown]) + (f" and {len(kinds) - shown} more" if len(kinds) > shown else "")


class GateCallback(TrainerCallback):
    """The gates of the steps, and of what is in force when they begin.

    Added last: it must know of each log and save that another callback asks for.

    Args:
        with_adapter: whether `--use_peft` asked for one.
    """

    def __init__(self, trainer: StepTrainer, gates: Gates, *, with_adapter: bool) -> None:
        self.trainer = trainer
        self.gates = gates
        self.with_adapter = with_adapter
        self.first_step = 0  # the step that this process begins with
        self.gradient_due = True
        self.evaluation_was_bad = False
        self._reached: set[str] = set()
        self._hooks: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step = state.global_step + 1
        self._check_in_force(args)
        if not any(weight.requires_grad for weight in self.trainer.model.parameters()):
            self._trip_gradient("no parameter of the model may be trained")

    def _check_in_force(self, args: TrainingArguments) -> None:
        asked, placement = find_requested_placement(args), find_placement(self.trainer.model_wrapped)
        if placement != asked.removesuffix(" + CPU offload"):
            self.gates.trip(
                f"the model was to be placed by {asked} over {args.world_size} processes, but it is by {placement}",
                expected=asked,
                do="look at the launcher's --config_file; accelerate_configs/ has a tested one for each placement",
            )
        has_adapter = isinstance(self.trainer.model, PeftModel)
        if has_adapter != self.with_adapter:
            self.gates.trip(
                "an adapter was asked for (--use_peft), but the model has none"
                if self.with_adapter
                else "the model is trained through an adapter, which was not asked for",
                expected="what --use_peft says",
                do="--use_peft true for an adapter, --use_peft false with a model that has none",
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step + 1 != self.first_step or args.torch_compile:
            return
        # Hooks, as a parameter sharded by DeepSpeed has no .grad to look at.
        model = self.trainer.model
        self._hooks = [model.register_forward_hook(self._check_output)]
        for name, weight in find_adapter(model).items():
            self._hooks.append(weight.register_hook(lambda _, name=name: self._reached.add(name)))

    def _check_output(self, model: nn.Module, _: Any, output: Any) -> None:
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
            self._trip_gradient(f"what it adds here takes no part in the loss: {list_places(dead)}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 1:
            control.should_log = True  # the first step is judged by its log
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
        if not logs or "loss" not in logs:  # an evaluation, or a run's end
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

    def _trip_finite(self, seen: str, step: int) -> None:
        self.gates.trip(
            seen,
            expected="a finite loss; no weights of this step were saved",
            do="look at the model's weights, and load it with --dtype float32 or bfloat16, not float16"
            if step <= 1
            else "lower --learning_rate, set --max_grad_norm 1, or train in bf16 instead of fp16",
        )

    def _check_gradient(self, args: TrainingArguments, step: int, norm: float | None) -> None:
        if norm is None or (args.fp16 and not 0 < norm < math.inf and step < self.first_step + FP16_SETTLES_STEPS):
            return
        self.gradient_due = False
        # Of a resumed run no pair may be left to learn from: a hinge's gradient is 0 beyond its margin.
        if norm == 0 and self.first_step == 1:
            self._trip_gradient("the norm of its gradient is 0")
        elif not math.isfinite(norm):
            self._trip_finite(f"the gradient is not finite at step {step}", step)

    def _trip_gradient(self, why: str) -> None:
        is_adapter = isinstance(self.trainer.model, PeftModel)
        self.gates.trip(
            f"the {'adapter' if is_adapter else 'model'} receives no gradient: {why}",
            expected="a gradient for all that is trained",
            do="choose other --lora_target_modules (the LM head is scored by its base weight: no adapter works there), "
            "or load the adapter as trainable"
            if is_adapter
            else "train a model whose weights require gradients, or add --use_peft",
        )

    def _check_start(self, args: DPOConfig, logs: dict[str, Any]) -> None:
        """Before the first update policy and reference are one model: no reward, and a loss of ln 2."""
        if not (math.isfinite(logs["loss"]) and is_start_certain(self.trainer.model, args)):
            return
        exact = self.trainer.accelerator.mixed_precision == "no" and not args.tf32
        exact = exact and all(weight.dtype == torch.float32 for weight in self.trainer.model.parameters())
        tolerance = TOLERANCE_FP32 if exact else TOLERANCE_16_BIT
        apart = {side: logs[f"rewards/{side}"] / args.beta for side in ("chosen", "rejected")}
        room = {side: tolerance * max(1.0, abs(logs[f"logps/{side}"])) for side in apart}
        same = all(abs(apart[side]) <= room[side] for side in apart)
        # WPO's weights and a mixture's balancing loss come on top of ln 2.
        known = set(args.loss_type) <= LN_2_LOSSES and not args.use_weighting and "aux_loss" not in logs
        each = args.loss_weights or [1.0] * len(args.loss_type)
        weights, scale = sum(each), sum(map(abs, each))
        at_ln_2 = abs(logs["loss"] - weights * LN_2) <= scale * (args.beta * sum(room.values()) / 2 + 1e-3)
        if same and (at_ln_2 or not known):
            return
        why = "its scale is wrong" if same else "policy and reference are not the same model at the start"
        ln_2 = f"{'' if weights == 1 else f'{weights:g} * '}ln 2 = {weights * LN_2:.4f}"
        first = f"the first loss is {logs['loss']:.4f}, not {ln_2}" if known else "the first rewards are not 0"
        self.gates.trip(
            f"{first}: {why} (log-probs {apart['chosen']:+.3g} for chosen, {apart['rejected']:+.3g} for rejected)",
            expected="a reference with the policy's own weights, as nothing was trained yet",
            do="give the model that is to be improved as --model_name_or_path; with --precompute_ref_log_probs, delete "
            "those that were kept (DPOKIT_CACHE, else ~/.cache/dpokit)",
        )


def find_adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters that every step must reach; none without an adapter.

    The experts of a mixture are left out: a step may well send no token to one of them.
    """
    if not isinstance(model, PeftModel):
        return {}
    return {n: weight for n, weight in model.named_parameters() if weight.requires_grad and "expert" not in n}


def find_dead_modules(reached: dict[str, bool]) -> list[str]:
    """Adapted modules, layer numbers as stars, that no gradient reaches in any layer but reaches beside them.

    Not counted is what single layers leave out (those that share keys), and what a whole tower leaves out (vision where
    the pairs are text): the rest of the adapter is trained as it should be.

    Args:
        reached: for each parameter of the adapter, by its name, whether it got a gradient.
    """
    modules = {name: star_layers(re.sub(r"\.(lora_|modules_to_save).*", "", name)) for name in reached}
    alive = {modules[name] for name in reached if reached[name]}
    dead = [module for module in dict.fromkeys(modules.values()) if module not in alive]
    layers = {m: m[: m.rindex("*") + 1] if "*" in m else m.rpartition(".")[0] for m in dead}
    return [m for m in dead if not alive or any(other.startswith(f"{layers[m]}.") for other in alive)]


def is_start_certain(model: nn.Module, args: DPOConfig) -> bool:
    """Whether policy and reference must agree before the first update: no chance, no adapter that starts elsewhere."""
    if args.neftune_noise_alpha or find_dropout(model):
        return False
    if isinstance(model, PeftModel) and "ref" not in model.peft_config:  # else TRL keeps a copy of the adapter's start
        start = getattr(model.peft_config[model.active_adapter], "init_lora_weights", None)
        return start is True or start == "gaussian"
    return True
