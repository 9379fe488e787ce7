"""Answer log-probs of held-out pairs under a model; those of the base are kept on disk, as a reference's are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce

from dpokit.console import say, track_progress
from dpokit.data.columns import IDS
from dpokit.distributed.coordination import decide_on_main_process
from dpokit.errors import ModelError
from dpokit.evaluate.inputs import Subject
from dpokit.model.load import name_model
from dpokit.model.reference import (
    PartScores,
    ReferenceCache,
    choose_spot_checks,
    describe_whole_scores,
    find_cache_folder,
    find_identity,
)
from dpokit.model.rounding import computes_in_fp32
from dpokit.model.score import LARGEST_IN_16_BIT, LARGEST_IN_FP32, PairScorer, count_scored

BATCH_PAIRS = 8


def score_all(scorer: PairScorer, rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Returns log-probs, `(2, pairs)`, fp64, on every rank. Ranks take turns.

    A batch holds pairs of similar length. Those of one prompt follow each other, as a batch computes it once.
    """
    state = PartialState()
    prompts, longest = [tuple(row["prompt_ids"]) for row in rows], Counter[tuple[int, ...]]()
    for prompt, row in zip(prompts, rows, strict=True):
        longest[prompt] = max(longest[prompt], sum(len(row[name]) for name in IDS))
    order = sorted(range(len(rows)), key=lambda at: (-longest[prompts[at]], prompts[at]))
    batches = [order[at : at + BATCH_PAIRS] for at in range(0, len(order), BATCH_PAIRS)]
    share = batches[state.process_index :: state.num_processes]
    table = torch.zeros(2, len(rows), dtype=torch.float64)
    for batch in track_progress(share, desc=f"scoring, {name}", unit="batch"):
        table[:, batch] = scorer([rows[at] for at in batch]).double()
    return add_ranks(table)


def score_base(
    subject: Subject, scorer: PairScorer, rows: Sequence[Mapping[str, Any]], token_ids: str, numbers: Sequence[int]
) -> np.ndarray:
    """Returns `score_all` of the base; log-probs of the cache of references are not computed again. Collective.

    Runs, searches and evaluations with the same base and pairs share them. Newly computed ones are added.

    Args:
        subject: the models; the base is in force.
        scorer: of the base.
        rows: the pairs.
        token_ids: the fingerprint of the pairs.
        numbers: row numbers of the pairs in the data.

    Raises: ModelError for log-probs that are not finite.
    """
    settings = replace(subject.settings, model=name_model(subject.settings, str(subject.base_name)))
    depends_on = decide_on_main_process(lambda: describe_whole_scores(find_identity(settings), token_ids))
    cache = ReferenceCache(find_cache_folder(), depends_on, len(rows))
    kept = decide_on_main_process(lambda: _read(cache))
    if not _are_equal_now(scorer, rows, kept):
        say("reference log-probs: the cache is of other weights; all are computed again")
        kept = {}
    missing = [part for part in cache.parts() if part.start not in kept]
    table = np.zeros((2, len(rows)))
    for start, log_probs in kept.items():
        table[:, start : start + log_probs.shape[1]] = log_probs.double().numpy()
    if kept:
        say(f"reference log-probs: {len(rows) - sum(map(len, missing)):,} of {len(rows):,} pairs were cached")
    if missing:
        places = [at for part in missing for at in part]
        table[:, places] = score_all(scorer, [rows[at] for at in places], "base")
        check_finite_log_probs(table, str(subject.base_name), numbers)
        is_exact = computes_in_fp32(scorer.model, scorer.model.device)
        decide_on_main_process(lambda: _write(cache, missing, table, is_exact=is_exact))
    return table


def _read(cache: ReferenceCache) -> dict[int, torch.Tensor]:
    """The cached log-probs, `(2, pairs)`, by the first pair of their part."""
    scores = {part.start: cache.read(part) for part in cache.parts()}
    return {start: part.log_probs for start, part in scores.items() if part is not None}


def _write(cache: ReferenceCache, parts: Sequence[range], table: np.ndarray, *, is_exact: bool) -> None:
    for part in parts:
        log_probs = torch.from_numpy(table[:, part.start : part.stop]).float()
        # A copy: of a part of one pair, safetensors would find the same memory twice.
        first = log_probs[:, 0].clone() if is_exact and cache.has_fp32(part) else torch.full((2,), torch.nan)
        cache.write(part, PartScores(log_probs, first))


def _are_equal_now(scorer: PairScorer, rows: Sequence[Mapping[str, Any]], kept: Mapping[int, torch.Tensor]) -> bool:
    """Whether cached log-probs of a few pairs equal those that the model computes now. Every rank computes them."""
    places = choose_spot_checks(sorted(kept))
    if not places:
        return True
    computed = scorer([rows[at] for at in places])
    cached = torch.stack([kept[at][:, 0] for at in places], dim=1)
    tokens = torch.tensor([[count_scored(rows[at], answer) for at in places] for answer in ("chosen", "rejected")])
    # Errors of tokens are about independent, so that of their sum grows with the root of their number.
    distance = float(((computed - cached).abs() / tokens.sqrt()).mean())
    is_exact = computes_in_fp32(scorer.model, scorer.model.device)
    is_equal = distance <= (LARGEST_IN_FP32 if is_exact else LARGEST_IN_16_BIT)
    return decide_on_main_process(lambda: is_equal)


def check_finite_log_probs(log_probs: np.ndarray, name: str, numbers: Sequence[int]) -> None:
    """Raises ModelError for NaN or infinite log-probs: such a pair has no loss, and means must not leave pairs out.

    Args:
        log_probs: `(2, pairs)`.
        name: of the model.
        numbers: row numbers of the pairs in the data.
    """
    bad = [number for number, finite in zip(numbers, np.isfinite(log_probs).all(0), strict=True) if not finite]
    if bad:
        raise ModelError(
            f"{name} gives log-probs that are not finite for {len(bad):,} of {len(numbers):,} held-out pairs, first "
            f"in rows {', '.join(map(str, bad[:5]))} (counted from 0)",
            expected="a number for each answer",
            do="--dtype float32; if that does not help, its weights are damaged: name an older checkpoint",
        )


def add_ranks(table: torch.Tensor) -> np.ndarray:
    """Returns the sum of the tables of all ranks, on every rank. Collective."""
    state = PartialState()
    if state.num_processes > 1:
        table = reduce(table.to(state.device), reduction="sum").cpu()
    return table.numpy()
