"""Scores pairs: a prompt once for both answers, and the reference once for all epochs and runs.

upstream.py lists the private names of TRL that it uses.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from dpokit.checkpoint.preempt import Notice
from dpokit.console import say, track_progress
from dpokit.data.columns import fingerprint_ids
from dpokit.interrupts import Preempted
from dpokit.model.reference import PartScores, ReferenceCache, choose_spot_checks, describe_scores, find_cache_folder
from dpokit.model.rounding import try_in_fp32
from dpokit.model.score import (
    LARGEST_IN_16_BIT,
    LARGEST_IN_FP32,
    count_scored,
    find_dropout,
    find_obstacle,
    prove,
    share_prefix,
)
from dpokit.model.shared_prefix import SharedPrefix
from dpokit.train.batches import OWN_KEYS, Batches

Batch = dict[str, Any]


class ScoringTrainer(DPOTrainer):
    """DPOTrainer that computes a prompt once for both answers, and caches precomputed reference log-probs on disk.

    Args:
        shared_prefix: compute a prompt once for both answers, if the model allows it.
        longest: the maximum number of tokens of a row; None if it is not known.
        reference: the facts that the reference's log-probs depend on, except the token ids; None does not cache them.
        notice: the signals of this process, checked while the reference is computed; None checks nothing.
        arguments: DPOTrainer's.

    Attributes:
        shared_prefix: `on`, or `off: ` and the reason; `untried` before the first batch.
        answer_rounding: the size of the rounding in an answer's log-prob, in nats; None if it is unknown.
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
        self._is_proved = False
        self.answer_rounding: float | None = None
        super().__init__(**arguments)
        self._share_prefixes()

    # -- shared prompts --------------------------------------------------------------------------------------------

    def _share_prefixes(self) -> None:
        """Gives policy and reference the packed forward, once; TRL's own constructor may already score rows."""
        if self._shared is not None:
            return
        self._shared = []
        why = "a mixture's balancing loss counts both rows" if self.aux_loss_enabled else None
        why = why or ("NEFTune adds noise to each row" if self.args.neftune_noise_alpha else None)
        why = why or find_obstacle(self.model, self._longest)
        models = [self.model] if self.ref_model is None else [self.model, self.accelerator.unwrap_model(self.ref_model)]
        try:
            self._shared = [share_prefix(model) for model in models] if why is None else []
        except ValueError as error:
            why = " ".join(str(error).split())
        if why is not None:
            self._stop_sharing(why)

    def prove_first_batch(self, model: Any, inputs: Batch) -> None:
        """Compares packed and padded rows of the first batch, and measures its rounding. Collective.

        If they differ on any rank, all ranks use padded rows.
        """
        if self._is_proved:
            return
        self._is_proved = True
        is_random = find_dropout(self.model) or self.args.neftune_noise_alpha
        if not self._shared and (is_random or not self._rounds()):
            return
        shared = self._shared[-1 if model is self.ref_model else 0] if self._shared else None
        proof = prove(model, shared, inputs)
        tokens = float(inputs["completion_mask"].sum()) / len(inputs["completion_mask"])
        # Errors of rounding are about independent, so that of a sum grows with the root of the number of tokens.
        rounding = proof.rounding * math.sqrt(tokens)
        of_rank = torch.tensor([proof.mismatch is not None, rounding], device=self.accelerator.device)
        mismatches, roundings = self.accelerator.gather(of_rank).view(-1, 2).unbind(dim=1)
        self.answer_rounding = float(roundings.mean())
        if shared is None:
            return
        self.shared_prefix = "on"
        if mismatches.any():
            self._stop_sharing(proof.mismatch or "the first pairs' log-probs differ on another rank")

    def drop_unused_layout(self, inputs: Batch) -> None:
        """Removes the packed layout from a batch whose model does not take it."""
        if not self._shared:
            inputs.pop("packed", None)

    def _stop_sharing(self, why: str) -> None:
        self.shared_prefix = f"off: {why}"
        for shared in self._shared or ():
            shared.on = False
        say(f"shared prefix: off, as {why}; each prompt is computed twice, in padded rows")

    def _rounds(self) -> bool:
        """Whether log-probs are computed in less than fp32."""
        is_quantised = getattr(self.model, "is_quantized", False)
        is_wide = self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32
        return is_quantised or not is_wide or bool(self.args.tf32)

    # -- precomputed reference --------------------------------------------------------------------------------------

    def compute_ref_log_probs(self, model: Any, inputs: Batch) -> Any:
        """Calls TRL's method, with shared prompts; removes dpokit's own keys from the batch."""
        for name in OWN_KEYS:
            inputs.pop(name, None)
        self._share_prefixes()
        self.prove_first_batch(model, inputs)
        self.drop_unused_layout(inputs)
        return super().compute_ref_log_probs(model, inputs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The dataset with `ref_chosen_logps` and `ref_rejected_logps`, from the cache or computed. Collective.

        TRL's own cache depends on the learning rate and the output folder, but not on `ld_alpha`; and if nodes have
        separate disks, its other ranks look for a file that only rank 0 has.
        """
        depends_on = describe_scores(self._reference or {}, self.args, fingerprint_ids([dataset]))
        cache = ReferenceCache(find_cache_folder(), depends_on, len(dataset))
        model = self._find_reference_model()
        scores = self._read_parts(cache)
        if not self._spot_check(model, dataset, scores, batch_size):
            scores = {}
            if self.accelerator.is_main_process:
                cache.forget()
        missing = [part for part in cache.parts() if part.start not in scores]
        with track_progress(
            total=len(dataset), initial=len(dataset) - sum(map(len, missing)), desc=f"reference, {name}", unit="pair"
        ) as bar:
            for part in missing:
                log_probs = self._score_rows(model, dataset, list(part), batch_size)
                first = torch.full((2,), math.nan)
                if cache.has_fp32(part):
                    first = self._score_in_fp32(model, dataset, [part.start], batch_size).flatten()
                scores[part.start] = PartScores(log_probs, first)
                if self.accelerator.is_main_process and self._reference is not None:
                    cache.write(part, scores[part.start])
                bar.update(len(part))
                self._end_if_signalled()
        chosen, rejected = torch.cat([scores[part.start].log_probs for part in cache.parts()], dim=1).tolist()
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def _end_if_signalled(self) -> None:
        """Raises Preempted if any rank has received a signal; the parts so far are cached. Collective."""
        if self._notice is None:
            return
        notes = gather_object([self._notice.why if self._notice.is_given() else None])
        why = next((note for note in notes if note is not None), None)
        if why is not None:
            say(f"{why}: ending; the reference log-probs so far are cached, and the same command continues from there")
            raise Preempted(why)

    def _find_reference_model(self) -> Any:
        if self.ref_model is None and self.is_deepspeed_enabled:
            # As TRL does: before training, DeepSpeed has not placed or sharded the parameters yet.
            if self._precompute_engine is None:
                self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
            return self._precompute_engine
        return self.ref_model or self.model

    def _read_parts(self, cache: ReferenceCache) -> dict[int, PartScores]:
        """The cached scores, by the first row of their part; read by rank 0, as other nodes may not see its disk."""
        box: list[dict[int, PartScores]] = [{}]
        if self.accelerator.is_main_process and self._reference is not None:
            read = {part.start: cache.read(part) for part in cache.parts()}
            box = [{start: scores for start, scores in read.items() if scores is not None}]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def _spot_check(self, model: Any, dataset: Dataset, cached: dict[int, PartScores], batch_size: int) -> bool:
        """Whether the cached log-probs of a few pairs equal those computed now. Collective."""
        exact_parts = [start for start in sorted(cached) if not cached[start].first_in_fp32.isnan().any()]
        rows = choose_spot_checks(exact_parts or sorted(cached))
        if not rows:
            return True
        tokens = torch.tensor([[count_scored(dataset[row], side) for row in rows] for side in ("chosen", "rejected")])
        kept = torch.stack([cached[row].log_probs[:, 0] for row in rows], dim=1)
        exact = torch.stack([cached[row].first_in_fp32 for row in rows], dim=1)
        computed = self._score_in_fp32(model, dataset, rows, batch_size)
        if (exact + computed).isnan().any():
            exact = computed = self._score_rows(model, dataset, rows, batch_size)
        # Errors of tokens are about independent, so that of their sum grows with the root of their number.
        weights, rounding = (float(((exact - other).abs() / tokens.sqrt()).mean()) for other in (computed, kept))
        if weights <= LARGEST_IN_FP32 and rounding <= (LARGEST_IN_16_BIT if self._rounds() else LARGEST_IN_FP32):
            pairs = sum(scores.log_probs.shape[1] for scores in cached.values())
            say(f"reference log-probs: {pairs:,} of {len(dataset):,} pairs were cached")
            return True
        say(
            "reference log-probs: the cache is of other weights (a difference of "
            f"{max(weights, rounding):.1e} nats, as a share of the root of an answer's tokens); all are computed again"
        )
        return False

    def _score_in_fp32(self, model: Any, dataset: Dataset, rows: list[int], batch_size: int) -> torch.Tensor:
        """`_score_rows`, computed in fp32 and in padded rows; NaN if the model cannot. Collective."""
        self._share_prefixes()
        proved, self._is_proved = self._is_proved, True  # the proof is for the run's own precision
        try:
            with ExitStack() as stack:
                for shared in self._shared or ():
                    stack.enter_context(shared.switched_off())
                scores = try_in_fp32(
                    model, self.accelerator.device, lambda: self._score_rows(model, dataset, rows, batch_size)
                )
        finally:
            self._is_proved = proved
        return torch.full((2, len(rows)), math.nan) if scores is None else scores

    def _score_rows(self, model: Any, dataset: Dataset, rows: list[int], batch_size: int) -> torch.Tensor:
        """`(2, rows)`, fp32, on the CPU: chosen and rejected; the same on every rank. Collective."""
        device = self.accelerator.device
        table = torch.zeros(2, len(rows), device=device)
        for places in self._deal(len(rows), batch_size):
            pairs = [dataset[rows[place if place >= 0 else ~place]] for place in places]
            batch = send_to_device(self.data_collator(pairs), device)
            scores = torch.stack(self.compute_ref_log_probs(model, batch)).float()
            if places[0] >= 0:  # else a dummy
                table[:, places] = scores
        total: torch.Tensor = self.accelerator.reduce(table, reduction="sum").cpu()
        return total

    def _deal(self, pairs: int, batch_size: int) -> Iterator[list[int]]:
        """This rank's batches. Each rank has the same number, as a sharded model needs all ranks for each batch."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        for number, batch in enumerate(Batches(pairs, per_device=batch_size, world_size=ranks)):
            if number % ranks == rank:
                yield batch
