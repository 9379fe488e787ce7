"""Resumes from a checkpoint as if the run had never stopped: counts, precision, the evaluation that was put off.

transformers loads weights, optimizer, schedule and random states. Overrides private methods of its trainer.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpokit.atomic_files import read_record
from dpokit.checkpoint.preempt import EvaluationCut
from dpokit.checkpoint.store import check_checkpoint
from dpokit.console import say
from dpokit.distributed.coordination import decide_on_main_process
from dpokit.train.saving import REFERENCE, SavingTrainer


class ResumingTrainer(SavingTrainer):
    """A trainer that restores the progress of a checkpoint's ranks."""

    def load_universal(self) -> None:
        """Makes DeepSpeed load a universal checkpoint; called before its engine is built."""
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}

    def _separate_step_counters(self) -> None:
        """Gives each part of the optimizer its own step counter.

        ZeRO-3 loads one tensor of a universal checkpoint as the counter of all its sub-groups, so each update would
        count once per sub-group, and the bias correction would run ahead (DeepSpeed 0.19.8, runtime/zero/stage3.py,
        `load_hp_checkpoint_state_from_checkpoint_dir_stage3`). Delete when DeepSpeed copies the tensor.
        """
        inner = getattr(self.model_wrapped.optimizer, "optimizer", None)
        for state in inner.state.values() if inner is not None else ():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def restore_progress(self, checkpoint: Path) -> None:
        """Restores the counts of the checkpoint's ranks; with another number of ranks, their sums and means."""
        files = sorted(checkpoint.glob("progress_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
        saved = [read_record(path) for path in files]
        if self.is_deepspeed_enabled:  # this start writes ordinary checkpoints
            self.model_wrapped._config.load_universal_checkpoint = False
            self._separate_step_counters()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if ranks == len(saved):
            own_record = saved[rank]
            loss, tokens, sums = own_record["loss"], own_record["tokens"], [own_record["sums"]]
        else:
            loss = sum(each["loss"] for each in saved) / len(saved)
            tokens = sum(each["tokens"] for each in saved) if rank == 0 else 0.0
            sums = [each["sums"] for each in saved]
        self._tr_loss = torch.tensor(loss, device=self.args.device)
        self._globalstep_last_logged = saved[0]["logged_step"]
        self._total_loss_scalar = saved[0]["logged_loss"]
        self._initial_global_step = saved[0]["first_step"]
        self._total_train_tokens = tokens
        for record in sums:
            self._sums["train"].restore(record, counts=ranks == len(saved) or rank == 0)
        if saved[0]["working_seconds"] is not None:
            self._working_since = time.monotonic() - saved[0]["working_seconds"]
        if (checkpoint / REFERENCE).exists():
            self.ref_model.load_state_dict(torch.load(checkpoint / REFERENCE, weights_only=True))
        if self.state.best_global_step:  # the folder may have been moved since
            best = checkpoint.parent / f"checkpoint-{int(self.state.best_global_step)}"
            self.state.best_model_checkpoint = str(best)
        if saved[0]["log_due"]:
            self.control.should_log = True
            self.model.train()  # `log` chooses the metrics by the mode of the model
            last = saved[0]["last_update"]
            others = (self.model, None, self.state.epoch, None, time.time())
            self._maybe_log_save_evaluate(
                self._tr_loss, last["grad_norm"], *others, learning_rate=last["learning_rate"]
            )
        if saved[0]["evaluation_due"]:
            metrics = super()._evaluate(None, None)  # may be cut off again: this step is saved
            if self._determine_best_metric(metrics=metrics, trial=None):
                self.state.best_model_checkpoint = str(checkpoint)

    def _evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Calls transformers' method; a signal that cuts it off saves the step, and the next start evaluates.

        Its loader draws random numbers; the fork keeps those of training independent of when an evaluation runs.
        """
        with torch.random.fork_rng(devices=[]):
            try:
                return super()._evaluate(*arguments, **named)
            except EvaluationCut:
                self.evaluation_due = self.control.should_save = True
                return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Calls transformers' method; True without metrics, so that an evaluation that was cut off is saved."""
        return not metrics or super()._determine_best_metric(metrics, trial)

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """Calls transformers' method, unless the last step is already saved: it would train one more."""
        if self.is_finished():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **named)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._keep_precision():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @contextmanager
    def _keep_precision(self) -> Iterator[None]:
        """Keeps the dtypes of the trained weights while an adapter is loaded.

        PEFT loads an adapter in fp32 even if TRL trains it in bf16 (QLoRA), so a resumed run would differ from an
        uninterrupted one. Delete when transformers passes `autocast_adapter_dtype` on.
        """
        before = {name: weight.dtype for name, weight in self.model.named_parameters() if weight.requires_grad}
        yield
        for name, weight in self.model.named_parameters():
            if name in before and weight.dtype != before[name]:
                weight.data = weight.data.to(before[name])

    def _load_best_model(self) -> None:
        """Calls transformers' method if the best checkpoint verifies; else keeps the last weights."""
        self.wait_for_checkpoint()
        path = Path(str(self.state.best_model_checkpoint))
        best = decide_on_main_process(lambda: check_checkpoint(path, deep=True))
        if best.problem is not None:
            say(f"the best checkpoint, {best.path}, cannot be used: {best.problem}; the last weights are kept")
            self.state.best_metric = None
            return
        with self._keep_precision():
            super()._load_best_model()
