"""The quickstart's base model: a small GPT-2, taught both kinds of answer until it writes either."""

import json
import math
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpokit.rundir import new_folder

END = "<|endoftext|>"
VOCABULARY = 1000
POSITIONS = 128
IGNORED = -100


def build_base(folder: Path, *, corpus: Path, seed: int, epochs: int = 9, show_progress: bool = True) -> float:
    """Trains tokenizer and model on both answers of each pair, equally often, and saves them as one folder.

    Args:
        folder: gets an ordinary Hugging Face model folder, whole or not at all.
        corpus: JSONL with prompt, chosen, rejected.
        seed: of weights and order.
        epochs: times that each answer is seen.

    Returns: the mean loss of the last epoch, nats per token.
    """
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    tokenizer = _train_tokenizer([row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")])
    end = tokenizer.eos_token_id
    sequences = [
        tokenizer.encode(row["prompt"]) + tokenizer.encode(row[side]) + [end]
        for row in rows
        for side in ("chosen", "rejected")
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(_config(len(tokenizer), end))
        loss = _train(model, sequences, epochs=epochs, seed=seed, show_progress=show_progress)
    with new_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return loss


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)


def _config(vocabulary: int, end: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        # Dropout slows the learning of a grammar and protects from nothing here: the corpus is the world.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def _train(model: GPT2LMHeadModel, sequences: list[list[int]], *, epochs: int, seed: int, show_progress: bool) -> float:
    batch_size, peak = 32, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.99))
    steps = epochs * math.ceil(len(sequences) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    losses: list[float] = []
    with tqdm(total=steps, desc="warming up the base model", unit="step", disable=not show_progress) as bar:
        for _ in range(epochs):
            losses.clear()
            order = torch.randperm(len(sequences), generator=generator).tolist()
            for start in range(0, len(order), batch_size):
                ids, labels = _pad([sequences[i] for i in order[start : start + batch_size]])
                loss = model(input_ids=ids, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                bar.update()
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
    return sum(losses) / len(losses)


def _pad(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (sequences, tokens), int64, padded on the right; the causal mask hides padding from the rest."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = labels[row, : len(sequence)] = torch.tensor(sequence)
    return ids, labels
