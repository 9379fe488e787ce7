"""Pairs with the same prompt in one batch: all their answers share its forward, and equal padded rows."""

import random
from typing import Any

import pytest
import torch
from test_shared_prefix import FAMILIES, OUTPUTS, VOCABULARY, build, check_equal, draw_states, pack
from waits import attend_plainly

from dpokit.model import shared_prefix
from dpokit.model.score import ScoredTokenCollator, score_batch, share_prefix
from dpokit.model.shared_prefix import attend

# Pairs of prompt, chosen and rejected answer. Each letter stands for some tokens, which the same letter has in either
# case; those of capital letters are not scored.
SHAPES = {
    "one pair": ["P a b"],
    "two pairs of a prompt": ["P a b", "P c d"],
    "eight pairs of a prompt": ["P a b", "P c d", "P e f", "P g h", "P i j", "P k l", "P m n", "P o p"],
    "pairs of two prompts in turn": ["P a b", "Q c d", "P e f", "Q g h", "R i j"],
    "one chosen against four rejected answers": ["P a b", "P a c", "P a d", "P a e"],
    "all pairs of four ranked answers": ["P a b", "P a c", "P a d", "P b c", "P b d", "P c d"],
    "the same pair twice": ["P a b", "P a b", "Q a b"],
    "equal answers": ["P a a", "P b c"],
    "a prompt that begins another one": ["P a b", "PQ a b", "PQ c d"],
    "a turn that is part of the prompt or of the answers": ["PQ a b", "P Qa Qc", "P QaRb Qd"],
    "answers that begin the same": ["P ab ac", "P ad bc", "P a ab"],
    "turns of a tool": ["P aTb cTd", "P aTb e", "P aTe Tb", "P cTd aTU"],
    "the same tokens, scored and not": ["P aTb c", "P atb d", "P ATb c"],
    "a first turn without a score": ["P Ta Tb", "P Ta Uc", "P Uc Ud"],
    "a prompt of one token": ["E a b", "E c d"],
}  # fmt: skip


def make_tokens(letter: str) -> list[int]:
    """One to five tokens, the same in each test."""
    choose = random.Random(letter.lower())
    return choose.choices(range(1, VOCABULARY), k=1 + ord(letter.lower()) % 5)


def make_row(pair: str) -> dict[str, list[int]]:
    prompt, *answers = (
        [(token, letter.islower()) for letter in text for token in make_tokens(letter)] for text in pair.split()
    )
    row = {"prompt_ids": [token for token, _ in prompt]}
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        row[f"{name}_ids"] = [token for token, _ in answer]
        row[f"{name}_mask"] = [int(is_scored) for _, is_scored in answer]
    return row


def make_batch(pairs: list[str]) -> dict[str, Any]:
    return ScoredTokenCollator(pad_id=0)([make_row(pair) for pair in pairs])


def count(text: str) -> int:
    """The tokens that a text of letters stands for."""
    return sum(len(make_tokens(letter)) for letter in text)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_of_groups_equal_padded_ones(family, shape):
    check_equal(build(FAMILIES[family]), make_batch(SHAPES[shape]))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_gets_the_gradients_of_padded_rows(family, checkpointing):
    check_equal(build(FAMILIES[family], True, checkpointing), make_batch(SHAPES["all pairs of four ranked answers"]))


@pytest.mark.parametrize("shape", ["one chosen against four rejected answers", "the same tokens, scored and not"])
def test_every_output_field_of_a_shared_answer_equals_trls(shape):
    model, batch = build(FAMILIES["llama"]), make_batch(SHAPES[shape])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    padded = model(**inputs, fused_lm_head=True)
    share_prefix(model)
    packed = model(**inputs, fused_lm_head=True)
    for name in (*OUTPUTS, "label_mask"):
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-4, atol=1e-5, msg=name)


