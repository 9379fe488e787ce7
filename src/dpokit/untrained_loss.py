"""What is known of TRL's losses before any training. No torch."""

import math
from collections.abc import Collection, Sequence

LN_2 = math.log(2)
# Losses that are ln 2 where policy and reference agree, under every f-divergence.
LN_2_LOSSES = {"sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"}


def find_untrained_loss(
    kinds: Collection[str], weights: Sequence[float] | None = None, *, use_weighting: bool = False
) -> float | None:
    """The loss of a policy that still is its reference: ln 2 by the weights; None where pairs have a say in it.

    Args:
        kinds: `loss_type`.
        weights: `loss_weights`; None is 1 each.
        use_weighting: WPO's weights come on top, and depend on the pairs.
    """
    if not set(kinds) <= LN_2_LOSSES or use_weighting:
        return None
    return sum(weights or [1.0] * len(kinds)) * LN_2
