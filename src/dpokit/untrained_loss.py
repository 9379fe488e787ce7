"""The value of TRL's losses before any training. No torch."""

import math
from collections.abc import Collection, Sequence

LN_2 = math.log(2)
# Losses that are ln 2 if policy and reference agree, under every f-divergence.
LN_2_LOSSES = {"sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"}


def find_untrained_loss(
    kinds: Collection[str], weights: Sequence[float] | None = None, *, use_weighting: bool = False
) -> float | None:
    """The loss while policy and reference are equal: ln 2 times the weights; None if the loss depends on the pairs.

    Args:
        kinds: `loss_type`.
        weights: `loss_weights`; None means 1 for each loss.
        use_weighting: whether WPO's weights, which depend on the pairs, are applied.
    """
    if not set(kinds) <= LN_2_LOSSES or use_weighting:
        return None
    return sum(weights or [1.0] * len(kinds)) * LN_2
