"""Alarms: warnings when an evaluation shows that training makes the model worse. Unlike gates, they stop nothing."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig

from dpokit.console import say
from dpokit.data.rendering import Renderer
from dpokit.model.generate import count_answers, generate_answers
from dpokit.model.score import take_first_turn
from dpokit.rundir import RunDir
from dpokit.train.steps import StepTrainer
from dpokit.untrained_loss import find_untrained_loss

ANSWER_TOKENS = 48  # of a sampled answer, at temperature 1
# Thresholds. "Base" is the model before the first step.
MORE_REPETITION = 0.25  # the share of repeated 4-grams exceeds the base's by more than this
VANISHED = 0.1  # answers are shorter than this share of the base's length
ENDED = 0.5  # the share of answers that end is judged only if at least this share of the base's did
ENDLESS = 0.25  # the share of answers that end is below this share of the base's
PAST_BEST = 0.2  # the eval loss exceeds its lowest value by this share
COLLAPSE = 0.5  # the log-probs of chosen answers have fallen by this share of the base's


class AlarmCallback(TrainerCallback):
    """Prints each kind of alarm once, with the step of the lowest eval loss; run.json records them (`alarms`).

    Args:
        trainer: the trainer; its model answers a few held-out prompts before the first step and at each evaluation.
        run: the run folder; run.json records the counts of the first answers (`answers_of_base`).
        answers: number of prompts; 0 for none.
    """

    def __init__(self, trainer: StepTrainer, run: RunDir, *, answers: int) -> None:
        self.trainer = trainer
        self.run = run
        self.answers = answers
        self.prompts: list[list[int]] = []
        self.ends: tuple[int, ...] = ()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        held_out = self.trainer.eval_dataset
        # If the weights are sharded, all ranks answer the same prompts, as each needs the shards of the others.
        is_sharded = self.trainer.placement.startswith(("ZeRO-3", "FSDP"))
        if isinstance(held_out, Dataset) and (is_sharded or state.is_world_process_zero):
            answered = (row["prompt_ids"] for row in held_out if take_first_turn(row))
            self.prompts = list(islice(answered, self.answers))
            self.ends = Renderer(self.trainer.processing_class).ends if self.prompts else ()
        if state.global_step == 0 and self.prompts and args.eval_strategy != "no":
            counted = self._count()
            if state.is_world_process_zero:
                self.run.write_run(answers_of_base=counted)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        now = self._count() if self.prompts else None
        if not state.is_world_process_zero or not metrics:
            return
        record = self.run.read_run() or {}
        recorded: list[dict[str, Any]] = record.get("alarms", [])
        history = [*state.log_history, {"step": state.global_step, **metrics}]
        best = find_lowest_loss(history)
        alarms = find_alarms(metrics, args, best=best)
        base = record.get("answers_of_base")
        if base and now:
            alarms |= find_answer_alarms(base, now)
        when = "" if best is None else f" It was best at step {best[1]} (eval loss {best[0]:.3f})."
        for kind in alarms.keys() - {alarm["kind"] for alarm in recorded}:
            text = alarms[kind] + when
            say(f"\nALARM at step {state.global_step}: {text}")
            recorded.append({"kind": kind, "step": state.global_step, "text": text})
            self.run.write_run(alarms=recorded)

    def _count(self) -> dict[str, float] | None:
        """Counts of sampled answers; None if logits are not finite, which a gate reports. Collective if sharded."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        room = int(min(positions - max(map(len, self.prompts)), ANSWER_TOKENS))
        size: dict[str, Any] = {"max_new_tokens": max(room, 1), "batch_size": len(self.prompts), "ends": self.ends}
        try:
            return count_answers(generate_answers(model, self.trainer.processing_class, self.prompts, **size))
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            return None


def find_alarms(
    metrics: Mapping[str, float], args: TrainingArguments, *, best: tuple[float, int] | None = None
) -> dict[str, str]:
    """Alarms of one evaluation, by kind: `worse_than_base`, `past_its_best`, `chosen_collapse`.

    Args:
        metrics: `eval_loss` and TRL's other metrics of the evaluation.
        args: the trainer's arguments, with the loss and beta.
        best: the lowest eval loss so far and its step.
    """
    alarms = {}
    loss = metrics["eval_loss"]
    base_loss = None
    if isinstance(args, DPOConfig):
        base_loss = find_untrained_loss(args.loss_type, args.loss_weights, use_weighting=args.use_weighting)
    if base_loss is not None and "eval_aux_loss" not in metrics and math.isfinite(loss) and loss > base_loss:
        alarms["worse_than_base"] = (
            f"eval loss {loss:.3f} is above {base_loss:.3f}, the loss of the untrained base: training has made the "
            f"model worse on held-out pairs, at a reward accuracy of {metrics['eval_rewards/accuracies']:.0%}. Fewer "
            "epochs, a lower --learning_rate or more pairs help."
        )
    elif best is not None and math.isfinite(loss) and loss - best[0] > PAST_BEST * abs(best[0]):
        alarms["past_its_best"] = (
            f"eval loss {loss:.3f} has risen far above its lowest value: the model overfits. Fewer epochs, a lower "
            "--learning_rate or more pairs help."
        )
    if not isinstance(args, DPOConfig):  # supervised training has no reference
        return alarms
    gained = metrics["eval_rewards/chosen"] / args.beta
    base = metrics["eval_logps/chosen"] - gained
    if math.isfinite(gained) and gained < -COLLAPSE * abs(base):
        alarms["chosen_collapse"] = (
            f"the log-prob of chosen answers has fallen by {-gained:.0f} on average (the base gives {base:.0f}): the "
            "model may no longer write either answer. A higher --beta, a lower --learning_rate or an SFT term "
            "(--loss_type sigmoid sft) helps."
        )
    return alarms


def find_answer_alarms(base: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    """Alarms of sampled answers, by kind: `answers_repeat`, `answers_vanish`, `answers_endless`.

    Args:
        base: the counts before the first step, by `count_answers`.
        now: the counts of this evaluation.
    """
    alarms = {}
    if now["repetition"] > base["repetition"] + MORE_REPETITION:
        alarms["answers_repeat"] = (
            f"{now['repetition']:.0%} of the 4-grams in sampled answers are repetitions, {base['repetition']:.0%} at "
            "the start: the model repeats itself. A higher --beta or a lower --learning_rate helps."
        )
    if now["mean_tokens"] < VANISHED * base["mean_tokens"]:
        alarms["answers_vanish"] = (
            f"sampled answers have {now['mean_tokens']:.0f} tokens, {base['mean_tokens']:.0f} at the start: the model "
            "has learnt very short answers. Look at the lengths of the chosen answers, and raise --beta."
        )
    if base["ended"] >= ENDED and now["ended"] < ENDLESS * base["ended"]:
        alarms["answers_endless"] = (
            f"{now['ended']:.0%} of sampled answers end within {ANSWER_TOKENS} tokens, {base['ended']:.0%} at the "
            "start: the model may no longer end its answers. Look at its answers and at the lengths of the chosen "
            "ones, and raise --beta."
        )
    return alarms


def find_lowest_loss(history: Sequence[Mapping[str, float]]) -> tuple[float, int] | None:
    """The lowest eval loss so far and its step; None if no loss was finite."""
    losses = [(record["eval_loss"], int(record["step"])) for record in history if "eval_loss" in record]
    return min((pair for pair in losses if math.isfinite(pair[0])), default=None)
