"""Histograms of lengths, and what each length limit would cut. No torch."""

from typing import Any

import numpy as np

from dpokit.data.shorten import LengthLimits

LIMITS = (512, 1024, 2048, 4096, 8192)  # tokens
BINS = 40


def count_bins(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the histograms of several arrays over the same bins, up to the 99th percentile of all.

    Returns: `edges`, the beginning of each bin; `over`, the number of values beyond the last one; and for each name the
        counts.
    """
    joined = np.concatenate(list(values.values()))
    if not len(joined):
        return {}
    low, high = min(0.0, float(np.percentile(joined, 1))), max(float(np.percentile(joined, 99)), 1.0)
    edges = np.unique(np.floor(np.linspace(low, high, BINS + 1)))
    counts = {name: np.histogram(array, edges)[0].tolist() for name, array in values.items()}
    over = int(((joined < edges[0]) | (joined > edges[-1])).sum())
    return {"edges": edges[:-1].astype(int).tolist(), "over": over, "counts": counts}


def measure_cuts(tokens: np.ndarray, limits: LengthLimits) -> dict[str, Any]:
    """Returns what length limits would do to pairs.

    Args:
        tokens: of prompt, chosen and rejected answer, (pairs, 3).
        limits: the limits.

    Returns: `max_length`; `cut`, the share of pairs that lose a token; `prompt` and `answer`, the shares of all tokens
        of prompts and of answers that are lost.
    """
    prompts, chosen, rejected = tokens.T
    longer = np.maximum(chosen, rejected)
    kept = [limits.fit(int(prompt), int(answer)) for prompt, answer in zip(prompts, longer, strict=True)]
    kept_prompts, kept_answers = np.asarray(kept, dtype=np.int64).reshape(-1, 2).T
    lost_prompts = prompts - kept_prompts
    lost_answers = np.maximum(chosen - kept_answers, 0) + np.maximum(rejected - kept_answers, 0)
    is_cut = (lost_prompts > 0) | (lost_answers > 0)
    return {
        "max_length": limits.total_tokens,
        "cut": float(is_cut.mean()) if len(prompts) else 0.0,
        "prompt": float(lost_prompts.sum() / max(prompts.sum(), 1)),
        "answer": float(lost_answers.sum() / max((chosen + rejected).sum(), 1)),
    }
