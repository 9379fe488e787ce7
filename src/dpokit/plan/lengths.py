"""Counts a run's pairs, steps and tokens and finds its longest rows; of a Hub dataset, it reads only a sample."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder
from transformers import PreTrainedTokenizerBase

from dpokit.data.columns import IDS, MASKS
from dpokit.data.files import read_split_rows
from dpokit.data.paths import find_hub_name
from dpokit.data.prepare import prepare_data
from dpokit.errors import DataError
from dpokit.model.score import count_scored
from dpokit.plan.trace import Shape
from dpokit.settings.load import Settings
from dpokit.settings.mixture import is_local
from dpokit.train.batches import Batches

SAMPLE_PAIRS = 500
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Length:
    """Tokens of one pair's parts; `unscored` are those of both answers that the loss leaves out."""

    prompt: int
    chosen: int
    rejected: int
    unscored: int = 0

    @property
    def row_tokens(self) -> int:
        """Tokens of the longer of the pair's two rows."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def needed_tokens(self) -> int:
        """Tokens that are computed if both answers share the prompt."""
        return self.prompt + self.chosen + self.rejected

    @property
    def scored_tokens(self) -> int:
        """Tokens of both answers that the LM head scores."""
        return self.chosen + self.rejected - self.unscored

    @property
    def tokens(self) -> int:
        """Tokens of both rows: the prompt is computed with each answer."""
        return 2 * self.prompt + self.chosen + self.rejected


@dataclass(frozen=True)
class Data:
    """The lengths of a run's pairs.

    Attributes:
        train, evaluation: lengths of the pairs that were read; empty if the data was not reached.
        train_pairs: number of training pairs; None if unknown.
        how: `exact`, `estimated from N pairs`, or the reason why the lengths are unknown.
        longest: token ids and masks of the longest pairs, longest first, at most one micro-batch; empty if the data was
            not reached.
    """

    train: Sequence[Length]
    evaluation: Sequence[Length]
    train_pairs: int | None
    how: str
    longest: list[Row]

    @property
    def exact(self) -> bool:
        return self.how == "exact"


@dataclass(frozen=True)
class Steps:
    """The size of a run; None for fields that depend on an unknown number of pairs."""

    pairs: int | None
    global_batch_pairs: int
    steps_per_epoch: int | None
    total_steps: int | None
    tokens_per_epoch: int | None
    padding_share: float | None  # also None without padding
    longest_row_tokens: int | None
    how: str

    def record(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def load_data(settings: Settings, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None) -> Data:
    """Prepares local data as the run will; of a Hub dataset, reads the number of rows and streams a sample.

    An unreachable Hub dataset is not an error: the plan reports it and continues without the data.

    Raises: DataError for unusable local data.
    """
    sources = settings.data.sources()
    evaluates = settings.training.eval_strategy != "no"
    if sources and all(map(is_local, sources)) and not settings.data.dataset_streaming:
        prepared = prepare_data(
            settings.data,
            tokenizer,
            max_length=max_length,
            with_eval=evaluates,
            processes=settings.training.dataset_num_proc,
        )
        train = _lengths(prepared.train)
        held_out = [] if prepared.eval is None else _lengths(prepared.eval)
        return Data(train, held_out, len(train), "exact", _longest(prepared.train, train, settings))
    try:
        return sample_data(settings, tokenizer, max_length=max_length)
    except DataError as error:
        if not sources:
            raise
        return Data([], [], None, f"the data could not be read: {error.seen}", [])


def sample_data(settings: Settings, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None) -> Data:
    """Streams the first pairs for their lengths; the number of rows comes from the dataset's metadata.

    Raises: DataError if the dataset cannot be reached or read.
    """
    data = settings.data
    first = min(data.max_train_samples or SAMPLE_PAIRS, SAMPLE_PAIRS)
    changes: dict[str, Any] = {"dataset_streaming": True, "max_train_samples": first, "eval_fraction": None}
    sampled = replace(data, **changes)
    try:
        prepared = prepare_data(sampled, tokenizer, max_length=max_length, with_eval=False)
        pairs = list(prepared.train)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{data.describe()} could not be streamed: {' '.join(str(error).split())[:200]}",
            expected="a dataset that this machine can reach",
            do="check the name and the network",
        ) from error
    lengths = _lengths(pairs)
    rows = find_rows(settings)
    # The tally counts pairs where a row gives several; the rows that were read are never more than these.
    rows_read = min(rows or first, first, prepared.tallies["train"].rows)
    held_out = data.eval_fraction or 0.0  # also if the run does not evaluate
    train_pairs = None if rows is None else round(rows * len(lengths) / max(rows_read, 1) * (1 - held_out))
    return Data(lengths, [], train_pairs, f"estimated from {len(lengths)} pairs", _longest(pairs, lengths, settings))


def find_rows(settings: Settings) -> int | None:
    """Returns the rows of the training split, at most `--max_train_samples`; None if the metadata has no number.

    It reads only the metadata, no rows. A mixture has no number of its own.
    """
    data = settings.data
    source, *others = data.sources()
    if others or not isinstance(source.location, str):
        return None
    config_name = source.name or data.dataset_config
    if is_local(source):
        path = Path(source.location).expanduser()
        counts = read_split_rows(path, config_name) if path.is_dir() else {}
    else:
        identifier, revision = find_hub_name(source.location)
        try:
            splits = load_dataset_builder(identifier, config_name, revision=revision).info.splits or {}
        except (OSError, ValueError, RuntimeError):
            splits = {}
        counts = {name: split.num_examples for name, split in splits.items()}
    rows = counts.get(source.split or data.dataset_train_split)
    if not rows:
        return data.max_train_samples
    return int(min(rows, data.max_train_samples or rows))


def _lengths(pairs: Any) -> list[Length]:
    return [_measure(pair) for pair in pairs]


def _measure(pair: Mapping[str, Any]) -> Length:
    prompt, chosen, rejected = (len(pair[name]) for name in IDS)
    scored = count_scored(pair, "chosen") + count_scored(pair, "rejected")
    return Length(prompt, chosen, rejected, unscored=chosen + rejected - scored)


def _longest(pairs: Any, lengths: Sequence[Length], settings: Settings) -> list[Row]:
    shared = settings.data.shared_prefix
    order = sorted(range(len(lengths)), key=lambda i: -(lengths[i].needed_tokens if shared else lengths[i].row_tokens))
    most = max(settings.training.per_device_train_batch_size, settings.training.per_device_eval_batch_size)
    return [{name: list(pairs[i][name]) for name in (*IDS, *MASKS)} for i in order[:most]]


def find_worst(lengths: Sequence[Length], settings: Settings, *, pairs: int, max_length: int | None) -> Shape:
    """Returns the largest micro-batch, of the longest pairs; without data, of rows of `max_length` tokens.

    Args:
        pairs: pairs of one device in one micro-batch.
        max_length: the most tokens of a row.
    """
    if not lengths:
        tokens = max_length or 1024
        return Shape(pairs, tokens, 2 * pairs * (tokens - 1), ((1, tokens - 1, tokens - 1),) * pairs)
    longest = max(length.row_tokens for length in lengths)
    multiple = settings.training.pad_to_multiple_of
    if isinstance(multiple, int) and multiple:
        longest = math.ceil(longest / multiple) * multiple
    if settings.data.shared_prefix:
        most = sorted(lengths, key=lambda length: -length.needed_tokens)[:pairs]
        parts = tuple((length.prompt, length.chosen, length.rejected) for length in most)
        return Shape(len(most), longest, sum(length.scored_tokens for length in most), parts)
    answers = sorted((length.scored_tokens for length in lengths), reverse=True)[:pairs]
    return Shape(min(pairs, len(lengths)), longest, sum(answers))


def count_steps(data: Data, settings: Settings, *, devices: int) -> Steps:
    """Counts steps and tokens of a run on this number of devices; the share of padding is that of the first epoch."""
    training = settings.training
    per_device, micro_batches = training.per_device_train_batch_size, training.gradient_accumulation_steps
    batch = per_device * micro_batches * devices
    pairs = data.train_pairs
    per_epoch = None
    if pairs:
        whole = pairs // batch
        per_epoch = whole if training.dataloader_drop_last and whole else math.ceil(pairs / batch)
    total = training.max_steps if training.max_steps > 0 else None
    if total is None and per_epoch is not None:
        total = math.ceil(training.num_train_epochs * per_epoch)
    pairs_read = len(data.train)
    shared = settings.data.shared_prefix
    tokens = sum(length.needed_tokens if shared else length.tokens for length in data.train)
    padding = None if shared or not pairs_read else _padding_share(data.train, settings, devices=devices)
    return Steps(
        pairs=pairs,
        global_batch_pairs=batch,
        steps_per_epoch=per_epoch,
        total_steps=total,
        tokens_per_epoch=round(tokens / pairs_read * pairs) if pairs_read and pairs else None,
        padding_share=padding,
        longest_row_tokens=max((length.row_tokens for length in data.train), default=None),
        how=data.how,
    )


def _padding_share(lengths: Sequence[Length], settings: Settings, *, devices: int) -> float:
    training = settings.training
    batches = Batches(
        len(lengths),
        per_device=training.per_device_train_batch_size,
        world_size=devices,
        micro_batches=training.gradient_accumulation_steps,
        seed=training.seed if training.data_seed is None else training.data_seed,
    )
    tokens = padded = 0
    for batch in batches:
        batch_lengths = [lengths[i] for i in batch if i >= 0]
        tokens += sum(length.tokens for length in batch_lengths)
        padded += 2 * len(batch_lengths) * max((length.row_tokens for length in batch_lengths), default=0)
    return 1 - tokens / padded
