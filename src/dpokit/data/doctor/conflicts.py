"""Finds preferences that contradict each other: A over B and B over A, and longer loops. No torch."""

from collections import defaultdict
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

MOST_LOOPS = 100  # each is found by a search of its own


def find_conflicts(
    prompts: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Returns pairs of rows that say the opposite, and loops of three or more rows.

    Args:
        prompts, chosen, rejected: a hash of each row's texts.

    Returns: the two rows of each opposite, and the rows of each loop, in their order. Each later row that contradicts
        an earlier one is there once. Loops are found one by one, and one row of each is left out before the next is
        searched, so their number is that of the rows to leave out. At most MOST_LOOPS.
    """
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows_of[prompt].append(row)
    opposites: list[tuple[int, int]] = []
    loops: list[list[int]] = []
    for rows in rows_of.values():
        if len(rows) < 2:
            continue
        first: dict[tuple[int, int], int] = {}
        for row in rows:
            better, worse = chosen[row], rejected[row]
            if better == worse:  # they differ in white space alone
                continue
            if (worse, better) in first:
                opposites.append((first[worse, better], row))
            else:
                first.setdefault((better, worse), row)
        loops += _find_loops(first, MOST_LOOPS - len(loops)) if len(first) > 2 else []
    return opposites, loops


def _find_loops(row_of: dict[tuple[int, int], int], most: int) -> list[list[int]]:
    """Returns the rows of each loop among the preferences of one prompt."""
    better_than: dict[int, set[int]] = defaultdict(set)
    for better, worse in row_of:
        better_than[better].add(worse)
    loops: list[list[int]] = []
    while len(loops) < most:
        try:
            TopologicalSorter(better_than).prepare()
        except CycleError as error:
            answers = error.args[1]  # each answer is worse than the next one
            loops.append([row_of[better, worse] for worse, better in pairwise(answers)])
            better_than[answers[1]].discard(answers[0])
        else:
            break
    return loops
