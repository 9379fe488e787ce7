"""The range of each numeric flag: a value outside of it is refused before anything is loaded. No torch.

A numeric flag without a row only needs a finite value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from dpokit.errors import SettingsError

MOST_PROCESSES = 1024
MOST_SEED = 2**32 - 1  # numpy's limit


@dataclass(frozen=True)
class Bound:
    """A range of numbers.

    Attributes:
        least, most: its ends.
        without_least, without_most: whether the range excludes that end.
        besides: a number outside the range that is also allowed.
        why: an explanation, if the flag's name does not explain the range.
    """

    least: float = -math.inf
    most: float = math.inf
    without_least: bool = False
    without_most: bool = False
    besides: float | None = None
    why: str = ""

    def holds(self, number: float) -> bool:
        """Whether the number is finite and in the range."""
        if number == self.besides:
            return True
        above = number > self.least if self.without_least else number >= self.least
        below = number < self.most if self.without_most else number <= self.most
        return math.isfinite(number) and above and below

    def describe(self) -> str:
        """The range as a phrase, such as `a number above 0 and at most 1`."""
        limits = [] if self.least == -math.inf else [f"{'above' if self.without_least else 'at least'} {self.least:g}"]
        limits += [] if self.most == math.inf else [f"{'below' if self.without_most else 'at most'} {self.most:,g}"]
        limits = limits or ["finite"]
        also = "" if self.besides is None else f", or {self.besides:g}"
        return f"a number {' and '.join(limits)}{also}" + (f" ({self.why})" if self.why else "")


ONE_OR_MORE, ZERO_OR_MORE, POSITIVE = Bound(1), Bound(0), Bound(0, without_least=True)
SHARE, SHARE_BELOW_1 = Bound(0, 1), Bound(0, 1, without_most=True)
SEED, PROCESSES = Bound(0, MOST_SEED), Bound(1, MOST_PROCESSES)

BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "max_pairs_per_source"), ONE_OR_MORE),
    **dict.fromkeys(("max_prompt_length", "max_completion_length", "precompute_ref_batch_size"), ONE_OR_MORE),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), ONE_OR_MORE),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "ref_model_sync_steps"), ONE_OR_MORE),
    **dict.fromkeys(("ddp_timeout", "ddp_bucket_cap_mb", "torch_empty_cache_steps"), ONE_OR_MORE),
    "dataloader_prefetch_factor": ONE_OR_MORE,
    "eval_fraction": Bound(0, 1, without_least=True, without_most=True),
    "eval_answers": Bound(0, 10_000),
    "max_length": Bound(2, why="a token of the prompt and one of the answer"),
    # A longer run never ends: 10**9 steps take a year at 30 a second.
    "max_steps": Bound(1, 10**9, besides=-1, why="-1 counts by epochs"),
    "num_train_epochs": Bound(0, 10**5, without_least=True),
    **dict.fromkeys(("learning_rate", "beta", "discopop_tau", "adam_epsilon"), POSITIVE),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), POSITIVE),
    **dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm", "eval_delay"), ZERO_OR_MORE),
    **dict.fromkeys(("min_score_gap", "max_length_gap"), ZERO_OR_MORE),
    **dict.fromkeys(("save_before_seconds", "neftune_noise_alpha", "router_aux_loss_coef"), ZERO_OR_MORE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout", "label_smoothing_factor"), SHARE_BELOW_1),
    "label_smoothing": Bound(0, 0.5, without_most=True, why="the share of pairs whose labels are wrong"),
    **dict.fromkeys(("ld_alpha", "ref_model_mixup_alpha", "prompt_share"), SHARE),
    **dict.fromkeys(("seed", "data_seed", "mixture_seed"), SEED),
    "dataset_num_proc": PROCESSES,
    "dataloader_num_workers": Bound(0, MOST_PROCESSES),
    "lora_r": Bound(1, 2**14),
    "lora_alpha": ONE_OR_MORE,
}


def check_date(values: Mapping[str, Any]) -> None:
    """Raises SettingsError for a `template_date` that is no date."""
    written = values.get("template_date")
    try:
        if written is not None and date.fromisoformat(written).isoformat() != written:
            raise ValueError(written)  # another form of ISO 8601
    except (TypeError, ValueError):
        raise SettingsError(
            f"template_date is {written}", expected="a date such as 2026-11-29", do="correct --template_date"
        ) from None


def check_bounds(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raises SettingsError for a number out of its range.

    Args:
        values: typed settings by name.
        origins: the layer that set each of them.
    """
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            bound = BOUNDS.get(name, Bound())
            if not bound.holds(number):
                raise SettingsError(
                    f"{origins.get(name, 'a default')}: {name} is {number}",
                    expected=bound.describe(),
                    do=f"correct --{name}, or leave it out",
                )
