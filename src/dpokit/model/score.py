"""Computes answer log-probs, for all of dpokit: TRL's fused head at answer positions only, with shared prompts."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpokit.console import say
from dpokit.model.rounding import computes_in_fp32, is_refusal, try_in_fp32
from dpokit.model.shared_prefix import NAME, ScoredOnly, SharedPrefix

# With Triton kernels TRL's head scores answer positions only; without them it scores all, so that shapes stay the same
# for compilers of other devices (trl/trainer/utils.py, `add_fused_lm_head`, 1.16). On a CPU nothing is compiled for a
# shape, and most positions are prompts. A packed batch has answer positions only, so that nothing is left to select.
# Delete when TRL selects answer positions on CPU, and takes their indices.
_uses_triton = trl_utils._use_triton
trl_utils._use_triton = lambda device: not ScoredOnly.now and (device.type == "cpu" or _uses_triton(device))

# Mean distance of two forward passes in fp32, in nats a token. Measured on SmolLM2-135M and real pairs: at most 3e-6
# for correct passes; 3e-2 to 7 for wrong positions, masks, labels or adapters, and for weights changed by 1 %.
LARGEST_IN_FP32 = 5e-4
# The same in 16 bits, where a model cannot compute in fp32; it finds large errors only. Measured: 3e-2 to 5e-2, and
# more for few tokens. Wrong masks and labels differ by 0.6 to 7.
LARGEST_IN_16_BIT = 3e-1
ROUNDING_16_BIT = 5e-2  # where it cannot be measured

PROOF_PAIRS = 2  # of the first batch; more would cost more than shared prompts save in a small evaluation
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
LAYERS = {"full_attention", "sliding_attention"}


def find_dropout(model: nn.Module) -> bool:
    """Returns whether a training forward is random.

    `disable_dropout` only changes dropout modules, so this also reads the rates that other modules keep as attributes.
    """
    for module in model.modules():
        rates = [value for name, value in vars(module).items() if "drop" in name or "jitter" in name]
        rates += [module.p] if isinstance(module, DROPOUTS) else []
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


def find_obstacle(model: PreTrainedModel | PeftModel, longest: int | None) -> str | None:
    """Returns why a model cannot share prompts; None if no reason is known (the first batch is checked as well).

    Args:
        longest: most tokens of a row; None if unknown.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "the adapter adds tokens before the prompt"
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or LAYERS)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    implementation = model.config._attn_implementation
    if find_dropout(model):
        return "dropout is on, and the answers of a pair must not share a dropout mask"
    if hasattr(model.config, "vision_config"):
        return "the model takes images"
    if not layers <= LAYERS:
        return f"the model has layers of kind {', '.join(sorted(layers - LAYERS))}"
    if window is not None and "sliding_attention" in layers and (longest is None or longest > window):
        return f"its sliding window of {window:,} tokens is shorter than the longest row"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps the scores"
    if implementation not in ("sdpa", NAME):
        return f"attn_implementation is {implementation}, not sdpa"
    return None


def find_mask(row: Mapping[str, Any], answer: str) -> Sequence[int]:
    """Returns 1 for each scored token of a row's `chosen` or `rejected` answer and 0 for others; empty if all are."""
    return row.get(f"{answer}_mask") or ()


def count_scored(row: Mapping[str, Any], answer: str) -> int:
    """Returns the number of scored tokens of a row's `chosen` or `rejected` answer."""
    mask = find_mask(row, answer)
    return sum(mask) if mask else len(row[f"{answer}_ids"])


def take_first_turn(row: Mapping[str, Any]) -> list[int]:
    """Returns the tokens of the chosen answer before the first unscored one; none if it begins with a user's turn."""
    mask, ids = find_mask(row, "chosen"), row["chosen_ids"]
    return list(ids[: mask.index(0)] if 0 in mask else ids)


