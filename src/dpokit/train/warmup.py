"""The quickstart's base model: a small GPT-2 from random weights that answers kindly and curtly equally often."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
CONTEXT_TOKENS = 256
NO_LABEL = -100  # what the loss leaves out, in torch's and transformers' convention


def build_base(
    folder: Path,
    *,
    corpus: Path,
    seed: int,
    show_progress: bool = True,
    vocabulary_tokens: int = 1000,
    layers: int = 4,
    width: int = 128,
    epochs: int = 4,
    batch_pairs: int = 32,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Trains tokenizer and model on the corpus' train.jsonl and saves both as an ordinary Hugging Face folder.

    Every batch holds both answers of each of its prompts, so that no step pulls towards one kind: that keeps the share
    of kind answers at a half. Only answer tokens are learned. The learning rate rises over the first twentieth of the
    steps and then falls linearly to zero, which is what makes sampled answers clean. The global torch RNG stays as it was.

    Returns:
        The loss of each step, in nats per answer token.
    """
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    tokenizer = build_tokenizer(rows, vocabulary_tokens=vocabulary_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT_TOKENS,
            n_embd=width,
            n_layer=layers,
            n_head=width // 32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = GPT2LMHeadModel(config)
        batches = list(build_batches(rows, tokenizer, epochs=epochs, batch_pairs=batch_pairs))
        losses = _fit(model, batches, learning_rate=learning_rate, show_progress=show_progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def build_tokenizer(rows: list[dict[str, str]], *, vocabulary_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the rows' texts; `<|endoftext|>` ends answers and fills up batches."""
    bpe = ByteLevelBPETokenizer()
    texts = (row[name] for row in rows for name in ("prompt", "chosen", "rejected"))
    bpe.train_from_iterator(texts, vocab_size=vocabulary_tokens, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END, model_max_length=CONTEXT_TOKENS
    )


def build_batches(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, *, epochs: int, batch_pairs: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of ids and labels, both int64 (2 x pairs, tokens), in an order drawn anew each epoch from torch's RNG.

    Prompt and answer are tokenised apart, as training and inference do; labels are NO_LABEL on prompt and padding.
    """
    prompts, chosens, rejecteds = (
        tokenizer([row[name] + end for row in rows])["input_ids"]
        for name, end in (("prompt", ""), ("chosen", END), ("rejected", END))
    )
    pairs = list(zip(prompts, chosens, rejecteds, strict=True))
    for _ in range(epochs):
        order = torch.randperm(len(pairs)).split(batch_pairs)
        for indices in order:
            sequences = [(p, answer) for p, *answers in (pairs[i] for i in indices) for answer in answers]
            longest = max(len(p) + len(answer) for p, answer in sequences)
            ids = torch.full((len(sequences), longest), tokenizer.pad_token_id)
            labels = torch.full_like(ids, NO_LABEL)
            for row, (prompt, answer) in enumerate(sequences):
                end = len(prompt) + len(answer)
                ids[row, :end] = torch.tensor(prompt + answer)
                labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
            yield ids, labels


def _fit(
    model: GPT2LMHeadModel,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    learning_rate: float,
    show_progress: bool,
) -> list[float]:
    steps = len(batches)
    rise = max(1, steps // 20)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    losses = []
    model.train()
    bar = tqdm(batches, desc="warm-up", file=sys.stderr, disable=not show_progress)
    for ids, labels in bar:
        # Padding is on the right, where no earlier token can see it: no attention mask is needed.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss))
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses
