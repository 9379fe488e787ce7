"""Samples answers of base and tuned model to the same held-out prompts, and writes them with their statistics."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpokit.atomic_files import sync_folder, write_json
from dpokit.console import track_progress
from dpokit.data.rendering import Renderer
from dpokit.distributed.coordination import decide_on_main_process
from dpokit.errors import DataError, ModelError, SettingsError, find_disk_trouble
from dpokit.model.generate import Answer, count_answers, encode_prompt, generate_answers
from dpokit.model.score import take_first_turn


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt in the form that the model receives.

    Attributes:
        text: the rendered prompt: chat template applied, or an HH transcript.
        chosen: the preferred answer of the data, shown beside the models' answers.
        ids: the prompt's tokens; with None the text is encoded.
    """

    text: str
    chosen: str = ""
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling answers; temperature 0 is greedy.

    Raises: SettingsError for a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, and 1 at most"),
            "seed": (self.seed >= 0, "0 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
        }
        for name, (is_valid, expected) in checks.items():
            if not is_valid:
                raise SettingsError(f"{name} is {getattr(self, name)}", expected=expected, do=f"correct {name}")


def build_prompts(split: Dataset, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> list[Prompt]:
    """Returns the first distinct prompts of a tokenised split, with the tokens that the model receives in training.

    Args:
        split: pairs from `prepare_data`; a pair whose answers begin with a user's turn is left out.
        tokenizer: the one that tokenised the split.
        limit: maximum number of prompts; None for all.
    """
    chosen_ids: dict[tuple[int, ...], list[int]] = {}
    for row in split:
        if first_turn := take_first_turn(row):
            chosen_ids.setdefault(tuple(row["prompt_ids"]), first_turn)
        if len(chosen_ids) == limit:
            break
    return [
        Prompt(tokenizer.decode(ids), tokenizer.decode(chosen, skip_special_tokens=True), ids)
        for ids, chosen in islice(chosen_ids.items(), limit)
    ]


def write_answers(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    base: PreTrainedModel | None,
    tuned: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    end: str | None = None,
) -> dict[str, Any]:
    """Samples both models' answers and writes answers.jsonl and answers.json; returns the content of answers.json.

    answers.jsonl has a record for each prompt: `prompt`, `chosen`, and under `base` and `tuned` each answer's `text`,
    `tokens` and `ended`. answers.json has the `settings`, the number of prompts, the number of prompts that lost their
    beginning because prompt and answer exceed the model's positions, and under `base` and `tuned` the statistics of
    `count_answers`.

    All processes call this together, each with whole models (nothing sharded). Each takes every n-th batch, and a
    batch's number sets its rows and its seed: the answers do not depend on the number of processes.

    Args:
        folder: exists, without answers; a new folder for each evaluation.
        prompts: at least one.
        base: None if `tuned` is a PeftModel on it: its adapter is then switched off. If a run continued the training of
            an adapter, its base is the adapter before that run, and must be passed.
        tuned: the model with the tuned weights or adapter.
        tokenizer: of both models.
        sampling: settings of both models.
        end: the token of the start that wrote the tuned weights (`RunDir.find_end`); kept in answers.json.

    Raises:
        DataError: no prompts.
        ModelError, SettingsError: as `find_prompt_limit`.
        RunFolderError: the files cannot be written; on every process.
    """
    if not prompts:
        raise DataError("no prompts to answer", expected="one or more", do="name held-out data with usable rows")
    limit, ends = find_prompt_limit(base, tuned, sampling), Renderer(tokenizer).ends
    encoded = [list(p.ids) if p.ids is not None else encode_prompt(tokenizer, p.text) for p in prompts]
    shortened = [_keep_end(ids, limit, bos=tokenizer.bos_token_id) for ids in encoded]
    with _switch_to_base(base, tuned):
        model = tuned if base is None else base
        base_answers = _sample(model, tokenizer, shortened, sampling=sampling, ends=ends, name="base")
    tuned_answers = _sample(tuned, tokenizer, shortened, sampling=sampling, ends=ends, name="tuned")
    cut = sum(len(short) < len(ids) for short, ids in zip(shortened, encoded, strict=True))
    outcome = {
        "end": end,
        "settings": asdict(sampling) | {"prompts": len(prompts), "cut_prompts": cut},
        "base": count_answers(base_answers),
        "tuned": count_answers(tuned_answers),
    }
    records = (
        {"prompt": prompt.text, "chosen": prompt.chosen, "base": _record(base_answer), "tuned": _record(tuned_answer)}
        for prompt, base_answer, tuned_answer in zip(prompts, base_answers, tuned_answers, strict=True)
    )
    decide_on_main_process(lambda: _write(folder, records, outcome))
    return outcome


def find_prompt_limit(
    base: PreTrainedModel | None, tuned: PreTrainedModel | PeftModel, sampling: Sampling
) -> int | None:
    """Returns the most tokens a prompt may have if its answer must fit as well; None if no model limits positions.

    Raises:
        ModelError: no base, and no adapter to switch off.
        SettingsError: the longest answer alone fills the model's positions.
    """
    if base is None and not isinstance(tuned, PeftModel):
        raise ModelError(
            "the tuned model has no adapter to switch off, and no base was given",
            expected="a base model for a tuned model that is not an adapter",
            do="name the model that the run began with as the base",
        )
    models = [model for model in (base, tuned) if model is not None]
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    positions = min((number for number in limits if number is not None), default=None)
    if positions is None:
        return None
    if sampling.max_new_tokens >= positions:
        raise SettingsError(
            f"max_new_tokens is {sampling.max_new_tokens:,}, but the model has only {positions:,} positions",
            expected="positions for the prompt and its answer",
            do=f"lower max_new_tokens, to {positions // 2:,} for instance",
        )
    return positions - sampling.max_new_tokens


def _keep_end(ids: list[int], limit: int | None, *, bos: int | None) -> list[int]:
    """Returns the prompt's last tokens, as training does; a BOS stays in front if the limit is above 1."""
    if limit is None or len(ids) <= limit:
        return ids
    head = ids[:1] if ids[0] == bos and limit > 1 else []
    return head + ids[len(ids) - limit + len(head) :]


def _switch_to_base(base: PreTrainedModel | None, tuned: PreTrainedModel | PeftModel) -> AbstractContextManager[Any]:
    if base is not None:
        return nullcontext()
    assert isinstance(tuned, PeftModel)
    without_adapter: AbstractContextManager[Any] = tuned.disable_adapter()
    return without_adapter


def _sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    sampling: Sampling,
    ends: Sequence[int],
    name: str,
) -> list[Answer]:
    """Returns all answers in the order of the prompts, on every process: each samples its share of the batches."""
    state, size = PartialState(), sampling.batch_size
    starts = range(0, len(prompts), size)
    share = range(state.process_index, len(starts), state.num_processes)
    answers: list[tuple[int, list[Answer]]] = []
    for number in track_progress(share, desc=f"answers of {name}", unit="batch"):
        batch = generate_answers(
            model,
            tokenizer,
            prompts[starts[number] : starts[number] + size],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed + number,
            batch_size=size,
            ends=ends,
        )
        answers.append((number, batch))
    return [answer for _, batch in sorted(gather_object(answers), key=lambda item: item[0]) for answer in batch]


def _record(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "tokens": len(answer.ids), "ended": answer.ended}


def _write(folder: Path, records: Iterable[Mapping[str, Any]], outcome: dict[str, Any]) -> None:
    """Writes both files, answers.json last: so it never describes other answers than those in answers.jsonl."""
    path = folder / "answers.jsonl"
    part = folder / f".{path.name}.part-{os.getpid()}"
    try:
        part.unlink(missing_ok=True)
        with part.open("x") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(folder)
        write_json(folder / "answers.json", outcome)
    except OSError as error:
        raise find_disk_trouble(error) or error from error
    finally:
        part.unlink(missing_ok=True)