def keep_scored(values: torch.Tensor, row: Mapping[str, Any], answer: str) -> torch.Tensor:
    """Returns the values of the scored tokens, of one value for each token of a row's `chosen` or `rejected` answer."""
    mask = find_mask(row, answer)
    return values[torch.tensor(mask, dtype=torch.bool, device=values.device)] if mask else values


class ScoredTokenCollator:
    """TRL's collator, for rows that may have masks: `completion_mask` is 1 for the scored tokens of an answer.

    Args:
        pad_id: pads rows on the right.
        pad_to_multiple_of: of the width of a batch.
    """

    def __init__(self, pad_id: int, pad_to_multiple_of: int | None = None) -> None:
        # Pairs are truncated when they are tokenised, so the collator has no maximum length.
        self._pad = DataCollatorForPreference(pad_token_id=pad_id, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a batch as `score_tokens` takes it: the chosen rows, then the rejected ones."""
        batch: dict[str, Any] = self._pad([dict(row) for row in rows])
        for number, row in enumerate(rows):
            begin = len(row["prompt_ids"])
            for place, answer in ((number, "chosen"), (number + len(rows), "rejected")):
                if mask := find_mask(row, answer):
                    end = begin + len(row[f"{answer}_ids"])
                    batch["completion_mask"][place, begin:end] = torch.tensor(mask)
        return batch


def share_prefix(model: PreTrainedModel | PeftModel) -> SharedPrefix:
    """Enables the packed forward of a model with TRL's fused head. Raises: ValueError if the model cannot use it."""
    return SharedPrefix(model.get_base_model() if isinstance(model, PeftModel) else model)


def score_batch(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns each row's answer log-prob, summed over tokens: `(2 pairs,)`, fp32; arguments as `score_tokens`."""
    return score_tokens(model, batch).sum(dim=1)


def score_tokens(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the log-probs of each row's answer tokens: `(2 pairs, width - 1)`, fp32; the chosen rows come first.

    A token's log-prob is at the position that predicts it; all other positions hold 0.

    Args:
        model: with TRL's fused head; packs the batch if its `SharedPrefix` is on.
        batch: `input_ids`, `attention_mask`, `completion_mask`, each `(2 pairs, width)`; `packed`, the layout of the
            batch, if a packing model need not compute it.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        fused_lm_head=True,
        use_cache=False,
        **{name: batch[name] for name in ("packed",) if name in batch},
    )
    log_probs: torch.Tensor = outputs.log_probs.float()
    return log_probs


def score_in_fp32(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Returns `score_tokens` computed in fp32; None as `try_in_fp32`."""
    return try_in_fp32(model, batch["input_ids"].device, lambda: score_tokens(model, batch))


def find_distance(left: torch.Tensor, right: torch.Tensor, scored: torch.Tensor) -> float:
    """Returns the mean distance of two results of `score_tokens`, in nats a token; `scored` is 1 for scored tokens."""
    return float(((left - right).abs() * scored).sum() / scored.sum().clamp(min=1))


@dataclass(frozen=True)
class Proof:
    """What the first pairs of a run show.

    Attributes:
        mismatch: why their packed rows are not computed as padded ones are; None if they are, or were not packed.
        rounding: mean distance of their log-probs from those in fp32, in nats a token; a usual one if it is unknown.
    """

    mismatch: str | None
    rounding: float


@torch.no_grad()
def prove(
    model: Any, shared: SharedPrefix | None, batch: Mapping[str, torch.Tensor], *, is_exact: bool = False
) -> Proof:
    """Scores the first pairs of a batch in the model's precision and in fp32, padded and packed, and compares them.

    In fp32 packed and padded rows are equal up to millionths; a difference shows a wrong position, mask or label. In
    the model's precision, where another kernel may run, packed rows must be as close to fp32 as padded ones are.

    Args:
        shared: the packed forward of the model; None proves nothing and measures the rounding.
        is_exact: whether the model's precision is fp32; then no row is scored twice.
    """
    pairs = len(batch["input_ids"]) // 2
    kept = min(pairs, PROOF_PAIRS)
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = {name: torch.cat([batch[name][:kept], batch[name][pairs : pairs + kept]]) for name in names}
    scored = batch["completion_mask"][:, 1:]
    with shared.switched_off() if shared else nullcontext():
        padded = score_tokens(model, batch)
        exact = padded if is_exact else score_in_fp32(model, batch)
    rounding = ROUNDING_16_BIT if exact is None else find_distance(padded, exact, scored)
    if shared is None:
        return Proof(None, rounding)
    packed, refusal = None, ""
    try:
        packed = score_tokens(model, batch)
    except Exception as error:
        if not is_refusal(error):
            raise
        refusal = f"its forward does not accept a packed batch ({' '.join(str(error).split())[:120]})"
    # Also after a refusal: each rank computes equally often.
    exact_packed = packed if is_exact else score_in_fp32(model, batch)
    if packed is None:
        return Proof(refusal, rounding)
    if not shared.attended:
        return Proof("no layer of the model uses the packed layout", rounding)
    # Per comparison: the distance, its limit, and with what the packed rows are compared.
    comparisons = [(find_distance(packed, padded, scored), LARGEST_IN_16_BIT, "padded rows")]
    if exact is not None and exact_packed is not None:
        comparisons = [
            (find_distance(exact_packed, exact, scored), LARGEST_IN_FP32, "padded rows, both in fp32"),
            (find_distance(packed, exact, scored), max(3 * rounding, LARGEST_IN_16_BIT), "padded rows in fp32"),
        ]
    for distance, limit, other in comparisons:
        if not distance <= limit:
            mismatch = f"the first pairs' log-probs differ by {distance:.1e} nats a token from those of {other}"
            return Proof(mismatch, rounding)
    return Proof(None, rounding)


class PairScorer:
    """Scores tokenised pairs outside training; shares prompts if the model can and its first batch confirms it.

    Args:
        model: a causal LM, also with an adapter; put into evaluation mode, with its dropout disabled permanently.
        pad_id: pads rows that are not packed.
        longest: most tokens of a row; None if unknown.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, pad_id: int, longest: int | None) -> None:
        self.model = model.eval()
        trl_utils.disable_dropout_in_model(model)
        trl_utils.add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)
        self._collate = ScoredTokenCollator(pad_id)
        self._shared: SharedPrefix | None = None
        self._is_checked = False
        reason = find_obstacle(model, longest)
        if reason is None:
            self._shared = share_prefix(model)
        else:
            say(f"shared prefix: off, as {reason}")

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Returns the answers' log-probs, summed over tokens: `(2, pairs)`, fp32, on the CPU; chosen, rejected.

        Args:
            pairs: with `prompt_ids`, `chosen_ids`, `rejected_ids`; masks if some tokens are not scored.
        """
        return self.score_tokens(pairs).sum(dim=2)

    @torch.no_grad()
    def score_tokens(self, pairs: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Returns each answer token's log-prob, as `score_tokens` does: `(2, pairs, width - 1)`, fp32, on the CPU.

        Args:
            pairs: with `prompt_ids`, `chosen_ids`, `rejected_ids`; masks if some tokens are not scored.
        """
        if self._shared is not None and not self._is_checked:
            self._check(self._shared, self._batch(pairs[:PROOF_PAIRS]))
        log_probs = score_tokens(self.model, self._batch(pairs)).cpu()
        return log_probs.reshape(2, len(pairs), -1)

    def _batch(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: values.to(self.model.device) for name, values in self._collate(pairs).items()}

    def _check(self, shared: SharedPrefix, batch: Mapping[str, torch.Tensor]) -> None:
        is_exact = computes_in_fp32(self.model, self.model.device)
        mismatch = prove(self.model, shared, batch, is_exact=is_exact).mismatch
        self._is_checked = True
        if mismatch is not None:
            shared.on = False
            say(f"shared prefix: off, as {mismatch}")
