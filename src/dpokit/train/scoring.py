"""How pairs are scored: prompts computed once for both answers, the reference once for all epochs and runs.

upstream.py lists the names inside TRL that it uses.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from dpokit.checkpoint.preempt import Notice
from dpokit.console import say, track_progress
from dpokit.data.columns import fingerprint_ids
from dpokit.interrupts import Preempted
from dpokit.model.reference import ReferenceCache, choose_spot_checks, describe_scores, find_cache_folder
from dpokit.model.score import TOLERANCE_16_BIT, TOLERANCE_FP32, find_mismatch, find_obstacle, share_prefix
from dpokit.model.shared_prefix import SharedPrefix
from dpokit.train.batches import Batches

Batch = dict[str, Any]


class ScoringTrainer(DPOTrainer):
    """DPOTrainer whose policy and reference share prompts, and whose precomputed reference is kept on disk.

    Args:
        shared_prefix: compute a prompt once for both answers, where the model allows it.
        longest: most tokens of a row; None where nobody knows.
        reference: what the reference's log-probs depend on, the token ids left out; None keeps none on disk.
        notice: what this process was told, asked while the reference is computed; None asks nobody.
        arguments: DPOTrainer's.

    Attributes:
        shared_prefix: `on`, or `off: ` and why; `untried` before the first batch.
    """

    _precompute_engine: Any

    def __init__(
        self,
        *,
        shared_prefix: bool = True,
        longest: int | None = None,
        reference: dict[str, object] | None = None,
        notice: Notice | None = None,
        **arguments: Any,
    ) -> None:
        self.shared_prefix = "untried" if shared_prefix else "off: --shared_prefix false"
        self._shared: list[SharedPrefix] | None = None if shared_prefix else []
        self._longest = longest
        self._reference = reference
        self._notice = notice
        super().__init__(**arguments)
        self._share_prefixes()

    # -- prompts once ----------------------------------------------------------------------------------------------

    def _share_prefixes(self) -> None:
        """Switches the packed forward on in policy and reference; TRL's own constructor may score already."""
        if self._shared is not None:
            return
        self._shared = []
        why = "a mixture's balancing loss counts both rows" if self.aux_loss_enabled else None
        why = why or find_obstacle(self.model, self._longest)
        models = [self.model] if self.ref_model is None else [self.model, self.accelerator.unwrap_model(self.ref_model)]
        try:
            self._shared = [share_prefix(model) for model in models] if why is None else []
        except ValueError as error:
            why = " ".join(str(error).split())
        if why is not None:
            self._stop_sharing(why)

    def prove_shared_prefix(self, model: Any, inputs: Batch) -> None:
        """The first batch is scored packed and padded; where they differ on any rank, all go on padded. Collective."""
        if not self._shared or self.shared_prefix != "untried":
            return
        gap, why = find_mismatch(model, self._shared[-1 if model is self.ref_model else 0], inputs)
        worst = float(self.accelerator.gather(torch.tensor(gap, device=self.accelerator.device)).max())
        self.shared_prefix = "on"
        if not worst <= self._tolerance():
            self._stop_sharing(f"on another rank log-probs differ by {worst:.1e}" if gap <= self._tolerance() else why)

    def _stop_sharing(self, why: str) -> None:
        self.shared_prefix = f"off: {why}"
        for shared in self._shared or ():
            shared.on = False
        say(f"shared prefix: off, as {why}; each prompt is computed twice, in padded rows")

    def _tolerance(self) -> float:
        half = self.accelerator.mixed_precision != "no" or self.model.dtype != torch.float32
        return TOLERANCE_16_BIT if half else TOLERANCE_FP32

    # -- reference once --------------------------------------------------------------------------------------------

    def compute_ref_log_probs(self, model: Any, inputs: Batch) -> Any:
        """TRL's own, of a batch with `counts`; prompts are shared."""
        inputs.pop("counts", None)
        self._share_prefixes()
        self.prove_shared_prefix(model, inputs)
        return super().compute_ref_log_probs(model, inputs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The dataset with `ref_chosen_logps` and `ref_rejected_logps`: from the cache, else computed. Collective.

        TRL's own computes them anew for each learning rate or output folder, not for another `ld_alpha`; and where
        nodes have caches of their own, its other ranks look for a file that rank 0 wrote elsewhere.
        """
        depends_on = describe_scores(self._reference or {}, self.args, fingerprint_ids([dataset]))
        cache = ReferenceCache(find_cache_folder(), depends_on, len(dataset))
        model = self._find_reference_model()
        known = self._read_parts(cache)
        if not self._spot_check(model, dataset, known, batch_size):
            known = {}
            if self.accelerator.is_main_process:
                cache.forget()
        missing = [part for part in cache.parts() if part.start not in known]
        with track_progress(
            total=len(dataset), initial=len(dataset) - sum(map(len, missing)), desc=f"reference, {name}", unit="pair"
        ) as bar:
            for part in missing:
                known[part.start] = self._score_rows(model, dataset, list(part), batch_size)
                if self.accelerator.is_main_process and self._reference is not None:
                    cache.write(part, known[part.start])
                bar.update(len(part))
                self._end_where_told()
        chosen, rejected = torch.cat([known[part.start] for part in cache.parts()], dim=1).tolist()
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def _end_where_told(self) -> None:
        """Raises Preempted where any rank was told to end: the parts that are kept need not be computed again."""
        if self._notice is None:
            return
        notes = gather_object([self._notice.why if self._notice.is_given() else None])
        why = next((note for note in notes if note is not None), None)
        if why is not None:
            say(f"{why}: ending; what is computed of the reference is kept, and the same command goes on from there")
            raise Preempted(why)

    def _find_reference_model(self) -> Any:
        if self.ref_model is None and self.is_deepspeed_enabled:
            # As TRL does: before training, DeepSpeed has neither placed the parameters nor sharded them.
            if self._precompute_engine is None:
                self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
            return self._precompute_engine
        return self.ref_model or self.model

    def _read_parts(self, cache: ReferenceCache) -> dict[int, torch.Tensor]:
        """Rank 0 reads, all get: other nodes need not see its disk."""
        box: list[dict[int, torch.Tensor]] = [{}]
        if self.accelerator.is_main_process and self._reference is not None:
            read = {part.start: cache.read(part) for part in cache.parts()}
            box = [{start: values for start, values in read.items() if values is not None}]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def _spot_check(self, model: Any, dataset: Dataset, known: dict[int, torch.Tensor], batch_size: int) -> bool:
        """Whether a few pairs, computed now, have the log-probs that were kept."""
        rows = choose_spot_checks([range(start, start + values.shape[1]) for start, values in sorted(known.items())])
        if not rows:
            return True
        starts = [max(start for start in known if start <= row) for row in rows]
        kept = torch.stack([known[start][:, row - start] for row, start in zip(rows, starts, strict=True)], dim=1)
        computed = self._score_rows(model, dataset, rows, batch_size)
        apart = float(((computed - kept).abs() / kept.abs().clamp(min=1.0)).max())
        if apart <= self._tolerance():
            say(f"reference log-probs: {sum(v.shape[1] for v in known.values()):,} of {len(dataset):,} pairs were kept")
            return True
        say(f"reference log-probs: those kept are of other weights (apart by {apart:.1e}): all are computed again")
        return False

    def _score_rows(self, model: Any, dataset: Dataset, rows: list[int], batch_size: int) -> torch.Tensor:
        """`(2, rows)`, fp32, on the CPU: chosen, rejected; the same on every rank. Collective."""
        device = self.accelerator.device
        table = torch.zeros(2, len(rows), device=device)
        for places in self._deal(len(rows), batch_size):
            pairs = [dataset[rows[place if place >= 0 else ~place]] for place in places]
            batch = {name: values.to(device) for name, values in self.data_collator(pairs).items()}
            scores = torch.stack(self.compute_ref_log_probs(model, batch)).float()
            if places[0] >= 0:  # not a stand-in
                table[:, places] = scores
        total: torch.Tensor = self.accelerator.reduce(table, reduction="sum").cpu()
        return total

    def _deal(self, pairs: int, batch_size: int) -> Iterator[list[int]]:
        """This rank's batches; each rank has as many, as the model may need all ranks for each."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        for number, batch in enumerate(Batches(pairs, per_device=batch_size, world_size=ranks)):
            if number % ranks == rank:
                yield batch
