"""What a rank knows beside the weights: how far it is, and what is not logged yet. Touches the trainer's inside."""

import time
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from dpokit.train.metric_sums import Sums


class ProgressTrainer(Trainer):
    """A trainer whose logs can go on where a checkpoint was saved. Stands before one of TRL's, and leans on its names.

    Attributes:
        evaluation_due: an evaluation of this step was put off, as the machine is wanted back.
        epoch_ended: the end of an epoch was reached, and what is logged and evaluated there is done or being done.
    """

    _total_train_tokens: float  # TRL's count of tokens seen, of this rank

    def __init__(self, **arguments: Any) -> None:
        self.evaluation_due = self.epoch_ended = False
        self._last_update: dict[str, Any] = {}  # what a log at the end of the epoch still says of the last step
        self._sums = {"train": Sums(), "eval": Sums()}
        self._working_since: float | None = None  # when the training steps since the last log began
        super().__init__(**arguments)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *arguments: Any, learning_rate: float | None = None
    ) -> None:
        norm = grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm
        self._last_update = {"grad_norm": norm, "learning_rate": learning_rate}
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *arguments, learning_rate=learning_rate)

    def _read_progress(self) -> dict[str, Any]:
        """What this rank knows beside the weights: its part of the numbers that are not logged yet."""
        since, args = self._working_since, self.args
        ahead = not self.epoch_ended and (self.is_finished() or float(self.state.epoch or 0).is_integer())
        evaluated = args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= (self.state.epoch or 0)
        return {
            "loss": self._tr_loss.item(),
            "logged_step": self._globalstep_last_logged,
            "logged_loss": self._total_loss_scalar,
            "first_step": self._initial_global_step,
            "tokens": self._total_train_tokens,
            "sums": self._sums["train"].record(),
            "working_seconds": None if since is None else time.monotonic() - since,
            "last_update": self._last_update,
            "log_due": ahead and args.logging_strategy == IntervalStrategy.EPOCH,
            "evaluation_due": self.evaluation_due or (ahead and evaluated),
        }

    def is_finished(self) -> bool:
        return self.state.global_step >= self.state.max_steps
