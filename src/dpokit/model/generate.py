"""Sampling of answers: the one place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """One answer for each rendered prompt, without prompt and special tokens, its leading space kept.

    Args:
        model: a causal LM; its mode is restored afterwards.
        tokenizer: with an EOS token.
        prompts: as the model shall meet them: chat template applied, or an HH transcript.
        max_new_tokens: most tokens of an answer; EOS ends it earlier.
        temperature: 0 is greedy.
        top_p: share of the probability mass that is sampled from.
        seed: repeats the answers for the same prompts and batch size; torch's own random state is left alone.
    """
    settings = _settings(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    answers: list[str] = []
    was_training = model.training
    model.eval()
    try:
        with _own_randomness(model.device, seed):
            for start in range(0, len(encoded), batch_size):
                ids, mask = _pad_left(encoded[start : start + batch_size], settings.pad_token_id)
                ids, mask = ids.to(model.device), mask.to(model.device)
                whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
                answers += tokenizer.batch_decode(whole[:, ids.shape[1] :], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return answers


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt's ids: one BOS where the tokenizer writes one, and never closed with EOS, which would end the prompt."""
    has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    closed = ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token)
    return ids[:-1] if closed else ids


def _pad_left(rows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both int64 (rows, tokens): every row ends in the last column, where generation goes on."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> GenerationConfig:
    # What is left out here, generate() takes from the model's generation_config.json, where chat models have top-k and
    # penalties of their own. Their list of end tokens is the one thing to keep.
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    pad = tokenizer.pad_token_id
    # For greedy answers these are the values that transformers takes for "not set", without a warning.
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if temperature > 0:
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,  # the Trainer switches it off in the model's config
        eos_token_id=ends,
        pad_token_id=pad if pad is not None else ends[0] if isinstance(ends, list) else ends,
        **sampling,
    )


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    # torch.manual_seed would seed every GPU, and fork_rng would have to open each of them to restore it.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for gpu in devices:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
