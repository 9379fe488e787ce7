"""Measures the merge: log-probs of held-out answers under the trained policy and under the merged model on disk.

Both are computed in fp32 from the weights as they are, so that a difference is one of weights. What the rounding of the
model's own precision changes is measured beside it.
"""

import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpokit.console import say, track_progress
from dpokit.data.columns import IDS, MASKS, fingerprint_ids
from dpokit.data.prepare import prepare_held_out
from dpokit.errors import DataError, ModelError
from dpokit.merge.layers import load_trained
from dpokit.model.load import find_base, find_max_length, load_frozen, name_model
from dpokit.model.rounding import try_in_fp32
from dpokit.model.score import PairScorer, keep_scored
from dpokit.settings.load import Settings
from dpokit.settings.mixture import is_local

BATCH_PAIRS = 8
SIDES = ("chosen", "rejected")

# Largest allowed drift in nats: the mean, and of a single token. Of weights in fp32:
BOUND_FP32 = (1e-5, 1e-4)
# Of weights in 16 bits: a multiple of what rounding changes in a forward pass of these weights on these rows. Measured
# on SmolLM2-135M in bf16: rounding 3.5e-2, a correct merge 1e-2 at most, weights changed by 1 % 7e-2 at least.
ROUNDINGS = (1.0, 20.0)
# Where a model cannot compute in fp32 (`find_fp32_obstacle`), with the rounding of both models; and for an adapter that
# was trained on a quantised base and merged into the original one: measured 0.35 and 1.3 for 4 bits.
BOUND_16_BIT = (1e-1, 1.0)
BOUND_OTHER_BASE = (1.0, 10.0)
ROUNDING_BATCHES = 4  # to measure the rounding on


