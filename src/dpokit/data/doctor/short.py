"""The short form of the check, at the start of every run: what costs no pass over the texts. No torch."""

import numpy as np
from datasets import Dataset

from dpokit.data.columns import count_tokens
from dpokit.data.doctor.shortcuts import measure_scores


def describe_length_bias(train: Dataset) -> list[str]:
    """Returns a finding if always taking the longer answer, or the shorter one, is right in most training pairs.

    Args:
        train: columns `chosen_ids` and `rejected_ids`; only their lengths are read.
    """
    chosen, rejected = (np.asarray(count_tokens(train, (name,))) for name in ("chosen_ids", "rejected_ids"))
    for side, differences in (("longer", chosen - rejected), ("shorter", rejected - chosen)):
        accuracy = measure_scores(differences)
        if accuracy.is_certain:
            return [
                f"always taking the {side} answer is right in {accuracy.value:.0%} of {accuracy.pairs:,} training "
                "pairs, so the model may learn a length: --ld_alpha 0.5 weighs the tokens beyond the shorter answer "
                "less, and `dpokit data check` looks for other shortcuts"
            ]
    return []