# The branches of each group, as letters.
GROUPS = {
    "pairs of two prompts in turn": {"P": "abef", "Q": "cdgh", "R": "ij"},
    "one chosen against four rejected answers": {"P": "abcde"},
    "all pairs of four ranked answers": {"P": "abcd"},
    "the same pair twice": {"P": "ab", "Q": "ab"},
    "equal answers": {"P": "abc"},
    "a prompt that begins another one": {"P": "ab", "PQ": "abcd"},
    "a prompt of one token": {"E": "abcd"},
}


@pytest.mark.parametrize("shape", GROUPS)
def test_a_group_has_its_prompt_and_each_answer_once(shape):
    packed = pack(make_batch(SHAPES[shape]))
    expected = [(count(prompt) - 1, tuple(map(count, answers))) for prompt, answers in GROUPS[shape].items()]
    assert packed.groups == expected
    assert packed.input_ids.shape == (1, sum(shared + sum(branches) for shared, branches in expected))
    assert packed.labels.shape == (1, sum(sum(branches) for _, branches in expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_scored_token_of_each_row_has_one_value(shape):
    batch = make_batch(SHAPES[shape])
    packed = pack(batch)
    scored = batch["completion_mask"][:, 1:].flatten().nonzero()[:, 0]
    assert packed.places.sort().values.tolist() == scored.tolist()
    labels = batch["input_ids"][:, 1:].flatten()
    assert torch.equal(packed.labels[0, packed.sources], labels[packed.places])
    before = batch["input_ids"][:, :-1].flatten()
    assert torch.equal(packed.input_ids[0, packed.scored][packed.sources], before[packed.places])


def test_pairs_of_different_prompts_are_packed_one_by_one():
    pairs = ["P a b", "QR c d", "R TeT f"]
    whole, alone = pack(make_batch(pairs)), [pack(make_batch([pair])) for pair in pairs]
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in alone], dim=1)), name
    assert whole.groups == [part.groups[0] for part in alone]
    assert torch.equal(whole.sources, torch.arange(whole.labels.shape[1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_offsets_give_flash_attention_the_keys_of_each_branch(shape, monkeypatch):
    packed = pack(make_batch(SHAPES[shape]))
    states = draw_states(packed, torch.float32, "cpu")
    branch_by_branch, _ = attend(torch.nn.Module(), *states, None, packed=packed)
    monkeypatch.setattr(shared_prefix, "_find_flash_dtype", lambda query: query.dtype)
    monkeypatch.setattr(shared_prefix, "varlen_attn", attend_plainly)
    at_once, _ = attend(torch.nn.Module(), *states, None, packed=packed)
    torch.testing.assert_close(at_once, branch_by_branch, rtol=1e-5, atol=1e-5)


def test_a_group_split_among_batches_has_the_same_numbers():
    model, pairs = build(FAMILIES["llama"]), SHAPES["all pairs of four ranked answers"]
    share_prefix(model)
    rows = [score_batch(model, make_batch(part)).view(2, -1) for part in (pairs, pairs[:1], pairs[1:4], pairs[4:])]
    torch.testing.assert_close(torch.cat(rows[1:], dim=1), rows[0], rtol=1e-5, atol=1e-5)


def list_backward_steps(result: torch.Tensor) -> list[str]:
    """The names of all nodes of the graph that computes the gradient of a result."""
    waiting, visited = [result.grad_fn], {}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in visited:
            visited[node] = node.name()
            waiting += [following for following, _ in node.next_functions]
    return list(visited.values())


def test_the_number_of_slices_does_not_grow_with_the_pairs():
    """The gradient of each slice is a tensor of the whole row: with many pairs, most of a step would fill them."""
    model = build(FAMILIES["llama"])
    share_prefix(model)
    steps = [
        list_backward_steps(score_batch(model, make_batch(SHAPES[shape])).sum())
        for shape in ("one pair", "eight pairs of a prompt")
    ]
    slices, more_slices = (names.count("SliceBackward0") for names in steps)
    assert slices == more_slices