class DriftCheck:
    """Scores held-out pairs with the trained policy before the merge, and frees the policy's memory again.

    Args:
        settings: the run's settings.
        folder: the folder of the weights to merge.
        limit: number of held-out pairs to score, from the first; None for all.

    Raises: DpokitError: there are no pairs, or the policy cannot be loaded.
    """

    def __init__(
        self, settings: Settings, folder: Path, *, tokenizer: PreTrainedTokenizerBase, limit: int | None
    ) -> None:
        self._settings, self._pad_id = settings, int(tokenizer.pad_token_id)
        policy = load_trained(settings, folder, tokenizer)
        self._longest = find_max_length(settings, policy)
        try:
            held_out = prepare_held_out(
                settings.data,
                tokenizer,
                max_length=self._longest,
                processes=settings.training.dataset_num_proc,
            )
        except DataError as error:
            raise DataError(
                error.seen, expected=error.expected, do=f"{error.do}; or merge without this check: --no-proof"
            ) from error
        pairs = held_out.pairs.select(range(min(limit or len(held_out.pairs), len(held_out.pairs))))
        self._rows = pairs.select_columns([*IDS, *MASKS]).to_list()
        source = held_out.tally.source
        for part in settings.data.sources():
            if is_local(part):  # merge.json is published, so it holds no local path
                source = source.replace(part.title, Path(part.title).name)
        self._data = {"name": source, "fingerprint": fingerprint_ids([pairs])}
        self._computes_in_fp32 = True
        self._roundings: list[torch.Tensor] = []
        scorer = self._make_scorer(policy)
        self._before = self._score(scorer, "trained")
        reference = str(settings.model.model_name_or_path)
        has_reference = isinstance(policy, PeftModel) and find_base(name_model(settings, str(folder))) == reference
        if not has_reference:
            del policy, scorer
            gc.collect()  # frees the policy, whose patched forward refers to itself, before the next model is loaded
            policy = load_frozen(settings, reference, tokenizer)
            scorer = self._make_scorer(policy)
        with policy.disable_adapter() if has_reference else nullcontext():
            self._reference = self._score(scorer, "reference")
        del policy, scorer
        gc.collect()

    def measure(self, merged: PreTrainedModel) -> dict[str, Any]:
        """Returns the measurements of the merged model for merge.json.

        Drift is the change of a token's log-prob by the merge, shift its change by training, rounding the change by
        the models' own precision, None if no model computes in fp32; all in nats.

        Raises: ModelError: a log-prob is not finite.
        """
        after = self._score(self._make_scorer(merged.to(self._settings.training.device)), "merged")
        drift = find_distances(after, self._before)
        if not torch.isfinite(drift).all():
            raise ModelError(
                "the merged model gives log-probs that are not finite",
                expected="finite log-probs, as of the trained policy",
                do="--dtype bfloat16 or --dtype float32",
            )
        return {
            "pairs": len(self._rows),
            "tokens": len(drift),
            "data": self._data,
            "mean_drift": float(drift.double().mean()),
            "largest_drift": float(drift.max()),
            "mean_rounding": float(torch.stack(self._roundings).max()) if self._computes_in_fp32 else None,
            "mean_shift": float(find_distances(self._before, self._reference).double().mean()),
            "accuracy_before": self._find_accuracy(self._before),
            "accuracy_after": self._find_accuracy(after),
        }

    def _make_scorer(self, model: PreTrainedModel | PeftModel) -> PairScorer:
        return PairScorer(model, pad_id=self._pad_id, longest=self._longest)

    def _score(self, scorer: PairScorer, name: str) -> list[list[torch.Tensor]]:
        """For each pair the log-probs of the chosen and of the rejected answer's scored tokens, fp32."""
        order = sorted(range(len(self._rows)), key=lambda row: -sum(len(self._rows[row][name]) for name in IDS))
        batches = [order[start : start + BATCH_PAIRS] for start in range(0, len(order), BATCH_PAIRS)]
        scores: list[list[torch.Tensor]] = [[]] * len(order)
        rounding, tokens = torch.zeros(()), 0
        for number, batch in enumerate(track_progress(batches, desc=f"scoring, {name}", unit="batch")):
            # Not in fp32 first: the scorer proves its packed rows in the model's own precision.
            is_rounded = not self._computes_in_fp32 or number % max(1, len(batches) // ROUNDING_BATCHES) == 0
            rounded = self._take(scorer, batch) if is_rounded else None
            answers = self._score_in_fp32(scorer, batch) or rounded or self._take(scorer, batch)
            if rounded is not None:
                distances = find_distances(answers, rounded)
                rounding, tokens = rounding + distances.sum(), tokens + len(distances)
            for row, log_probs in zip(batch, answers, strict=True):
                scores[row] = log_probs
        self._roundings.append(rounding / tokens)
        return scores

    def _score_in_fp32(self, scorer: PairScorer, batch: Sequence[int]) -> list[list[torch.Tensor]] | None:
        """As `_take`; None if a model cannot compute in fp32."""
        if not self._computes_in_fp32:
            return None
        answers = try_in_fp32(scorer.model, scorer.model.device, lambda: self._take(scorer, batch))
        self._computes_in_fp32 = answers is not None
        return answers

    def _take(self, scorer: PairScorer, batch: Sequence[int]) -> list[list[torch.Tensor]]:
        """The log-probs of both answers' scored tokens of these rows."""
        table = scorer.score_tokens([self._rows[row] for row in batch])
        return [
            [take_answer(table[side, column], self._rows[row], answer) for side, answer in enumerate(SIDES)]
            for column, row in enumerate(batch)
        ]

    def _find_accuracy(self, scores: Sequence[Sequence[torch.Tensor]]) -> float:
        """The share of pairs whose chosen answer has the higher reward."""
        higher = 0
        for policy, reference in zip(scores, self._reference, strict=True):
            chosen, rejected = (float((a.double() - b.double()).sum()) for a, b in zip(policy, reference, strict=True))
            higher += chosen > rejected
        return higher / len(scores)


def find_distances(left: Sequence[Sequence[torch.Tensor]], right: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Absolute differences between the log-probs of each scored token: `(tokens,)`, nats."""
    answers = zip(chain.from_iterable(left), chain.from_iterable(right), strict=True)
    return torch.cat([(a - b).abs() for a, b in answers])


def take_answer(log_probs: torch.Tensor, row: Mapping[str, Sequence[int]], answer: str) -> torch.Tensor:
    """The log-probs of the `chosen` or `rejected` answer in a row of `score_tokens`: `(scored tokens,)`."""
    first = len(row["prompt_ids"]) - 1
    return keep_scored(log_probs[first : first + len(row[f"{answer}_ids"])].clone(), row, answer)


def check_drift(drift: Mapping[str, Any], dtype: str, *, other_base: bool, accept: bool) -> dict[str, Any]:
    """Compares the drift with its bounds; returns the bounds for merge.json.

    Args:
        drift: the result of `DriftCheck.measure`.
        dtype: of the merged weights.
        other_base: the adapter was trained on a base in 4 or 8 bits, and merged into the original base.
        accept: whether drift beyond the bounds is reported instead of refused.

    Raises: ModelError: the drift is beyond the bounds.
    """
    if not other_base and drift["mean_drift"] > max(drift["mean_shift"] / 2, BOUND_FP32[0]):
        say(
            f"warning: merging changed the log-probs by a mean of {drift['mean_drift']:.2g} nats a token, training by "
            f"{drift['mean_shift']:.2g}: {dtype} rounds the training away (--dtype float32 keeps it)"
        )
    if other_base:
        mean, largest = BOUND_OTHER_BASE
    elif drift["mean_rounding"] is None:
        mean, largest = BOUND_16_BIT
    else:
        mean, largest = (
            max(bound, times * drift["mean_rounding"]) for bound, times in zip(BOUND_FP32, ROUNDINGS, strict=True)
        )
    beyond = drift["mean_drift"] > mean or drift["largest_drift"] > largest
    if beyond:
        finding = (
            f"the merged model differs from the trained one: its log-probs of {drift['tokens']:,} held-out answer "
            f"tokens differ by a mean of {drift['mean_drift']:.2g} nats, and by at most {drift['largest_drift']:.2g} "
            f"(reward accuracy {drift['accuracy_before']:.1%} before, {drift['accuracy_after']:.1%} after)"
        )
        if not accept:
            raise ModelError(
                finding,
                expected=f"a mean of at most {mean:g} and at most {largest:g} for a token; no merged model was kept",
                do="--dequantized-base merges into the weights that the adapter was trained on; or --accept-drift"
                if other_base
                else "check the base and the versions in run.json; --dtype float32 rounds least; or --accept-drift",
            )
        say(f"accepted: {finding}")
    return {"bound": {"mean_drift": mean, "largest_drift": largest}, "drift_accepted": beyond}
