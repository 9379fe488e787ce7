"""Samples answers, for all of dpokit, and computes statistics of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

REPEATED_TOKENS = 4


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: without special tokens, with its leading space.
        ids: its tokens, without the end token.
        ended: True if an end token ended it, False if the limit did.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    ends: Sequence[int] = (),
) -> list[Answer]:
    """Returns one answer for each rendered prompt.

    Args:
        model: a causal LM; its mode is restored afterwards.
        tokenizer: with an EOS token.
        prompts: as text or token ids, rendered: chat template applied, or an HH transcript.
        max_new_tokens: most tokens of an answer; an end token ends it earlier.
        temperature: 0 is greedy.
        top_p: share of the probability mass to sample from.
        seed: the same seed, prompts and batch size give the same answers; torch's global random state does not change.
        batch_size: prompts per forward pass.
        ends: ids that end an answer (`Renderer.ends`), beside the tokenizer's EOS and the model's own end tokens.
    """
    settings = _settings(model, tokenizer, ends, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    encoded = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    answers: list[Answer] = []
    with _in_evaluation(model), _seeded(model.device, seed):
        for start in range(0, len(encoded), batch_size):
            rows = _sample(model, encoded[start : start + batch_size], settings)
            answers += [_read_answer(tokenizer, row, settings.eos_token_id) for row in rows]
    return answers


@torch.no_grad()
def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    on_token: Callable[[int], None],
    is_stopped: Callable[[], bool] = lambda: False,
    ends: Sequence[int] = (),
) -> Answer:
    """Returns the answer of `generate_answers` to this one prompt, and reports each token when it is sampled.

    Args:
        model, tokenizer, max_new_tokens, temperature, top_p, seed, ends: as for `generate_answers`.
        prompt: token ids.
        on_token: called on this thread with each sampled token, except for an end token.
        is_stopped: called after each token; True ends the answer there, as the limit would.
    """
    settings = _settings(model, tokenizer, ends, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    with _in_evaluation(model), _seeded(model.device, seed):
        watch = StoppingCriteriaList([_Watch(settings.eos_token_id, on_token, is_stopped)])
        [row] = _sample(model, [list(prompt)], settings, stopping_criteria=watch)
    return _read_answer(tokenizer, row, settings.eos_token_id)


class _Watch(StoppingCriteria):
    """Stopping criterion that passes each token of a single row to `on_token` and ends the row on `is_stopped`.

    A streamer receives a token after the stopping criteria, so that one token too many would be sampled.
    """

    def __init__(self, ends: Sequence[int], on_token: Callable[[int], None], is_stopped: Callable[[], bool]) -> None:
        self._ends, self._on_token, self._is_stopped = ends, on_token, is_stopped
        self._has_ended = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        token = int(input_ids[0, -1])
        self._has_ended = self._has_ended or token in self._ends
        if not self._has_ended:
            self._on_token(token)
            self._has_ended = self._is_stopped()
        return torch.full((len(input_ids),), self._has_ended, device=input_ids.device, dtype=torch.bool)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Returns a rendered prompt's ids: one BOS if the tokenizer adds it, no EOS, which would end the prompt."""
    has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    closed = ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token)
    return ids[:-1] if closed else ids


def _sample(
    model: PreTrainedModel, prompts: Sequence[list[int]], settings: GenerationConfig, **more: Any
) -> list[list[int]]:
    """Returns the tokens after each prompt, padded after an end token."""
    ids, mask = _pad_left(prompts, settings.pad_token_id)
    ids, mask = ids.to(model.device), mask.to(model.device)
    with _without_generation_config(model):
        sequences = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **more)
    rows: list[list[int]] = sequences[:, ids.shape[1] :].tolist()
    return rows


@contextmanager
def _without_generation_config(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Removes the model's generation config: generate() would take unset settings from it (top-k, penalties, beams)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    config = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = config


@contextmanager
def _in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _read_answer(tokenizer: PreTrainedTokenizerBase, row: Sequence[int], ends: Sequence[int]) -> Answer:
    """Returns the tokens before the first end token; padding only follows an end token."""
    length = next((at for at, token in enumerate(row) if token in ends), len(row))
    text = str(tokenizer.decode(row[:length], skip_special_tokens=True))
    return Answer(text, tuple(row[:length]), ended=length < len(row))


def _pad_left(rows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask, both int64 (rows, tokens); rows end in the last column, where generation continues."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> GenerationConfig:
    # The end tokens are the only part of the model's generation config to keep.
    of_model = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = of_model if isinstance(of_model, list) else [of_model]
    all_ends = [end for end in dict.fromkeys([tokenizer.eos_token_id, *ends, *listed]) if end is not None]
    pad = tokenizer.pad_token_id
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        use_cache=True,  # the Trainer switches it off in the model's config
        eos_token_id=all_ends,
        pad_token_id=all_ends[0] if pad is None else pad,
        **sampling,
    )


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    # torch.manual_seed seeds every GPU; fork_rng would have to initialise each of them to restore its state.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for gpu in devices:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def count_answers(answers: Sequence[Answer]) -> dict[str, float]:
    """Returns statistics of a model's answers, of which there is at least one.

    They count tokens, because base and tuned model share their tokenizer. Counts of words between spaces fail for
    languages without spaces, and for a loop such as "hahahaha".

    mean_tokens: mean length in tokens, without the end token.
    repetition: share of an answer's 4-grams that occurred in it before, averaged over the answers (seq-rep-4 of Welleck
        et al. 2020, "Neural Text Generation with Unlikelihood Training"); 0 for an answer without a 4-gram.
    distinct_1, distinct_2: different n-grams / all n-grams, over all answers together (Li et al. 2016, "A
        Diversity-Promoting Objective Function for Neural Conversation Models"); 0 without any n-gram.
        They fall with the length and number of answers: compare them at similar `mean_tokens`.
    ended: share of answers that an end token ended; the others reached the limit.
    """
    rows = [answer.ids for answer in answers]
    return {
        "mean_tokens": _mean(len(row) for row in rows),
        "repetition": _mean(1 - _share_distinct([row], REPEATED_TOKENS, if_none=1.0) for row in rows),
        "distinct_1": _share_distinct(rows, 1, if_none=0.0),
        "distinct_2": _share_distinct(rows, 2, if_none=0.0),
        "ended": _mean(answer.ended for answer in answers),
    }


def _share_distinct(rows: Iterable[Sequence[int]], size: int, *, if_none: float) -> float:
    grams = [row[start : start + size] for row in map(tuple, rows) for start in range(len(row) - size + 1)]
    return len(set(grams)) / len(grams) if grams else if_none


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
