"""Exact steps and exact metrics, for each of TRL's trainers. Overrides their private methods.

- Rows arrive tokenised, so TRL's own preparation is skipped.
- A step's loss is the mean over its pairs or tokens on all ranks and micro-batches, even if these hold unequal numbers.
- Metrics are sums and counts over real rows, added up over all ranks once per log.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from dpokit.data.columns import IDS, MASKS, count_tokens
from dpokit.distributed.placement import shard_on_cpu
from dpokit.train.batches import OWN_KEYS, Batches, Prompts, Rows
from dpokit.train.metric_sums import Sums
from dpokit.train.resuming import ResumingTrainer

Batch = dict[str, Any]
NEVER = torch.iinfo(torch.int32).max  # no step's number


class Unread(TorchFunctionMode):
    """Inside, TRL's metrics stay tensors on their device: reading one waits for the GPU.

    - `item` returns a tensor, of float64 like Python's numbers.
    - A tensor is true. TRL asks only whether a batch has tokens at all; if not, the weights of its metrics are 0.
    - Selecting by a mask sets the other values to 0. TRL takes only the sum of the selection.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item:
            value = args[0].detach()
            return value.double() if value.is_floating_point() else value
        if func is torch.Tensor.__bool__:
            return True
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            return args[0].masked_fill(~args[1], 0)
        return func(*args, **(kwargs or {}))


