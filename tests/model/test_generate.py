"""Sampled answers: repeatable, the same in any batch, without side effects; and streamed answers."""

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from dpokit.model.generate import Answer, encode_prompt, generate_answers, stream_answer
from dpokit.quickstart.base_model import build_base
from dpokit.quickstart.grammar import all_requests, write_corpus

PROMPTS = [request.prompt for request in all_requests()[::450]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_corpus(folder, train_pairs=64, eval_pairs=1, seed=0)
    build_base(folder / "base", corpus=folder / "train.jsonl", seed=0, epochs=1, show_progress=False)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "base")
    return loaded


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    # Large weights separate the logits of an untrained model, so that greedy answers do not depend on rounding.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        end = tokenizer.eos_token_id
        sizes = {"vocab_size": len(tokenizer), "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
        config = GPT2Config(**sizes, initializer_range=0.5, bos_token_id=end, eos_token_id=end, pad_token_id=end)
        return GPT2LMHeadModel(config).eval()


def test_a_seed_repeats_the_answers_and_another_does_not(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    a, b, c = (generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, seed=seed) for seed in (3, 3, 4))
    assert a == b != c
    assert len(a) == len(PROMPTS)


def test_greedy_answers_are_the_same_in_batches_of_any_size(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) > 1, "no prompt needs padding"
    alone, three, all_together = (
        generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0, batch_size=size)
        for size in (1, 3, 32)
    )
    assert alone == three == all_together


def test_greedy_answers_equal_a_plain_argmax_loop(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    [answer] = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=6, temperature=0.0)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(6):
        following = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
        if following.item() == tokenizer.eos_token_id:
            break
    assert answer.text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("training", [True, False])
def test_mode_global_rng_and_padding_side_are_restored(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, training: bool
) -> None:
    model.train(training)
    before, side = torch.random.get_rng_state(), tokenizer.padding_side
    generate_answers(model, tokenizer, PROMPTS, max_new_tokens=4)
    assert model.training is training
    assert torch.equal(before, torch.random.get_rng_state())
    assert tokenizer.padding_side == side


def test_the_mode_is_restored_after_an_error(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.train()
    with pytest.raises(IndexError):
        generate_answers(model, tokenizer, ["far too long " * 200], max_new_tokens=4)
    assert model.training


def test_answers_are_sampled_without_dropout(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0)
    assert generate_answers(model.train(), tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0) == answers


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "defaults",
    [
        {"repetition_penalty": 5.0, "top_k": 1, "top_p": 0.1, "temperature": 0.01},
        {"min_p": 1.0, "min_new_tokens": 8, "suppress_tokens": list(range(0, 300, 2))},
        {"num_beams": 2},
    ],
)
def test_the_models_generation_config_and_warnings_are_off(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    defaults: dict,
    adapted: bool,
) -> None:
    greedy = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0)
    sampled = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    config = model.generation_config
    for name, value in defaults.items():
        setattr(config, name, value)
    if adapted:  # an untrained adapter changes no answer
        model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    logging.getLogger("transformers").propagate = True
    try:
        assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0) == greedy
        assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8) == sampled
    finally:
        logging.getLogger("transformers").propagate = False
    assert not caplog.records
    assert model.generation_config is config


def test_answers_have_no_special_tokens_and_no_prompt(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    for answer in generate_answers(model, tokenizer, PROMPTS, max_new_tokens=20, seed=1):
        assert "<|endoftext|>" not in answer.text and "Human: " not in answer.text[:10]


def test_an_answer_ends_before_an_end_token_or_at_the_limit(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0)
    assert not whole[0].ended
    assert all(len(answer.ids) == 12 for answer in whole if not answer.ended)
    # The first answer's third token becomes a second end token: all answers now end at its first occurrence.
    end = whole[0].ids[2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    short = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0)
    assert short[0].ended
    for before, now in zip(whole, short, strict=True):
        place = before.ids.index(end) if end in before.ids else len(before.ids)
        assert now.ids == before.ids[:place]
        assert now.ended is (before.ended or end in before.ids)
        assert now.text == tokenizer.decode(now.ids, skip_special_tokens=True)


def test_prompts_may_be_token_ids(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    texts, numbers = (generate_answers(model, tokenizer, prompts, max_new_tokens=8) for prompts in (PROMPTS, ids))
    assert texts == numbers


def test_no_prompts_give_no_answers(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate_answers(model, tokenizer, [], max_new_tokens=4) == []


def stream(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, **more) -> tuple[Answer, list[int]]:
    tokens: list[int] = []
    settings = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9, "seed": 5, "on_token": tokens.append} | more
    return stream_answer(model, tokenizer, encode_prompt(tokenizer, PROMPTS[0]), **settings), tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_streamed_answer_equals_the_generated_one(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, temperature: float, seed: int
) -> None:
    answer, tokens = stream(model, tokenizer, temperature=temperature, seed=seed)
    settings = {"max_new_tokens": 16, "temperature": temperature, "top_p": 0.9, "seed": seed}
    assert [answer] == generate_answers(model, tokenizer, PROMPTS[:1], **settings)
    assert tuple(tokens) == answer.ids


def test_a_streamed_answer_equals_that_of_transformers(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer, _ = stream(model, tokenizer)
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[0])])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        settings = {"max_new_tokens": 16, "do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    row = whole[0, ids.shape[1] :].tolist()
    assert list(answer.ids) == row[: len(row) - answer.ended]


def test_the_end_token_of_a_streamed_answer_is_not_reported(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, _ = stream(model, tokenizer, temperature=0.0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, whole.ids[2]]
    answer, tokens = stream(model, tokenizer, temperature=0.0)
    assert answer.ended
    assert tuple(tokens) == answer.ids == whole.ids[: whole.ids.index(whole.ids[2])]


def test_a_streamed_answer_stops_on_request(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    whole, _ = stream(model, tokenizer)
    tokens: list[int] = []
    answer, _ = stream(model, tokenizer, on_token=tokens.append, is_stopped=lambda: len(tokens) == 3)
    assert answer.ids == tuple(tokens) == whole.ids[:3]
    assert not answer.ended
