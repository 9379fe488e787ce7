"""Evaluations in plain words, when they say that training makes the model worse. Nothing is stopped: gates do that."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig

from dpokit.console import say
from dpokit.distributed.placement import find_placement
from dpokit.model.generate import count_answers, generate_answers
from dpokit.rundir import RunDir
from dpokit.train.steps import StepTrainer
from dpokit.untrained_loss import find_untrained_loss

ANSWER_TOKENS = 48  # of a sampled answer, at temperature 1
MORE_REPETITION = 0.25  # the share of repeated 4-grams that is too many above the base's
VANISHED = 0.1  # of the base's length
ENDED = 0.5  # the share of the base's answers that must have ended, for a fall of it to say anything
ENDLESS = 0.25  # of the base's share
PAST_BEST = 0.2  # the share by which the eval loss has risen above its best
COLLAPSE = 0.5  # the chosen answers' log-probs have fallen by this share of what the base gives them


class AlarmCallback(TrainerCallback):
    """Says once a kind what an evaluation shows, with the step at which it was best; run.json keeps it (`alarms`).

    Args:
        trainer: whose model answers a few held-out prompts before the first step and at each evaluation.
        run: its folder; run.json keeps what was counted in the first answers (`answers_of_base`).
        answers: how many prompts; 0 for none.
    """

    def __init__(self, trainer: StepTrainer, run: RunDir, *, answers: int) -> None:
        self.trainer = trainer
        self.run = run
        self.answers = answers
        self.prompts: list[list[int]] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        held_out = self.trainer.eval_dataset
        # Where each process holds a part of the weights all of them answer, and the same: each needs the others' part.
        shared = find_placement(self.trainer.model_wrapped).startswith(("ZeRO-3", "FSDP"))
        if isinstance(held_out, Dataset) and (shared or state.is_world_process_zero):
            self.prompts = held_out[: self.answers]["prompt_ids"]
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
        told: list[dict[str, Any]] = record.get("alarms", [])
        history = [*state.log_history, {"step": state.global_step, **metrics}]
        best = find_best(history)
        found = find_alarms(metrics, args, best=best)
        base = record.get("answers_of_base")
        if base and now:
            found |= find_answer_alarms(base, now)
        when = "" if best is None else f" It was best at step {best[1]} (eval loss {best[0]:.3f})."
        for kind in found.keys() - {alarm["kind"] for alarm in told}:
            text = found[kind] + when
            say(f"\nALARM at step {state.global_step}: {text}")
            told.append({"kind": kind, "step": state.global_step, "text": text})
            self.run.write_run(alarms=told)

    def _count(self) -> dict[str, float] | None:
        """None where nothing can be sampled, as the numbers are not finite: gates speak of that. May be collective."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        room = int(min(positions - max(map(len, self.prompts)), ANSWER_TOKENS))
        size = {"max_new_tokens": max(room, 1), "batch_size": len(self.prompts)}
        try:
            return count_answers(generate_answers(model, self.trainer.processing_class, self.prompts, **size))
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            return None


def find_alarms(
    metrics: Mapping[str, float], args: TrainingArguments, *, best: tuple[float, int] | None = None
) -> dict[str, str]:
    """What one evaluation shows, by kind: `worse_than_base`, `past_its_best`, `chosen_collapse`.

    Args:
        metrics: of an evaluation: `eval_loss` and TRL's others.
        args: for the loss and its beta.
        best: the lowest eval loss so far and its step.
    """
    alarms = {}
    loss = metrics["eval_loss"]
    of_base = None
    if isinstance(args, DPOConfig):
        of_base = find_untrained_loss(args.loss_type, args.loss_weights, use_weighting=args.use_weighting)
    if of_base is not None and "eval_aux_loss" not in metrics and math.isfinite(loss) and loss > of_base:
        alarms["worse_than_base"] = (
            f"eval loss {loss:.3f} is above {of_base:.3f}, that of the untouched base: on held-out pairs training has "
            f"made the model worse, at a reward accuracy of {metrics['eval_rewards/accuracies']:.0%}. Fewer epochs, a "
            "lower --learning_rate or more pairs help."
        )
    elif best is not None and math.isfinite(loss) and loss - best[0] > PAST_BEST * abs(best[0]):
        alarms["past_its_best"] = (
            f"eval loss {loss:.3f} has risen far above its best: what the model learns now, it learns by heart. Fewer "
            "epochs, a lower --learning_rate or more pairs help."
        )
    if not isinstance(args, DPOConfig):  # supervised training has no reference to lose against
        return alarms
    gained = metrics["eval_rewards/chosen"] / args.beta
    base = metrics["eval_logps/chosen"] - gained
    if math.isfinite(gained) and gained < -COLLAPSE * abs(base):
        alarms["chosen_collapse"] = (
            f"chosen answers have lost {-gained:.0f} of log-prob each (the base gives them {base:.0f}): the model may "
            "write neither answer any more. A higher --beta, a lower --learning_rate or an SFT term "
            "(--loss_type sigmoid sft) helps."
        )
    return alarms


def find_answer_alarms(base: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    """`answers_repeat`, `answers_vanish`, `answers_endless`: sampled answers beside those before the first step.

    Args:
        base, now: of `count_answers`.
    """
    alarms = {}
    if now["repetition"] > base["repetition"] + MORE_REPETITION:
        alarms["answers_repeat"] = (
            f"{now['repetition']:.0%} of the 4-grams in sampled answers were said before, {base['repetition']:.0%} at "
            "the start: the model goes round in circles. A higher --beta or a lower --learning_rate helps."
        )
    if now["mean_tokens"] < VANISHED * base["mean_tokens"]:
        alarms["answers_vanish"] = (
            f"sampled answers have {now['mean_tokens']:.0f} tokens, {base['mean_tokens']:.0f} at the start: the model "
            "has learnt to say next to nothing. Look at the lengths of the chosen answers, and raise --beta."
        )
    if base["ended"] >= ENDED and now["ended"] < ENDLESS * base["ended"]:
        alarms["answers_endless"] = (
            f"{now['ended']:.0%} of sampled answers end within {ANSWER_TOKENS} tokens, {base['ended']:.0%} at the "
            "start: the model may no longer know when to stop. Look at what it writes and at the lengths of the chosen "
            "answers, and raise --beta."
        )
    return alarms


def find_best(history: Sequence[Mapping[str, float]]) -> tuple[float, int] | None:
    """The lowest eval loss so far and its step; None where none was finite."""
    seen = [(record["eval_loss"], int(record["step"])) for record in history if "eval_loss" in record]
    return min((pair for pair in seen if math.isfinite(pair[0])), default=None)
