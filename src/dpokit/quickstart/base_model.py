"""Builds the quickstart's base model: a small GPT-2, trained on kind and curt answers until it writes both."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpokit.atomic_files import new_folder
from dpokit.console import track_progress

END = "<|endoftext|>"
VOCABULARY = 1000
POSITIONS = 128
IGNORED = -100
BATCH_PAIRS = 16
LEARNING_RATE = 3e-3

# A pair's ids: the prompt, and its two answers, each with END.
Pair = tuple[list[int], list[int], list[int]]


def build_base(folder: Path, *, corpus: Path, seed: int, epochs: int = 6, show_progress: bool = True) -> float:
    """Trains tokenizer and model on both answers of each pair, equally often, and saves them in one folder.

    Torch's global random state does not change.

    Args:
        folder: becomes an ordinary Hugging Face model folder, complete or not at all.
        corpus: JSONL with prompt, chosen, rejected.
        seed: of the initial weights and the order of the pairs.
        epochs: number of passes over the corpus.

    Returns: the mean loss of the last epoch, nats per answer token.
    """
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    tokenizer = _train_tokenizer([row[name] for row in rows for name in ("prompt", "chosen", "rejected")])
    # Prompt and answers are tokenised separately, as in training and inference.
    pairs = [
        (
            tokenizer.encode(row["prompt"]),
            tokenizer.encode(row["chosen"] + END),
            tokenizer.encode(row["rejected"] + END),
        )
        for row in rows
    ]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the GPUs' state as well
        model = GPT2LMHeadModel(_config(len(tokenizer), tokenizer.eos_token_id))
        losses = _fit(model, pairs, epochs=epochs, show_progress=show_progress)
    with new_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return sum(losses) / len(losses)


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    tokenizer = Tokenizer.from_str(bpe.to_str())  # transformers expects a Tokenizer, not this wrapper class
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def _config(vocabulary: int, end: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=96,
        n_layer=3,
        n_head=3,
        # Dropout slows the learning of a grammar, and prevents nothing here: all prompts come from this grammar.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def _fit(model: GPT2LMHeadModel, pairs: list[Pair], *, epochs: int, show_progress: bool) -> list[float]:
    """Trains the model; returns the losses of the last epoch's steps.

    The learning rate falls to zero, which makes sampled answers well-formed.
    """
    steps_an_epoch = -(-len(pairs) // BATCH_PAIRS)
    steps = epochs * steps_an_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
    )
    losses: list[float] = []
    model.train()
    batches = track_progress(
        _build_batches(pairs, epochs=epochs),
        desc="training the base model",
        total=steps,
        unit="step",
        hidden=not show_progress,
    )
    for ids, labels in batches:
        # Padding on the right needs no mask: no earlier token attends to it. Only answer tokens pass the LM head.
        hidden = model.transformer(inputs_embeds=model.transformer.wte(ids)).last_hidden_state[:, :-1]
        answer = labels[:, 1:] != IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[answer]), labels[:, 1:][answer])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        batches.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses[-steps_an_epoch:]


def _build_batches(pairs: list[Pair], *, epochs: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields ids and labels (2 x pairs, tokens), int64, padded on the right; labels are IGNORED except on answers.

    A batch holds both answers of each of its prompts, so that no step favours one kind of answer.
    """
    for _ in range(epochs):
        for batch in torch.randperm(len(pairs)).split(BATCH_PAIRS):
            sequences = [(prompt, answer) for prompt, *both in (pairs[i] for i in batch.tolist()) for answer in both]
            longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
            ids = torch.zeros(len(sequences), longest, dtype=torch.long)
            labels = torch.full_like(ids, IGNORED)
            for row, (prompt, answer) in enumerate(sequences):
                ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
            yield ids, labels
