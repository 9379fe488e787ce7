"""Going on from a checkpoint as if the run had never stopped: counts, precision, the evaluation that was put off.

transformers loads weights, optimizer, schedule and random states. Touches the trainer's
inner workings.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpokit.checkpoint.preempt import EvaluationCut
from dpokit.checkpoint.store import check_checkpoint
from dpokit.console import say
from dpokit.distributed.coordination import decide_on_main_process
from dpokit.rundir import read_record
from dpokit.train.saving import REFERENCE, SavingTrainer


class ResumingTrainer(SavingTrainer):
    """A trainer that goes on where a checkpoint's ranks were."""

    def load_universal(self) -> None:
        """Tells DeepSpeed, ahead of its engine, that the checkpoint to load is a universal one."""
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}

    def _part_steps(self) -> None:
        """Gives each part of the optimizer its own step counter.

        ZeRO-3 loads one tensor of a universal checkpoint as the counter of all its sub-groups, so that each update
        would count once for each of them and the bias correction run ahead (DeepSpeed 0.19.8, runtime/zero/stage3.py,
        `load_hp_checkpoint_state_from_checkpoint_dir_stage3`). Delete when it copies.
        """
        inner = getattr(self.model_wrapped.optimizer, "optimizer", None)
        for state in inner.state.values() if inner is not None else ():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def restore_progress(self, checkpoint: Path) -> None:
        """Goes on counting where the checkpoint's ranks were; another number of ranks shares what they knew."""
        files = sorted(checkpoint.glob("progress_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
        known = [read_record(path) for path in files]
        if self.is_deepspeed_enabled:  # the checkpoints of this start are no universal ones
            self.model_wrapped._config.load_universal_checkpoint = False
            self._part_steps()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if ranks == len(known):
            mine = known[rank]
            loss, tokens, sums = mine["loss"], mine["tokens"], [mine["sums"]]
        else:
            loss = sum(each["loss"] for each in known) / len(known)
            tokens = sum(each["tokens"] for each in known) if rank == 0 else 0.0
            sums = [each["sums"] for each in known]
        self._tr_loss = torch.tensor(loss, device=self.args.device)
        self._globalstep_last_logged = known[0]["logged_step"]
        self._total_loss_scalar = known[0]["logged_loss"]
        self._initial_global_step = known[0]["first_step"]
        self._total_train_tokens = tokens
        for record in sums:
            self._sums["train"].restore(record, counts=ranks == len(known) or rank == 0)
        if known[0]["working_seconds"] is not None:
            self._working_since = time.monotonic() - known[0]["working_seconds"]
        if (checkpoint / REFERENCE).exists():
            self.ref_model.load_state_dict(torch.load(checkpoint / REFERENCE, weights_only=True))
        if self.state.best_global_step:  # by its name in this folder: it may have been moved, or made by others
            best = checkpoint.parent / f"checkpoint-{int(self.state.best_global_step)}"
            self.state.best_model_checkpoint = str(best)
        if known[0]["log_due"]:
            self.control.should_log = True
            self.model.train()  # whose numbers these are
            last = known[0]["last_update"]
            rest = (self.model, None, self.state.epoch, None, time.time())
            self._maybe_log_save_evaluate(self._tr_loss, last["grad_norm"], *rest, learning_rate=last["learning_rate"])
        if known[0]["evaluation_due"]:
            metrics = super()._evaluate(None, None)  # cut off again, the run ends: its step is saved
            if self._determine_best_metric(metrics=metrics, trial=None):
                self.state.best_model_checkpoint = str(checkpoint)

    def _evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """transformers' own; cut off, it is left to the next start, and its step saved.

        The random numbers that its loader draws are none of training's, whenever it is done.
        """
        with torch.random.fork_rng(devices=[]):
            try:
                return super()._evaluate(*arguments, **named)
            except EvaluationCut:
                self.evaluation_due = self.control.should_save = True
                return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """transformers' own; without metrics, where it decides whether to save: yes."""
        return not metrics or super()._determine_best_metric(metrics, trial)

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """transformers' own; of a run whose last step is saved it would train one step more."""
        if self.is_finished():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **named)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._precision_kept():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @contextmanager
    def _precision_kept(self) -> Iterator[None]:
        """PEFT loads an adapter in fp32, also where TRL trains it in bf16 (QLoRA): a resumed run would train another.

        Delete when transformers passes `autocast_adapter_dtype` on.
        """
        before = {name: weight.dtype for name, weight in self.model.named_parameters() if weight.requires_grad}
        yield
        for name, weight in self.model.named_parameters():
            if name in before and weight.dtype != before[name]:
                weight.data = weight.data.to(before[name])

    def _load_best_model(self) -> None:
        """transformers' own, of a checkpoint that verifies."""
        self.wait_for_checkpoint()
        path = Path(str(self.state.best_model_checkpoint))
        best = decide_on_main_process(lambda: check_checkpoint(path, deep=True))
        if best.problem is not None:
            say(f"the best checkpoint, {best.path}, cannot be used: {best.problem}; the last weights are kept")
            self.state.best_metric = None
            return
        with self._precision_kept():
            super()._load_best_model()
