"""Callbacks of the trainer: metrics.jsonl, run.json, the progress bar, the table of evaluations, resume and signals."""

import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpokit.checkpoint.preempt import EvaluationCut, Notice
from dpokit.console import is_progress_hidden, say, track_progress
from dpokit.interrupts import Preempted
from dpokit.metrics import list_screen_columns
from dpokit.rundir import MetricsFile, RunDir
from dpokit.train.steps import StepTrainer


class EpochCallback(TrainerCallback):
    """Gives each epoch its own order of pairs, and notes its end."""

    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.begin_epoch(int(state.epoch or 0))

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.end_epoch()


class PlacementCallback(TrainerCallback):
    """Writes to run.json the placement of the prepared model, the number of steps, and whether prompts are shared."""

    def __init__(self, trainer: StepTrainer, run: RunDir) -> None:
        self.is_recorded = False
        self.trainer = trainer
        self.run = run

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.write_run(placement=self.trainer.placement, steps=state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and not self.is_recorded:
            self.is_recorded = True
            self.run.write_run(shared_prefix=self.trainer.shared_prefix)


class ResumeCallback(TrainerCallback):
    """Restores the counts of a checkpoint, once everything is loaded."""

    def __init__(self, trainer: StepTrainer, checkpoint: Path | None) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.checkpoint is not None:
            self.trainer.restore_progress(self.checkpoint)


class PreemptCallback(TrainerCallback):
    """Makes all ranks save and end if any rank has received a signal. Checks after each step and evaluation batch.

    Collective.

    Attributes:
        why: the signal and its rank; None without a signal.

    Raises: Preempted on every rank, once the checkpoint is complete.
    """

    def __init__(self, trainer: StepTrainer, notice: Notice) -> None:
        self.trainer = trainer
        self.notice = notice
        self.why: str | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.notice.is_training = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.raise_write_error()
        if self.trainer.is_finished() and not control.should_evaluate:
            return  # the run ends anyway
        if not self._must_end(state):
            return
        # An evaluation could take longer than the grace period, so the start that resumes the run does it first.
        if control.should_evaluate:
            self.trainer.put_off_evaluation()
        control.should_evaluate = False
        control.should_save = True

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._must_end(state):
            raise EvaluationCut(str(self.why))

    def _must_end(self, state: TrainerState) -> bool:
        """Whether any rank has received a signal since the last check. Collective."""
        if self.why is not None or not self.trainer.is_true_on_any_rank(self.notice.is_given()):
            return False
        self.why = next(why for why in gather_object([self.notice.why]) if why is not None)
        say(f"{self.why}: saving step {state.global_step} and ending; the same command goes on from there")
        return True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.why is not None:
            self.trainer.wait_for_checkpoint()
            self.trainer.accelerator.wait_for_everyone()
            raise Preempted(self.why)


class MetricsCallback(TrainerCallback):
    """Writes every log to metrics.jsonl on rank 0."""

    def __init__(self, trainer: StepTrainer, run: RunDir) -> None:
        self.trainer = trainer
        self.run = run
        self.file: MetricsFile | None = None
        self.began = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.file = MetricsFile(self.run, after_step=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.file is not None and logs:
            self.file.log(state.global_step, time.monotonic() - self.began, logs)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.file is not None:
            stall = {"save_stall_seconds": round(self.trainer.stall_seconds, 3)}
            self.file.log(state.global_step, time.monotonic() - self.began, stall)


class ScreenCallback(TrainerCallback):
    """Shows the progress of steps and evaluations, and a line of results per evaluation, on rank 0.

    If progress bars are hidden (`--disable_tqdm`), each log is a line.
    """

    def __init__(self) -> None:
        self.steps: Any = None
        self.evaluation: Any = None
        self.loss = float("nan")
        self.header_shown = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.steps = track_progress(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.steps is not None:
            self.steps.update(state.global_step - self.steps.n)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.evaluation is None:
            self.evaluation = track_progress(total=len(eval_dataloader), desc="evaluating", unit="batch", leave=False)
        self.evaluation.update(1)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.steps is None or not logs:
            return
        if "loss" in logs:
            self.loss = logs["loss"]
            shown = {"loss": f"{self.loss:.4f}"}
            if "rewards/accuracies" in logs:
                shown["accuracy"] = f"{logs['rewards/accuracies']:.2f}"
            self.steps.set_postfix(shown)
            if is_progress_hidden():
                text = ", ".join(f"{name} {value}" for name, value in shown.items())
                say(f"training: step {state.global_step:,} of {state.max_steps:,}, {text}")
        if "eval_loss" in logs:
            columns = list_screen_columns("dpo" if "eval_rewards/margins" in logs else "sft")
            if not self.header_shown:
                titles = ["step", "train loss", *columns.values()]
                say("".join(f"{title:>14}" for title in titles))
                self.header_shown = True
            values = [self.loss, *(logs[name] for name in columns)]
            line = f"{state.global_step:>14}" + "".join(f"{value:>14.4f}" for value in values)
            say(line)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.steps is not None:
            self.steps.close()
            self.steps = None