class StepTrainer(ResumingTrainer):
    """Trains on tokenised rows. A base class that precedes one of TRL's trainers; subclasses weigh the loss.

    Attributes:
        columns: the columns of a row with the tokens that are trained on, by whose number a step's rows are balanced.
        shared_prefix: `on`, or `off: ` and the reason.
        answer_rounding: the size of the rounding in an answer's log-prob, in nats; None if it is unknown.
    """

    columns: tuple[str, ...] = IDS
    shared_prefix: str
    answer_rounding: float | None = None
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, **arguments: Any) -> None:
        args = arguments["args"]
        # At an epoch's end the batches of `Batches` may be unequal; accelerate must not even them out.
        args.accelerator_config.even_batches = False
        args.accelerator_config.dispatch_batches = False
        if isinstance(arguments["train_dataset"], IterableDataset):
            # The end of a stream is not known in advance, so its last, incomplete batch is dropped.
            args.dataloader_drop_last = True
        # transformers would replace a loss that is NaN by the mean of the losses before it, and log that.
        args.logging_nan_inf_filter = False
        self._non_finite_step: torch.Tensor | None = None  # int64, on the device; `NEVER` so far
        self._batches: Batches | None = None
        self._step_weight: float | torch.Tensor = 0.0
        self._eval_loss = Sums()
        super().__init__(**arguments)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # dpokit.data has tokenised it

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*IDS, *MASKS]  # transformers removes all other columns of a stream

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes nothing: TRL's card has no results. `dpokit card` writes one from the finished run."""

    def create_accelerator_and_postprocess(self) -> None:
        """Calls transformers' method, after making FSDP2 shard on CPU too."""
        shard_on_cpu(self.args)
        super().create_accelerator_and_postprocess()

    # -- batches of each kind of trainer: each kind defines `weigh` and `count_positions` -----------------------------

    def weigh(self, batch: Batch) -> float:
        """The number of pairs, or of tokens, that the batch's loss is a mean over; 0 for a dummy."""
        raise NotImplementedError

    def weigh_others(self, batch: Batch) -> Mapping[str, float]:
        """The weights of the metrics that are means over something else than the loss is; by name."""
        return {}

    def count_positions(self, batch: Batch) -> tuple[float, float]:
        """The tokens that a batch needs, and the positions that the model computes for it."""
        raise NotImplementedError

    def find_prompts(self, rows: Dataset) -> Prompts | None:
        """The prompts of rows that are kept together if they have the same; None if none are."""
        return None

    # -- batches ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of `Batches`, split among the ranks; for a stream transformers' own loader."""
        if not isinstance(self.train_dataset, Dataset):
            return super().get_train_dataloader()
        self._batches = Batches(
            len(self.train_dataset),
            per_device=self.args.train_batch_size,
            world_size=self.accelerator.num_processes,
            micro_batches=self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
            lengths=count_tokens(self.train_dataset, self.columns),
            prompts=self.find_prompts(self.train_dataset),
        )
        return self._build_loader(self.train_dataset, self._batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of all held-out rows, in order and each once."""
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
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def begin_epoch(self, epoch: int) -> None:
        """Sets the epoch of the batches: in a resume that skips batches, transformers does not reach the sampler."""
        self.epoch_ended = False
        if self._batches is not None:
            self._batches.set_epoch(epoch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], None]:
        """The micro-batches of one step; adds up their weights over all ranks."""
        if self._working_since is None:
            self._working_since = time.monotonic()
        samples, _ = super().get_batch_samples(*args, **kwargs)
        weight = float(sum(self.weigh(batch) for batch in samples))
        self._step_weight = weight
        if self.accelerator.num_processes > 1:  # the sum stays on the device, so that no step waits for it
            own_weight = torch.full((), weight, device=self.accelerator.device)
            self._step_weight = self.accelerator.reduce(own_weight, reduction="sum").double()
        return samples, None

    # -- loss and metrics ------------------------------------------------------------------------------------------

    def measure(self, batch: Batch, compute: Callable[[Batch], Any], *, return_outputs: bool) -> Any:
        """The result of TRL's `compute`, its loss scaled to the batch's share of the step; collects TRL's metrics."""
        mode = "train" if self.model.training else "eval"
        weight, others = self.weigh(batch), self.weigh_others(batch)
        needed, computed = self.count_positions(batch)
        tokens = batch["row_tokens"]
        for name in OWN_KEYS:
            batch.pop(name, None)
        self._metrics[mode] = defaultdict(list)
        tokens_before = self._total_train_tokens
        with self._without_gathers(wait=return_outputs or self.accelerator.device.type == "mps"):
            result = compute(batch)
        if mode == "train":
            self._total_train_tokens = tokens_before + (tokens if weight else 0)
        loss = result[0] if return_outputs else result
        means = {name: values[-1] for name, values in self._metrics[mode].items() if name != "num_tokens"}
        self._sums[mode].add(means, weight, others=others, real=weight > 0)
        self._sums[mode].count(needed_tokens=needed if weight else 0.0, computed_tokens=computed)
        if mode == "eval":
            self._eval_loss.add({"loss": loss}, weight, real=weight > 0)
        else:
            self._note_finite(loss)
            # transformers divides by the number of micro-batches and DDP by the number of ranks, as if all were equal.
            share = weight / self._step_weight * self.accelerator.num_processes
            share = share * self.current_gradient_accumulation_steps
            # The product of a loss and a number is rounded once, from fp32.
            loss = (loss * (share.float() if isinstance(share, torch.Tensor) else share)).to(loss.dtype)
        return (loss, result[1]) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self.args.fp16:  # in fp16, loss scaling skips a step whose gradients overflow
            self._note_finite(norm if isinstance(norm, torch.Tensor) else torch.tensor(float(norm)))
        return norm

    def _note_finite(self, value: torch.Tensor) -> None:
        """Notes on the device whether this step is the first with a value that is not finite."""
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if self._non_finite_step is None:
            self._non_finite_step = torch.full((), NEVER, device=self.accelerator.device)
        is_finite = torch.isfinite(value.detach()).all().to(self._non_finite_step.device)
        step = torch.where(is_finite, NEVER, self.state.global_step + 1)
        self._non_finite_step = torch.minimum(self._non_finite_step, step)

    def find_non_finite_step(self) -> int | None:
        """The first step with a loss or gradient that is not finite on any rank; None if all are. Collective."""
        if self._non_finite_step is None:
            self._non_finite_step = torch.full((), NEVER, device=self.accelerator.device)
        first = int(self.accelerator.gather(self._non_finite_step).min())
        return None if first == NEVER else first

    @contextmanager
    def _without_gathers(self, *, wait: bool) -> Iterator[None]:
        """Inside, each of TRL's metrics is the mean over this rank's batch; a tensor, or with `wait` a number.

        TRL gathers each metric of each micro-batch from all ranks and reads it (some 15 waits); here they are added up
        when they are logged. After its first gather, TRL computes nothing but metrics. Delete when TRL keeps sums and
        counts.
        """
        accelerator = self.accelerator
        names = ("gather", "gather_for_metrics")
        with ExitStack() as stack:
            unread = None if wait else Unread()

            def gather(tensor: Any) -> Any:
                nonlocal unread
                if unread is not None:
                    stack.enter_context(unread)
                    unread = None
                return tensor

            for name in names:
                setattr(accelerator, name, gather)
                stack.callback(delattr, accelerator, name)
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Calls TRL's method with exact means. Collective."""
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
        """Calls transformers' method; the loss is the mean over real pairs or tokens."""
        began = time.monotonic()
        self._sums["eval"], self._eval_loss = Sums(), Sums()
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:  # a signal may cut the evaluation off
            if self._working_since is not None:
                self._working_since += time.monotonic() - began
        means, _ = self._eval_loss.take(self.accelerator)
        output.metrics[f"{metric_key_prefix}_loss"] = means["loss"]
        return output
