"""The pairs of a step do not depend on how they are split; each share has about the same number of tokens."""

import random

import pytest
from datasets import Dataset

from dpokit.data.columns import count_tokens
from dpokit.train.batches import Batches

LENGTHS = random.Random(7).choices(range(20, 500), k=203)


def steps_of(batches: Batches, cells: int) -> list[list[list[int]]]:
    """The shares of each whole step."""
    shares = list(batches)
    return [shares[at : at + cells] for at in range(0, len(shares) - cells + 1, cells)]


@pytest.mark.parametrize(("ranks", "micro", "per_device"), [(1, 8, 2), (2, 4, 2), (4, 1, 4), (8, 2, 1)])
def test_a_step_holds_the_same_pairs_on_any_number_of_ranks(ranks, micro, per_device):
    single = Batches(203, per_device=16, world_size=1, seed=3, lengths=LENGTHS)
    many = Batches(203, per_device=per_device, world_size=ranks, micro_batches=micro, seed=3, lengths=LENGTHS)
    for whole, shares in zip(list(single)[:12], steps_of(many, ranks * micro)[:12], strict=True):
        assert sorted(whole) == sorted(pair for share in shares for pair in share)
        assert {len(share) for share in shares} == {per_device}
    assert len(list(many)) == len(many)
    assert sorted(pair for batch in many for pair in batch if pair >= 0) == list(range(203))


def test_shares_have_about_the_same_number_of_tokens():
    balanced, ordered = (
        Batches(203, per_device=4, world_size=4, micro_batches=2, seed=3, lengths=lengths)
        for lengths in (LENGTHS, None)
    )

    def unevenness(batches: Batches) -> float:
        tokens = [[sum(LENGTHS[pair] for pair in share) for share in shares] for shares in steps_of(batches, 8)[:6]]
        return max(max(step) / (sum(step) / len(step)) for step in tokens)

    assert unevenness(balanced) < 1.08
    assert unevenness(ordered) > 1.2


def test_ranks_without_a_pair_get_a_dummy():
    batches = Batches(9, per_device=2, world_size=4, seed=0, lengths=LENGTHS[:9])
    assert sorted(sum(pair >= 0 for pair in batch) for batch in list(batches)[4:]) == [0, 0, 0, 1]


def test_a_prompt_counts_once():
    rows = Dataset.from_list([{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6]}] * 2)
    assert count_tokens(rows.select([1])) == [6]
