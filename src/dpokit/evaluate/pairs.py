"""Base beside tuned on held-out pairs: loss, accuracies, margin, drift, and what they hide."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from trl import DPOConfig

from dpokit.console import track_progress
from dpokit.data.columns import fingerprint_ids, hash_prompts, read_column
from dpokit.errors import ModelError
from dpokit.evaluate.inputs import Subject
from dpokit.evaluate.measures import Scores, compare, describe, describe_groups, judge, name_bands, name_gap
from dpokit.model.score import PairScorer

FORMAT = 1
BATCH_PAIRS = 8
DRIFT_TOKENS = 1024  # chosen tokens whose whole distributions are compared: a vocabulary each


def evaluate_pairs(subject: Subject, *, limit: int | None = None) -> dict[str, Any]:
    """What eval/pairs.json holds, the same on every rank and for every number of ranks. Collective.

    Args:
        subject: the models and the pairs.
        limit: of the pairs, the first so many.

    Raises: ModelError for log-probs that are not finite; on every rank.
    """
    held_out = subject.held_out
    pairs = held_out.pairs.select(range(min(limit or len(held_out.pairs), len(held_out.pairs))))
    rows = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()
    prompts = hash_prompts(pairs)
    has_base = subject.base_name is not None
    pad_id = int(subject.tokenizer.pad_token_id)
    tuned = PairScorer(subject.tuned, pad_id=pad_id, longest=subject.longest)
    base = tuned if subject.base is None else PairScorer(subject.base, pad_id=pad_id, longest=subject.longest)
    scores = Scores(score_all(tuned, rows, "tuned"), None, count_answer_tokens(rows))
    numbers = read_column(pairs, "row")
    check_finite(scores.tuned, subject.tuned_name, numbers)
    drift = None
    if has_base:
        with subject.as_base():
            scores.base = score_all(base, rows, "base")
        check_finite(scores.base, str(subject.base_name), numbers)
        drift = measure_drift(subject, rows)
    beta = float(getattr(subject.settings.training, "beta", DPOConfig.beta))  # a supervised run has none of its own
    record: dict[str, Any] = {
        "format": FORMAT,
        "data": {
            "name": held_out.tally.source,
            "own": subject.own_data,
            "pairs": len(rows),
            "prompts": len(set(prompts)),
            "fingerprint": fingerprint_ids([pairs]),
        },
        "beta": beta,
        **describe(scores, drift, prompts, beta=beta),
    }
    record["tuned"]["model"] = subject.tuned_name
    if has_base:
        record["base"]["model"] = subject.base_name
        columns = compare(scores, beta=beta)
        kinds = {
            "source": held_out.sources[: len(rows)],
            "prompt tokens": name_bands([len(row["prompt_ids"]) for row in rows]),
            "turns": [str(number) if number < 4 else "4 or more" for number in held_out.turns[: len(rows)]],
            "length gap": [name_gap(chosen, rejected) for chosen, rejected in scores.tokens.T],
        }
        record["groups"] = describe_groups(columns, kinds, prompts)
        record["verdict"] = judge(record)
    return record


def score_all(scorer: PairScorer, rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """`(2, pairs)`, fp64, the same on every rank: batches are made of pairs of like length and dealt in turn."""
    state = PartialState()
    order = sorted(range(len(rows)), key=lambda at: -sum(len(ids) for ids in rows[at].values()))
    batches = [order[at : at + BATCH_PAIRS] for at in range(0, len(order), BATCH_PAIRS)]
    mine = batches[state.process_index :: state.num_processes]
    table = torch.zeros(2, len(rows), dtype=torch.float64)
    for places in track_progress(mine, desc=f"scoring, {name}", unit="batch"):
        table[:, places] = scorer([rows[place] for place in places]).double()
    return _add_ranks(table)


def check_finite(log_probs: np.ndarray, name: str, numbers: Sequence[int]) -> None:
    """Raises ModelError for pairs with a NaN or an infinity: their loss is none, and a mean without them is no mean.

    Args:
        log_probs: `(2, pairs)`.
        name: of the model.
        numbers: of the pairs' rows in the data.
    """
    lost = [number for number, sound in zip(numbers, np.isfinite(log_probs).all(0), strict=True) if not sound]
    if lost:
        raise ModelError(
            f"{name} gives log-probs that are not finite for {len(lost):,} of {len(numbers):,} held-out pairs, first "
            f"in rows {', '.join(map(str, lost[:5]))} (counted from 0)",
            expected="a number for each answer",
            do="--dtype float32; if that does not help, its weights are damaged: name an older checkpoint",
        )


def count_answer_tokens(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """`(2, pairs)`: chosen, rejected."""
    return np.array([[len(row[name]) for row in rows] for name in ("chosen_ids", "rejected_ids")])


@torch.no_grad()
def measure_drift(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """KL(tuned || base) of the next token, averaged over a chosen answer's positions: `(pairs,)`, nats.

    NaN for pairs that were not looked at: whole distributions of both models are compared, at about `DRIFT_TOKENS`
    positions spread over the pairs. The mean is that of the answers the data holds, not of sampled ones.
    """
    state, drift = PartialState(), torch.zeros(2, len(rows), dtype=torch.float64)
    taken = find_drift_pairs([len(row["chosen_ids"]) for row in rows])
    for at in taken[state.process_index :: state.num_processes]:
        row = rows[at]
        ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]], device=subject.tuned.device)
        positions = len(row["chosen_ids"]) + 1
        logits = [find_logits(subject.tuned, ids, positions)]
        with subject.as_base() as model:
            logits.append(find_logits(model, ids, positions))
        # Models of one tokenizer may have rows behind its last token, one more of them than the other.
        words = min(side.shape[-1] for side in logits)
        tuned, base = (side[:, :words].log_softmax(-1) for side in logits)
        drift[:, at] = torch.stack([(tuned.exp() * (tuned - base)).sum(-1).mean().double().cpu(), torch.tensor(1.0)])
    total = _add_ranks(drift)
    return np.where(total[1] > 0, total[0], np.nan)


def find_logits(model: Any, ids: torch.Tensor, positions: int) -> torch.Tensor:
    """Of every next token at a row's last positions but one: `(positions - 1, rows of the head)`, fp32."""
    logits: torch.Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=positions
    ).logits
    return logits[0, :-1].float()


def find_drift_pairs(lengths: Sequence[int]) -> list[int]:
    """Pairs spread evenly over all, whose answers have about `DRIFT_TOKENS` tokens together."""
    number = max(1, min(len(lengths), round(DRIFT_TOKENS * len(lengths) / max(sum(lengths), 1))))
    return sorted({len(lengths) * at // number for at in range(number)})


def _add_ranks(table: torch.Tensor) -> np.ndarray:
    state = PartialState()
    if state.num_processes > 1:
        table = reduce(table.to(state.device), reduction="sum").cpu()
    return table.numpy()
