"""Sampling answers: the one place."""

from collections.abc import Sequence

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
    """One answer to each prompt, in the prompts' order.

    The model's own habits (top-k, penalties) are switched off, so that what is sampled is what was trained. The global
    torch RNG and the model's mode are afterwards as they were.

    Args:
        prompts: rendered texts: a chat template's output, or an HH transcript that ends with "\\n\\nAssistant:".
        max_new_tokens: an answer without an end is cut here.
        temperature: 0 always takes the likeliest token, and then `top_p` and `seed` mean nothing.
        seed: with the same seed and batch size come the same answers.

    Returns:
        The answers' text, without prompt and special tokens, with the leading space.
    """
    settings = _build_settings(model, tokenizer, max_new_tokens, temperature, top_p)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers: list[str] = []
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(encoded), batch_size):
                ids, mask = pad_left(encoded[start : start + batch_size], settings.pad_token_id)
                ids, mask = ids.to(model.device), mask.to(model.device)
                whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
                answers += tokenizer.batch_decode(whole[:, ids.shape[1] :], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return answers
