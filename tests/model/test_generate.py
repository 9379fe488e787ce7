"""Sampling: repeatable, and without a trace in the model or in torch's random state."""

import torch
from transformers import AutoModelForCausalLM

from dpokit.model.generate import generate_answers

PROMPTS = [f"\n\nHuman: How do I bake {'good ' * i}bread?\n\nAssistant:" for i in range(5)]


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(tiny_gpt2, plain_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    first, again, other = (
        generate_answers(model, plain_tokenizer, PROMPTS, max_new_tokens=8, seed=seed) for seed in (1, 1, 2)
    )
    assert len(first) == 5
    assert first == again != other


def test_greedy_answers_do_not_depend_on_the_batch(tiny_gpt2, plain_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    alone, together = (
        generate_answers(model, plain_tokenizer, PROMPTS, max_new_tokens=8, temperature=0, batch_size=size)
        for size in (1, 5)
    )
    assert alone == together


def test_mode_padding_side_and_random_state_are_left_alone(tiny_gpt2, plain_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).train()
    state = torch.get_rng_state()
    generate_answers(model, plain_tokenizer, PROMPTS, max_new_tokens=2)
    assert model.training
    assert plain_tokenizer.padding_side == "right"
    assert torch.equal(torch.get_rng_state(), state)
