"""TRL's DPOTrainer, with exact steps and exact metrics. With scoring.py, what touches TRL's inner workings.

Losses, PEFT and mixed precision are TRL's, untouched. Three things differ, beside what scoring.py does:

- pairs arrive tokenised, so TRL's own preparation is passed over;
- a step's loss is the mean over its pairs on all ranks and micro-batches, also where these hold unequal numbers;
- metrics are sums and counts over real pairs and tokens, added up on all ranks once per log, where TRL averages the
  averages of batches and counts the pairs twice that accelerate repeats to even out a last batch.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpokit.placement import shard_on_cpu
from dpokit.rundir import new_folder
from dpokit.train.batches import Batches, Rows, count_tokens
from dpokit.train.scoring import ScoringTrainer
from dpokit.train.sums import Sums

Batch = dict[str, Any]


class Collator:
    """TRL's collator, and `counts`: whether the batch's pairs are real, not a stand-in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None) -> None:
        # Pairs are cut where they are tokenised, so the collator has no length to keep.
        self._pad = DataCollatorForPreference(
            pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=pad_to_multiple_of
        )

    def __call__(self, rows: list[Batch]) -> Batch:
        return {**self._pad(rows), "counts": torch.tensor([row.get("counts", True) for row in rows])}


class PairTrainer(ScoringTrainer):
    """Trains on tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`); arguments are ScoringTrainer's."""

    _total_train_tokens: float  # TRL's count of tokens seen, over all ranks

    def __init__(self, **arguments: Any) -> None:
        args = arguments["args"]
        collator = Collator(arguments["processing_class"], args.pad_to_multiple_of)
        # Our batches are dealt by `Batches`, of unequal size at an epoch's end; accelerate must not even them out.
        args.accelerator_config.even_batches = False
        args.accelerator_config.dispatch_batches = False
        if isinstance(arguments["train_dataset"], IterableDataset):
            # A stream's end is not known beforehand, so its last, incomplete batch is left out instead of repeated.
            args.dataloader_drop_last = True
        # transformers would put the average of the losses before in a NaN's place, and log that.
        args.logging_nan_inf_filter = False
        self._non_finite_step: int | None = None
        self._batches: Batches | None = None
        self._step_pairs = 0.0
        self._sums = {"train": Sums(), "eval": Sums()}
        self._eval_loss = Sums()
        self._working_since: float | None = None  # when the training steps since the last log began
        super().__init__(data_collator=collator, **arguments)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # dpokit.data has tokenised it

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL writes a card without results beside each checkpoint; ours is made from the finished run."""

    def create_accelerator_and_postprocess(self) -> None:
        """transformers' own, with FSDP2 that shards on CPU too."""
        shard_on_cpu(self.args)
        super().create_accelerator_and_postprocess()

    # -- batches ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by `Batches`, dealt to the ranks; a stream as transformers deals it."""
        if not isinstance(self.train_dataset, Dataset):
            return super().get_train_dataloader()
        self._batches = Batches(
            len(self.train_dataset),
            per_device=self._train_batch_size,
            world_size=self.accelerator.num_processes,
            micro_batches=self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
            lengths=count_tokens(self.train_dataset),
        )
        return self._build_loader(self.train_dataset, self._batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """All held-out pairs in order, each once."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = Batches(len(rows), per_device=self.args.eval_batch_size, world_size=self.accelerator.num_processes)
        return self._build_loader(rows, batches)

    def _build_loader(self, rows: Dataset, batches: Batches) -> DataLoader[Any]:
        args = self.args
        loader = DataLoader(
            Rows(rows),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def set_batches_epoch(self, epoch: int) -> None:
        """Called at each epoch's begin: behind a resume's skipped batches, transformers does not reach the sampler."""
        if self._batches is not None:
            self._batches.set_epoch(epoch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], None]:
        """The micro-batches of one step; counts the step's pairs over all ranks."""
        if self._working_since is None:
            self._working_since = time.monotonic()
        samples, _ = super().get_batch_samples(*args, **kwargs)
        pairs = torch.tensor(float(sum(int(b["counts"].sum()) for b in samples)), device=self.accelerator.device)
        self._step_pairs = float(self.accelerator.reduce(pairs, reduction="sum"))
        return samples, None

    # -- loss and metrics ------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> Any:
        counts = inputs.pop("counts")
        mode = "train" if self.model.training else "eval"
        pairs = float(counts.sum())
        self.prove_shared_prefix(model, inputs)
        self._metrics[mode] = defaultdict(list)
        tokens_before = self._total_train_tokens
        with self._gathers_switched_off():
            result = super()._compute_loss(model, inputs, return_outputs)
        if not pairs:
            self._total_train_tokens = tokens_before
        loss = result[0] if return_outputs else result
        means = {name: values[-1] for name, values in self._metrics[mode].items() if name != "num_tokens"}
        self._sums[mode].add(means, inputs["completion_mask"], real=pairs > 0)
        self._count_tokens(mode, inputs, real=pairs > 0)
        if mode == "eval":
            self._eval_loss.add({"loss": loss.item()}, inputs["completion_mask"], real=pairs > 0)
        else:
            self._note_finite(loss)
            # transformers divides by the step's micro-batches and DDP by the ranks, as if all held as many pairs.
            share = pairs / self._step_pairs
            loss = loss * (share * self.accelerator.num_processes * self.current_gradient_accumulation_steps)
        return (loss, result[1]) if return_outputs else loss

    def _count_tokens(self, mode: str, inputs: Batch, *, real: bool) -> None:
        """Tokens that a batch needs, each prompt once, and positions that it takes."""
        rows, answers = inputs["attention_mask"], inputs["completion_mask"]
        prompts = (rows.sum() - answers.sum()).item() / 2
        needed = prompts + answers.sum().item()
        computed = needed if self.shared_prefix == "on" else float(rows.numel())
        self._sums[mode].count(needed_tokens=needed if real else 0.0, computed_tokens=computed)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self.args.fp16:  # fp16's loss scaling skips a step whose gradients overflow
            self._note_finite(torch.as_tensor(float(norm)))
        return norm

    def _note_finite(self, value: torch.Tensor) -> None:
        if self._non_finite_step is None and not torch.isfinite(value).all():
            self._non_finite_step = self.state.global_step + 1

    def find_non_finite_step(self) -> int | None:
        """The first step at which a rank's loss or gradient was not finite; None where all were. Collective."""
        never = torch.iinfo(torch.int64).max
        step = torch.tensor(self._non_finite_step or never, device=self.accelerator.device)
        first = int(self.accelerator.gather(step).min())
        return None if first == never else first

    @contextmanager
    def _gathers_switched_off(self) -> Iterator[None]:
        """TRL gathers each metric of each micro-batch from all ranks (some 15 waits); ours are added up when logged.

        Inside, each of TRL's metrics is the mean over this rank's batch. Delete when TRL keeps sums and counts.
        """
        accelerator = self.accelerator
        names = ("gather", "gather_for_metrics")
        for name in names:
            setattr(accelerator, name, _keep)
        try:
            yield
        finally:
            for name in names:
                delattr(accelerator, name)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with our means. Collective."""
        mode = "train" if self.model.training else "eval"
        self._sums[mode].count(num_tokens=self._total_train_tokens)
        means, totals = self._sums[mode].take(self.accelerator)
        means.pop("loss", None)
        if means:
            computed, needed = totals.pop("computed_tokens"), totals.pop("needed_tokens")
            means |= totals
            if mode == "train":
                means["wasted_positions"] = 1 - needed / computed
                if self._working_since is not None:
                    means["tokens_per_second"] = needed / (time.monotonic() - self._working_since)
                self._working_since = None
        self._metrics[mode] = defaultdict(list, {name: [mean] for name, mean in means.items()})
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop; the loss is the mean over real pairs."""
        began = time.monotonic()
        self._sums["eval"], self._eval_loss = Sums(), Sums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means, _ = self._eval_loss.take(self.accelerator)
        output.metrics[f"{metric_key_prefix}_loss"] = means["loss"]
        if self._working_since is not None:
            self._working_since += time.monotonic() - began
        return output

    # -- checkpoints and weights -----------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A rank calls a checkpoint the best if it sees the folder, and with sharded states that is made later, by
        # whichever rank is first: the ranks disagree on what to load in the end, and wait for each other for ever.
        # Delete when transformers makes the folder first.
        Path(self.args.output_dir, f"checkpoint-{self.state.global_step}").mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)

    def save_weights(self, folder: Path) -> None:
        """Writes model or adapter and tokenizer, safetensors and JSON only; the folder appears whole. Collective."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.accelerator.is_main_process:
            with new_folder(folder) as part:
                model = self.accelerator.unwrap_model(self.model)
                # TRL keeps the start of a loaded adapter beside it, as the reference.
                only = {"selected_adapters": [model.active_adapter]} if isinstance(model, PeftModel) else {}
                model.save_pretrained(part, state_dict=state, **only)
                self.processing_class.save_pretrained(part)
                (part / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        self.accelerator.wait_for_everyone()


def _keep(tensor: Any) -> Any:
    return tensor
