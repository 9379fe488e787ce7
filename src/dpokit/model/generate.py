"""Sampling of answers: the one place."""

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
    """One answer for each rendered prompt, without prompt and special tokens, its leading space kept.

    Args:
        model: a causal LM; its mode is restored afterwards.
        tokenizer: with EOS and padding tokens.
        prompts: as the model shall meet them: chat template applied, or an HH transcript.
        max_new_tokens: most tokens of an answer; EOS ends it earlier.
        temperature: 0 is greedy.
        top_p: share of the probability mass that is sampled from.
        seed: repeats the answers for the same prompts and batch size; torch's own random state is left alone.
    """
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    answers: list[str] = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                batch = list(prompts[start : start + batch_size])
                # A chat template has written the BOS already; a second one would be met nowhere else.
                has_bos = bool(tokenizer.bos_token) and batch[0].startswith(tokenizer.bos_token)
                inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=not has_bos)
                inputs = inputs.to(model.device)
                ids = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    generation_config=generation,
                )
                new = ids[:, inputs["input_ids"].shape[1] :]
                answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    finally:
        model.train(was_training)
        tokenizer.padding_side = side
    return answers
