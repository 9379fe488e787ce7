"""What happens beside the steps: metrics.jsonl, the progress bar, the table of evaluations."""

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpokit.placement import find_placement
from dpokit.rundir import MetricsFile, RunDir
from dpokit.train.trainer import PairTrainer

EVAL_COLUMNS = {
    "eval_loss": "eval loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/margins": "margin",
    "eval_logps/chosen": "logps chosen",
}


class EpochCallback(TrainerCallback):
    """Gives each epoch its own order of pairs."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.set_batches_epoch(int(state.epoch or 0))


class PlacementCallback(TrainerCallback):
    """Writes to run.json where the prepared model lives, and whether prompts are shared."""

    def __init__(self, trainer: PairTrainer, run: RunDir) -> None:
        self.told = False
        self.trainer = trainer
        self.run = run

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.write_run(placement=find_placement(self.trainer.model_wrapped))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and not self.told:
            self.told = True
            self.run.write_run(shared_prefix=self.trainer.shared_prefix)


class MetricsCallback(TrainerCallback):
    """Writes every log to metrics.jsonl, on rank 0."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.file: MetricsFile | None = None
        self.began = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.file = MetricsFile(self.run.metrics_jsonl, after_step=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.file is not None and logs:
            self.file.log(state.global_step, time.monotonic() - self.began, logs)


class ScreenCallback(TrainerCallback):
    """One bar for the steps, one for a running evaluation, and a line of results per evaluation; rank 0."""

    def __init__(self) -> None:
        self.steps: Any = None
        self.evaluation: Any = None
        self.loss = float("nan")
        self.header_shown = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.steps = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.steps is not None:
            self.steps.update(state.global_step - self.steps.n)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.evaluation is None:
            self.evaluation = tqdm(total=len(eval_dataloader), desc="evaluating", unit="batch", leave=False)
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
        if "eval_loss" in logs:
            if not self.header_shown:
                titles = ["step", "train loss", *EVAL_COLUMNS.values()]
                self.steps.write("".join(f"{title:>14}" for title in titles), file=self.steps.fp)
                self.header_shown = True
            values = [self.loss, *(logs[name] for name in EVAL_COLUMNS)]
            line = f"{state.global_step:>14}" + "".join(f"{value:>14.4f}" for value in values)
            self.steps.write(line, file=self.steps.fp)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.steps is not None:
            self.steps.close()
            self.steps = None
