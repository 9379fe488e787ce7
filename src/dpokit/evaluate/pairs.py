"""Scores base and tuned model on held-out pairs: loss, accuracies, margin, drift, groups of pairs, verdict."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from trl import DPOConfig

from dpokit.data.columns import IDS, MASKS, fingerprint_ids, hash_prompts, read_column
from dpokit.evaluate.inputs import Subject
from dpokit.evaluate.log_probs import add_ranks, check_finite_log_probs, score_all, score_base
from dpokit.evaluate.measures import (
    Scores,
    compare_models,
    count_prompts,
    decide_verdict,
    describe_groups,
    name_bands,
    name_gap,
    summarize_scores,
)
from dpokit.model.score import PairScorer, count_scored, keep_scored

FORMAT = 1
DRIFT_TOKENS = 1024  # scored chosen tokens whose whole distributions are compared: each is as long as the vocabulary


def evaluate_pairs(subject: Subject, *, limit: int | None = None) -> dict[str, Any]:
    """Returns the content of pairs.json, the same on every rank and for any number of ranks. Collective.

    Args:
        subject: the models and the pairs.
        limit: only the first `limit` pairs are scored; None for all.

    Raises: ModelError for log-probs that are not finite; on every rank.
    """
    held_out = subject.held_out
    pairs = held_out.pairs.select(range(min(limit or len(held_out.pairs), len(held_out.pairs))))
    rows = pairs.select_columns([*IDS, *MASKS]).to_list()
    prompts, fingerprint = hash_prompts(pairs), fingerprint_ids([pairs])
    has_base = subject.base_name is not None
    pad_id = int(subject.tokenizer.pad_token_id)
    tuned = PairScorer(subject.tuned, pad_id=pad_id, longest=subject.longest)
    base = tuned if subject.base is None else PairScorer(subject.base, pad_id=pad_id, longest=subject.longest)
    scores = Scores(score_all(tuned, rows, "tuned"), None, count_answer_tokens(rows))
    numbers = read_column(pairs, "row")
    check_finite_log_probs(scores.tuned, subject.tuned_name, numbers)
    drift = None
    if has_base:
        with subject.as_base():
            scores.base = score_base(subject, base, rows, fingerprint, numbers)
        drift = measure_drift(subject, rows)
    beta = float(getattr(subject.settings.training, "beta", DPOConfig.beta))  # a supervised run has no beta
    record: dict[str, Any] = {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "name": held_out.tally.source,
            "own": subject.own_data,
            "pairs": len(rows),
            "available": len(held_out.pairs),
            **count_prompts(prompts),
            "fingerprint": fingerprint,
        },
        "changed": subject.changed,
        "beta": beta,
        **summarize_scores(scores, drift, prompts, beta=beta),
    }
    record["tuned"]["model"] = subject.tuned_name
    if has_base:
        record["base"]["model"] = subject.base_name
        columns = compare_models(scores, beta=beta)
        kinds = {
            "source": held_out.sources[: len(rows)],
            "prompt tokens": name_bands([len(row["prompt_ids"]) for row in rows]),
            "turns": [str(number) if number < 4 else "4 or more" for number in held_out.turns[: len(rows)]],
            "length gap": [name_gap(chosen, rejected) for chosen, rejected in scores.tokens.T],
        }
        record["groups"] = describe_groups(columns, kinds, prompts)
        record["verdict"] = decide_verdict(record)
    return record


def count_answer_tokens(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns the number of scored tokens of each answer, `(2, pairs)`: chosen, rejected."""
    return np.array([[count_scored(row, answer) for row in rows] for answer in ("chosen", "rejected")])


@torch.no_grad()
def measure_drift(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns KL(tuned || base) of the next token, averaged over a chosen answer's scored tokens: `(pairs,)`, nats.

    NaN for pairs that were not selected: the comparison takes the whole distributions of both models, at about
    `DRIFT_TOKENS` positions spread over the pairs. The answers are those of the data, not sampled ones.
    """
    state, drift = PartialState(), torch.zeros(2, len(rows), dtype=torch.float64)
    selected = find_drift_pairs([count_scored(row, "chosen") for row in rows])
    for at in selected[state.process_index :: state.num_processes]:
        row = rows[at]
        ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]], device=subject.tuned.device)
        positions = len(row["chosen_ids"]) + 1
        logits = [find_logits(subject.tuned, ids, positions)]
        with subject.as_base() as model:
            logits.append(find_logits(model, ids, positions))
        # LM heads may have more rows than the tokenizer has tokens, and not the same number in both models.
        vocabulary = min(side.shape[-1] for side in logits)
        tuned, base = (side[:, :vocabulary].log_softmax(-1) for side in logits)
        divergences = keep_scored((tuned.exp() * (tuned - base)).sum(-1), row, "chosen")
        drift[:, at] = torch.stack([divergences.mean().double().cpu(), torch.tensor(1.0)])
    total = add_ranks(drift)
    return np.where(total[1] > 0, total[0], np.nan)


def find_logits(model: Any, ids: torch.Tensor, positions: int) -> torch.Tensor:
    """Returns the logits of a row's last `positions` without the final one: `(positions - 1, head rows)`, fp32."""
    logits: torch.Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=positions
    ).logits
    return logits[0, :-1].float()


def find_drift_pairs(lengths: Sequence[int]) -> list[int]:
    """Returns indices of pairs, evenly spread, whose answers have about `DRIFT_TOKENS` scored tokens in all."""
    number = max(1, min(len(lengths), round(DRIFT_TOKENS * len(lengths) / max(sum(lengths), 1))))
    return sorted({len(lengths) * at // number for at in range(number)})
