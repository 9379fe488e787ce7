"""The pairs of a step do not depend on how they are split; each share has about the same number of tokens."""

import math
import random
from collections import Counter
from collections.abc import Iterable

import pytest
from datasets import Dataset

from dpokit.data.columns import count_tokens
from dpokit.train.batches import Batches, Prompts

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


def make_prompts(sizes: Iterable[int], *, seed: int = 0) -> Prompts:
    """The prompts of pairs in a random order; `sizes` are the numbers of pairs of each prompt."""
    keys = [number for number, size in enumerate(sizes) for _ in range(size)]
    random.Random(seed).shuffle(keys)
    return Prompts(keys, [10 + 7 * (key % 30) for key in keys])


def make_lengths(prompts: Prompts) -> list[int]:
    """Tokens of each pair: of its prompt, and of two answers."""
    choose = random.Random(1)
    return [prompt + choose.randrange(20, 300) for prompt in prompts.lengths]


SPLITS = [(1, 1, 16), (1, 8, 2), (2, 4, 2), (4, 1, 4), (8, 2, 1)]  # ranks, micro-batches, pairs of one rank
SIZES = {
    "four pairs a prompt": [4] * 50,
    "one to nine pairs a prompt": [1 + number % 9 for number in range(40)],
    "one prompt in many": [30, *[1] * 170],
    "one prompt alone": [40],
}


@pytest.mark.parametrize(("ranks", "micro", "per_device"), SPLITS)
def test_different_prompts_are_dealt_as_without_grouping(ranks, micro, per_device):
    shape = {"per_device": per_device, "world_size": ranks, "micro_batches": micro, "seed": 3, "lengths": LENGTHS}
    plain, grouped = Batches(203, **shape), Batches(203, **shape, prompts=make_prompts([1] * 203))
    for epoch in range(3):
        plain.set_epoch(epoch)
        grouped.set_epoch(epoch)
        assert list(grouped) == list(plain)


@pytest.mark.parametrize(("ranks", "micro", "per_device"), SPLITS)
@pytest.mark.parametrize("case", SIZES)
def test_each_pair_is_dealt_once_in_batches_of_the_same_sizes(case, ranks, micro, per_device):
    prompts = make_prompts(SIZES[case])
    pairs = len(prompts.keys)
    shape = {"per_device": per_device, "world_size": ranks, "micro_batches": micro, "seed": 3}
    plain = Batches(pairs, **shape, lengths=make_lengths(prompts))
    grouped, again = (Batches(pairs, **shape, lengths=make_lengths(prompts), prompts=prompts) for _ in range(2))
    single = Batches(pairs, per_device=16, world_size=1, seed=3, lengths=make_lengths(prompts), prompts=prompts)
    orders = []
    for epoch in range(2):
        for batches in (plain, grouped, again, single):
            batches.set_epoch(epoch)
        batches = list(grouped)
        assert list(again) == batches
        assert [len(batch) for batch in batches] == [len(batch) for batch in plain]
        assert sorted(pair for batch in batches for pair in batch if pair >= 0) == list(range(pairs))
        for whole, shares in zip(list(single)[: pairs // 16], steps_of(grouped, ranks * micro), strict=False):
            assert sorted(whole) == sorted(pair for share in shares for pair in share), "the step of any split"
        orders.append(batches)
    assert orders[0] != orders[1]


def test_pairs_of_a_prompt_meet_in_one_micro_batch():
    prompts = make_prompts([4] * 50)
    grouped = Batches(
        200, per_device=8, world_size=2, micro_batches=2, seed=3, lengths=make_lengths(prompts), prompts=prompts
    )
    for batch in list(grouped)[:24]:
        assert len({prompts.keys[pair] for pair in batch}) == 2


@pytest.mark.parametrize("most", [2, 8])
@pytest.mark.parametrize("pairs", [1, 8, 9, 17, 40])
def test_more_pairs_of_a_prompt_are_divided_evenly(pairs, most):
    parts = Counter(Prompts(["a", *["b"] * pairs], [5] * (pairs + 1)).find_leaders(most))
    assert parts.pop(0) == 1
    assert len(parts) == math.ceil(pairs / most)
    assert max(parts.values()) <= most
    assert max(parts.values()) - min(parts.values()) <= 1


@pytest.mark.parametrize(("per_device", "most"), [(1, 2), (8, 2), (16, 4), (32, 8), (64, 8)])
def test_a_step_has_pairs_of_several_prompts(per_device, most):
    prompts = make_prompts([8] * 40)
    grouped = Batches(320, per_device=per_device, world_size=1, seed=3, lengths=[9] * 320, prompts=prompts)
    largest = [max(Counter(prompts.keys[pair] for pair in batch).values()) for batch in grouped]
    assert min(largest) <= most and max(largest) <= 2 * most  # two parts of a prompt may meet by chance


def test_prompts_with_many_pairs_do_not_come_first():
    """The place of a prompt is uniform: the mean of 300 epochs has a standard error of 1.7 % of an epoch."""
    prompts = make_prompts([8, *[1] * 92])
    grouped = Batches(100, per_device=1, world_size=1, seed=3, lengths=[9] * 100, prompts=prompts)
    places = []
    for epoch in range(300):
        grouped.set_epoch(epoch)
        places += [place / 100 for place, (pair,) in enumerate(grouped) if prompts.keys[pair] == 0]
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(("ranks", "micro", "per_device"), SPLITS)
@pytest.mark.parametrize("case", SIZES)
def test_the_slowest_ranks_never_compute_more_than_pair_by_pair(case, ranks, micro, per_device):
    prompts = make_prompts(SIZES[case])
    lengths = make_lengths(prompts)
    shape = {"per_device": per_device, "world_size": ranks, "micro_batches": micro, "lengths": lengths}
    plain, grouped = Batches(len(lengths), **shape), Batches(len(lengths), **shape, prompts=prompts)

    def count_slowest(shares: list[list[int]]) -> int:
        tokens = []
        for share in shares:
            once = {prompts.keys[pair]: prompts.lengths[pair] for pair in share}
            tokens.append(sum(lengths[pair] - prompts.lengths[pair] for pair in share) + sum(once.values()))
        return sum(max(tokens[at : at + ranks]) for at in range(0, len(tokens), ranks))

    fewer, sizes = 0, [per_device] * (ranks * micro)
    for begin in range(0, len(lengths) - 16, 8):
        step = sorted(range(len(lengths)), key=prompts.keys.__getitem__)[begin : begin + 16]
        slowest, slowest_apart = (count_slowest(batches._deal(step, sizes)) for batches in (grouped, plain))
        assert slowest <= slowest_apart
        fewer += slowest < slowest_apart
    assert fewer > 0 or per_device in (1, 16) or case.startswith("one prompt"), "else nothing to share"
