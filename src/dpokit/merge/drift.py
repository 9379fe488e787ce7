"""Held-out answers scored by the policy as it was trained, and by the merged model as others will load it."""

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
from dpokit.data.columns import fingerprint_ids
from dpokit.data.prepare import prepare_held_out
from dpokit.errors import DataError, ModelError
from dpokit.merge.layers import load_trained
from dpokit.model.load import find_base, find_max_length, load_frozen, name_model
from dpokit.model.score import PairScorer
from dpokit.settings.load import Settings

BATCH_PAIRS = 8

# Most drift in nats, in the mean and for a single token. Measured on random models (a Llama of 60M with weights of
# 0.04, 300 answer tokens; GPT-2 124M alike, without 4 bits): fp32 1.3e-6 and 5.7e-6; bf16 1.7e-2 and 6.9e-2, where
# policy and merged model round at different places; fp16 1.6e-3 and 6.4e-3; a 4-bit base against its bf16 original
# 0.35 and 1.3, against what 4 bits left of it 1.7e-2 and 7.8e-2. The bounds leave room for more tokens and rarer ones.
BOUNDS = {"float32": (1e-5, 1e-4), "float16": (2e-2, 2e-1), "bfloat16": (1e-1, 1.0)}
BOUND_OTHER_BASE = (1.0, 10.0)


class Proof:
    """The policy's log-probs, taken before anything is merged; the policy itself is let go again.

    Args:
        settings: the run's.
        folder: of the weights that are merged.
        limit: of the run's held-out pairs, the first so many.

    Raises: DpokitError: no pairs, or a policy that cannot be loaded.
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
                error.seen, expected=error.expected, do=f"{error.do}; or merge without a proof: --no-proof"
            ) from error
        pairs = held_out.pairs.select(range(min(limit or len(held_out.pairs), len(held_out.pairs))))
        self._rows = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()
        name, source = str(settings.data.dataset_name), held_out.tally.source
        if Path(name).exists():  # merge.json is published: no path of this machine
            source = source.replace(name, Path(name).name)
        self._data = {"name": source, "fingerprint": fingerprint_ids([pairs])}
        self._before = self._score(policy, "trained")
        reference = str(settings.model.model_name_or_path)
        own_base = isinstance(policy, PeftModel) and find_base(name_model(settings, str(folder))) == reference
        if not own_base:
            del policy
            gc.collect()  # one model at a time: its patched forward refers to itself
            policy = load_frozen(settings, reference, tokenizer)
        with policy.disable_adapter() if own_base else nullcontext():
            self._reference = self._score(policy, "reference")
        del policy
        gc.collect()

    def measure(self, merged: PreTrainedModel) -> dict[str, Any]:
        """What merge.json says of the merged model, read back from disk.

        Drift is what merging changed in a token's log-prob, the shift what training had changed; both in nats.

        Raises: ModelError for a NaN.
        """
        after = self._score(merged.to(self._settings.training.device), "merged")
        drift = find_distances(after, self._before)
        if not torch.isfinite(drift).all():
            raise ModelError(
                "the merged model gives log-probs that are not finite",
                expected="numbers, as the trained policy gave",
                do="--dtype bfloat16 or --dtype float32",
            )
        return {
            "pairs": len(self._rows),
            "tokens": len(drift),
            "data": self._data,
            "mean_drift": float(drift.double().mean()),
            "largest_drift": float(drift.max()),
            "mean_shift": float(find_distances(self._before, self._reference).double().mean()),
            "accuracy_before": self._find_accuracy(self._before),
            "accuracy_after": self._find_accuracy(after),
        }

    @torch.no_grad()
    def _score(self, model: PreTrainedModel | PeftModel, name: str) -> list[list[torch.Tensor]]:
        """Log-probs of each answer's tokens: chosen and rejected of each pair, fp32."""
        scorer = PairScorer(model, pad_id=self._pad_id, longest=self._longest)
        order = sorted(range(len(self._rows)), key=lambda at: -sum(len(ids) for ids in self._rows[at].values()))
        found: list[list[torch.Tensor]] = [[]] * len(order)
        for start in track_progress(range(0, len(order), BATCH_PAIRS), desc=f"scoring, {name}", unit="batch"):
            places = order[start : start + BATCH_PAIRS]
            table = scorer.score_tokens([self._rows[at] for at in places])
            for column, at in enumerate(places):
                found[at] = [take_answer(table[side, column], self._rows[at], side) for side in (0, 1)]
        return found

    def _find_accuracy(self, scores: Sequence[Sequence[torch.Tensor]]) -> float:
        """The share of pairs whose chosen answer has the higher reward."""
        higher = 0
        for mine, theirs in zip(scores, self._reference, strict=True):
            chosen, rejected = (float((a.double() - b.double()).sum()) for a, b in zip(mine, theirs, strict=True))
            higher += chosen > rejected
        return higher / len(scores)


def find_distances(these: Sequence[Sequence[torch.Tensor]], those: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """How far the log-probs of each answer token are apart: `(tokens,)`, nats."""
    both = zip(chain.from_iterable(these), chain.from_iterable(those), strict=True)
    return torch.cat([(one - other).abs() for one, other in both])


def take_answer(log_probs: torch.Tensor, row: Mapping[str, Sequence[int]], side: int) -> torch.Tensor:
    """The answer's part of a row of `score_tokens`: `(answer tokens,)`; side 0 is chosen, 1 rejected."""
    first = len(row["prompt_ids"]) - 1
    return log_probs[first : first + len(row["rejected_ids" if side else "chosen_ids"])].clone()


def check_drift(drift: Mapping[str, Any], dtypes: Sequence[str], *, other_base: bool, accept: bool) -> dict[str, Any]:
    """The bound that drift is held to, for merge.json.

    Args:
        drift: as `Proof.measure` returns it.
        dtypes: what was trained in, and what was written: the narrower one sets the bound.
        other_base: trained on 4 or 8 bits, merged into the base as it is.
        accept: drift beyond the bound is told, not refused.

    Raises: ModelError beyond the bound.
    """
    if not other_base and drift["mean_drift"] > max(drift["mean_shift"] / 2, BOUNDS["float32"][0]):
        say(
            f"warning: merging changed the log-probs by {drift['mean_drift']:.2g} nats a token in the mean, training "
            f"had by {drift['mean_shift']:.2g}: {dtypes[-1]} rounds away what was learnt (--dtype float32 keeps it)"
        )
    mean, largest = BOUND_OTHER_BASE if other_base else max(BOUNDS[dtype] for dtype in dtypes)
    beyond = drift["mean_drift"] > mean or drift["largest_drift"] > largest
    if beyond:
        seen = (
            f"the merged model is not the one that was trained: its log-probs of {drift['tokens']:,} held-out answer "
            f"tokens differ by {drift['mean_drift']:.2g} nats in the mean, and by {drift['largest_drift']:.2g} at most "
            f"(reward accuracy {drift['accuracy_before']:.1%} before, {drift['accuracy_after']:.1%} after)"
        )
        if not accept:
            raise ModelError(
                seen,
                expected=f"at most {mean:g} in the mean and {largest:g} for a token; nothing was kept",
                do="--dequantized-base merges into the weights that the adapter was trained on; or --accept-drift"
                if other_base
                else "look at base and versions (run.json); --dtype float32 rounds least; or --accept-drift",
            )
        say(f"accepted: {seen}")
    return {"bound": {"mean_drift": mean, "largest_drift": largest}, "drift_accepted": beyond}
