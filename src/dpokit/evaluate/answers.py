"""Answers of base and tuned to the same held-out prompts, and what can be counted in them."""

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

from dpokit.console import track_progress
from dpokit.distributed.coordination import decide_on_main_process
from dpokit.errors import DataError, ModelError, SettingsError, find_disk_trouble
from dpokit.model.generate import Answer, count_answers, encode_prompt, generate_answers
from dpokit.rundir import sync_folder, write_json


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt as the model meets it.

    Attributes:
        text: rendered: chat template applied, or an HH transcript.
        chosen: the answer that was preferred, to be shown beside those of the models.
        ids: the prompt's tokens; None has the text encoded.
    """

    text: str
    chosen: str = ""
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; temperature 0 is greedy.

    Raises: SettingsError for a value that nothing can be sampled with.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        sound = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, and 1 at most"),
            "seed": (self.seed >= 0, "0 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
        }
        for name, (is_sound, expected) in sound.items():
            if not is_sound:
                raise SettingsError(f"{name} is {getattr(self, name)}", expected=expected, do=f"correct {name}")


def build_prompts(split: Dataset, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> list[Prompt]:
    """The first prompts of a tokenised split, each once, with the tokens that training gives the model.

    Args:
        split: pairs with `prompt_ids` and `chosen_ids`, as `prepare_data` makes them.
        tokenizer: it was tokenised with.
        limit: most prompts; None is all.
    """
    first: dict[tuple[int, ...], list[int]] = {}
    for row in split.select_columns(["prompt_ids", "chosen_ids"]):
        first.setdefault(tuple(row["prompt_ids"]), row["chosen_ids"])
        if len(first) == limit:
            break
    return [
        Prompt(tokenizer.decode(ids), tokenizer.decode(chosen, skip_special_tokens=True), ids)
        for ids, chosen in islice(first.items(), limit)
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
    """Samples both models' answers and writes answers.jsonl and answers.json; returns what the second holds.

    answers.jsonl has a record for each prompt: `prompt`, `chosen`, and under `base` and `tuned` each answer's `text`,
    `tokens` and `ended`. answers.json has the `settings`, with how many prompts there were and how many lost their head
    because prompt and answer exceed the model's positions, and under `base` and `tuned` what `count_answers` counts.

    All processes call this together, each with whole models (nothing sharded). They take turns with batches, which are
    cut and seeded by their number: as many processes as there are give the same answers.

    Args:
        folder: exists; files of these names are written anew.
        prompts: at least one.
        base: None where `tuned` is a PeftModel on it: its adapter is then switched off. A run that trained an adapter
            further has that adapter as it was as its base, which must be given.
        tuned: the model with the tuned weights or adapter.
        tokenizer: of both.
        sampling: how.
        end: the token of the start that wrote the tuned weights (`RunDir.find_end`); kept in answers.json.

    Raises:
        DataError: no prompts.
        ModelError, SettingsError: as `find_room`.
        RunFolderError: the files cannot be written; on every process.
    """
    if not prompts:
        raise DataError("no prompts to answer", expected="one or more", do="name held-out data with usable rows")
    room = find_room(base, tuned, sampling)
    encoded = [list(p.ids) if p.ids is not None else encode_prompt(tokenizer, p.text) for p in prompts]
    fitting = [_keep_end(ids, room, bos=tokenizer.bos_token_id) for ids in encoded]
    with _switch_to_base(base, tuned):
        of_base = _sample(tuned if base is None else base, tokenizer, fitting, sampling=sampling, name="base")
    of_tuned = _sample(tuned, tokenizer, fitting, sampling=sampling, name="tuned")
    cut = sum(len(short) < len(ids) for short, ids in zip(fitting, encoded, strict=True))
    outcome = {
        "end": end,
        "settings": asdict(sampling) | {"prompts": len(prompts), "cut_prompts": cut},
        "base": count_answers(of_base),
        "tuned": count_answers(of_tuned),
    }
    records = (
        {"prompt": prompt.text, "chosen": prompt.chosen, "base": _record(one), "tuned": _record(other)}
        for prompt, one, other in zip(prompts, of_base, of_tuned, strict=True)
    )
    decide_on_main_process(lambda: _write(folder, records, outcome))
    return outcome


def find_room(base: PreTrainedModel | None, tuned: PreTrainedModel | PeftModel, sampling: Sampling) -> int | None:
    """Most tokens of a prompt, so that its answer still has positions; None where no model has such a limit.

    Raises:
        ModelError: no base, and no adapter to switch off.
        SettingsError: answers so long that no prompt fits the model beside them.
    """
    if base is None and not isinstance(tuned, PeftModel):
        raise ModelError(
            "the tuned model has no adapter to switch off, and no base was given",
            expected="the base model beside a fully tuned one",
            do="name the model that the run began with as the base",
        )
    models = [model for model in (base, tuned) if model is not None]
    known = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    positions = min((number for number in known if number is not None), default=None)
    if positions is None:
        return None
    if sampling.max_new_tokens >= positions:
        raise SettingsError(
            f"max_new_tokens is {sampling.max_new_tokens:,}, but the model has only {positions:,} positions",
            expected="room for the prompt beside its answer",
            do=f"lower max_new_tokens, to {positions // 2:,} for instance",
        )
    return positions - sampling.max_new_tokens


def _keep_end(ids: list[int], room: int | None, *, bos: int | None) -> list[int]:
    """The prompt's end, as training keeps it; a BOS stays in front where there is room for more than that."""
    if room is None or len(ids) <= room:
        return ids
    head = ids[:1] if ids[0] == bos and room > 1 else []
    return head + ids[len(ids) - room + len(head) :]


def _switch_to_base(base: PreTrainedModel | None, tuned: PreTrainedModel | PeftModel) -> AbstractContextManager[Any]:
    if base is not None:
        return nullcontext()
    assert isinstance(tuned, PeftModel)
    switched: AbstractContextManager[Any] = tuned.disable_adapter()
    return switched


def _sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    sampling: Sampling,
    name: str,
) -> list[Answer]:
    """All answers in the order of the prompts, on every process: each samples its share of the batches."""
    state, size = PartialState(), sampling.batch_size
    starts = range(0, len(prompts), size)
    mine = range(state.process_index, len(starts), state.num_processes)
    answers: list[tuple[int, list[Answer]]] = []
    for number in track_progress(mine, desc=f"answers of {name}", unit="batch"):
        batch = generate_answers(
            model,
            tokenizer,
            prompts[starts[number] : starts[number] + size],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed + number,
            batch_size=size,
        )
        answers.append((number, batch))
    return [answer for _, batch in sorted(gather_object(answers), key=lambda one: one[0]) for answer in batch]


def _record(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "tokens": len(answer.ids), "ended": answer.ended}


def _write(folder: Path, records: Iterable[Mapping[str, Any]], outcome: dict[str, Any]) -> None:
    """Both files; answers.json goes first and comes last, so that it never speaks of other answers; so does a judge."""
    path = folder / "answers.jsonl"
    part = folder / f".{path.name}.part-{os.getpid()}"
    try:
        for name in ("answers.json", "judge.json"):
            (folder / name).unlink(missing_ok=True)
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
