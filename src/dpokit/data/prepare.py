"""Prepares the data of a run: tokenised splits, counts and held-out pairs."""

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, LargeList, List
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from transformers import PreTrainedTokenizerBase

from dpokit.console import has_bars, say
from dpokit.data.columns import FEATURES, fingerprint_ids, hash_prompts, read_column
from dpokit.data.formats import Pair
from dpokit.data.layouts import ONE_PAIR, Layout, match_layout
from dpokit.data.messages import Messages
from dpokit.data.ranking import PairChoice
from dpokit.data.rendering import Renderer
from dpokit.data.shorten import LengthLimits
from dpokit.data.sources import Rows, get_split, load_splits
from dpokit.data.tally import Tally, describe_losses, find_remedies
from dpokit.data.tokens import Encoder
from dpokit.data.transcripts import parse_transcript
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments, parse_columns

SAMPLE_ROWS = 32
STREAM_BUFFER_ROWS = 10_000
MOST_CUT = 0.05  # of the pairs, without a warning


@dataclass
class PreparedData:
    """Tokenised pairs, each split with columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`.

    Attributes:
        train: a `Dataset`, or an `IterableDataset` when streamed.
        eval: held-out pairs, or None.
        tallies: counts of each split; those of a stream grow while it is read.
        findings: warnings for the screen and data.json.
        fingerprint: sha256 of the token ids of both splits; None for a stream.
        unused_columns: columns of ids, scores and other metadata, which no pair depends on.
        prompt_form: "chat template", "HH transcript" or "raw".
    """

    train: Rows
    eval: Dataset | None
    tallies: dict[str, Tally]
    findings: list[str]
    fingerprint: str | None
    unused_columns: list[str]
    prompt_form: str

    def record(self) -> dict[str, Any]:
        """Returns the content of data.json."""
        splits = {name: tally.record() for name, tally in self.tallies.items()}
        facts = {name: getattr(self, name) for name in ("findings", "fingerprint", "unused_columns", "prompt_form")}
        return {"train": None, "eval": None} | splits | facts


def prepare_data(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    with_eval: bool,
    processes: int | None = None,
    seed: int = 0,
) -> PreparedData:
    """Loads the rows, turns them into token ids, counts them, and holds out pairs for the evaluation.

    Args:
        data: dataset and limits.
        tokenizer: with an EOS token.
        max_length: most tokens of prompt and answer together.
        with_eval: whether held-out pairs are needed.
        processes: number of processes that tokenise.
        seed: seed for shuffling a stream; the trainer shuffles other datasets.

    Raises:
        DataError: the data is missing, broken, of no known layout, or without a usable pair.
        ModelError: the tokenizer has no EOS token.
    """
    (enable_progress_bar if has_bars() else disable_progress_bar)()
    renderer = Renderer(tokenizer, data.template_date, data.prompt_format)
    splits = _load(data, streaming=data.dataset_streaming)
    return _prepare_splits(
        splits, data, renderer, max_length=max_length, with_eval=with_eval, processes=processes, seed=seed
    )


def _prepare_splits(
    splits: dict[str, Rows],
    data: DataArguments,
    renderer: Renderer,
    *,
    max_length: int | None,
    with_eval: bool,
    processes: int | None,
    seed: int = 0,
) -> PreparedData:
    """Prepares splits that are already loaded; see `prepare_data`."""
    limits = find_limits(data, max_length)
    train_rows = get_split(splits, data.dataset_train_split, "dataset_train_split")
    eval_rows = None
    if with_eval and data.eval_fraction is None:
        eval_rows = get_split(splits, data.dataset_test_split, "dataset_test_split")
    if data.max_train_samples is not None:
        train_rows = _take(train_rows, data.max_train_samples)
    if eval_rows is not None and data.max_eval_samples is not None:
        eval_rows = _take(eval_rows, data.max_eval_samples)

    name = f"{data.dataset_name}, split {data.dataset_train_split}"
    layout = _find_layout_for(data, train_rows, name)
    encoder = Encoder(renderer, layout, limits)
    tallies = {"train": Tally(name, layout.name)}
    if isinstance(train_rows, IterableDataset):
        tallies["train"].is_stream = True
        train: Rows = _encode_stream(train_rows, encoder, tallies["train"], seed)
    else:
        train = _encode(train_rows, encoder, tallies["train"], processes)
    held_out = None
    if eval_rows is not None:
        name = f"{data.dataset_name}, split {data.dataset_test_split}"
        eval_layout = _find_layout_for(data, eval_rows, name)
        tallies["eval"] = Tally(name, eval_layout.name)
        if isinstance(eval_rows, IterableDataset):
            eval_rows = Dataset.from_list(list(eval_rows))  # bounded by max_eval_samples, which streams require
        held_out = _encode(eval_rows, Encoder(renderer, eval_layout, limits), tallies["eval"], processes)
    elif isinstance(train, Dataset) and data.eval_fraction is not None:  # held out also if the run does not evaluate
        train, held_out = _hold_out(train, data.eval_fraction, data.max_eval_samples)
        tallies["eval"] = Tally(f"{data.eval_fraction:.2%} of the training pairs", layout.name, rows=len(held_out))
        tallies["train"].rows -= len(held_out)
        surplus = len(held_out) - (data.max_eval_samples or len(held_out))
        if surplus > 0:  # a single prompt has more pairs than max_eval_samples
            tallies["eval"].dropped["over_max_eval_samples"] = surplus
            held_out = held_out.select(range(data.max_eval_samples or 0))

    findings = []
    if held_out is not None and isinstance(train, Dataset):
        trained_on = set(hash_prompts(train))
        repeated = sum(key in trained_on for key in hash_prompts(held_out))
        if repeated:  # the evaluation then says less about new prompts
            findings.append(f"{repeated:,} of {len(held_out):,} held-out pairs have a prompt that is also trained on")
    if held_out is not None:
        held_out = _count_changed(held_out, tallies["eval"])
    fingerprint = None
    if isinstance(train, Dataset):
        findings += _describe_cuts(train, limits)
        train = _count_changed(train, tallies["train"]).remove_columns("prompt_key")
        fingerprint = fingerprint_ids([train] if held_out is None else [train, held_out])
    for describe in (describe_losses, _describe_glued):
        findings += [line for name, tally in tallies.items() if (line := describe(name, tally))]
    held_out = held_out if with_eval else None
    return PreparedData(train, held_out, tallies, findings, fingerprint, list(layout.unused), renderer.prompt_form)


def _describe_glued(name: str, tally: Tally) -> str:
    """Returns a finding if most prompts end, and most answers begin, without white space between the two; else ""."""
    number = tally.notes["no_separator"]
    if number * 2 <= tally.kept:
        return ""
    return (
        f"{number:,} of {tally.kept:,} {name} pairs have no white space between prompt and answer: add it to the rows, "
        "or leave --prompt_format raw out, and they become HH transcripts"
    )


@dataclass
class HeldOut:
    """Held-out pairs, and the rows that they come from.

    Attributes:
        pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`.
        sources: the column `source` of each pair's row; empty texts without this column.
        prompts: the uncut prompt of each pair.
        turns: the number of questions in each prompt.
        tally: counts of the split.
    """

    pairs: Dataset
    sources: list[str]
    prompts: list[str | Messages]
    turns: list[int]
    tally: Tally


def prepare_held_out(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, processes: int | None = None
) -> HeldOut:
    """Returns the pairs on which a run with these settings is evaluated.

    Raises: DataError as `prepare_data`.
    """
    (enable_progress_bar if has_bars() else disable_progress_bar)()
    renderer = Renderer(tokenizer, data.template_date, data.prompt_format)
    splits = _load(data, streaming=False)
    if data.eval_fraction is None:
        raw = get_split(splits, data.dataset_test_split, "dataset_test_split")
        raw = raw if data.max_eval_samples is None else _take(raw, data.max_eval_samples)
        name = f"{data.dataset_name}, split {data.dataset_test_split}"
        layout = _find_layout_for(data, raw, name)
        tally = Tally(name, layout.name)
        limits = find_limits(data, max_length)
        pairs = _count_changed(_encode(raw, Encoder(renderer, layout, limits), tally, processes), tally)
    else:
        prepared = _prepare_splits(splits, data, renderer, max_length=max_length, with_eval=True, processes=processes)
        raw = get_split(splits, data.dataset_train_split, "dataset_train_split")
        layout = _find_layout_for(data, raw, str(data.dataset_name))
        tally = prepared.tallies["eval"]
        assert prepared.eval is not None
        pairs = prepared.eval
    rows = [raw[row] for row in read_column(pairs, "row")]
    prompts = [next(pair.prompt for pair in layout.to_pairs(row) if isinstance(pair, Pair)) for row in rows]
    sources = [str(row.get("source") or "") for row in rows]
    return HeldOut(pairs, sources, prompts, [count_turns(prompt) for prompt in prompts], tally)


def find_limits(data: DataArguments, max_length: int | None) -> LengthLimits:
    """Returns the limits that the flags set; `max_length` is that of the model where the user set none."""
    return LengthLimits(data.max_prompt_length, data.max_completion_length, max_length, data.prompt_share)


def count_turns(prompt: str | Messages) -> int:
    """Counts the questions in a prompt; a plain text is one question."""
    messages = parse_transcript(prompt) if isinstance(prompt, str) else prompt
    return sum(message["role"] == "user" for message in messages)


def _take(rows: Rows, number: int) -> Rows:
    return rows.take(number) if isinstance(rows, IterableDataset) else rows.select(range(min(number, len(rows))))


def _read(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Yields the rows. Raises: DataError: files of a stream are read only now, with errors of various types."""
    try:
        yield from rows
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{name} cannot be read: {' '.join(str(cause).split())[:300]}",
            expected="complete files with the same columns in every row",
            do="correct the file that the first line names, or name another",
        ) from error


def _load(data: DataArguments, *, streaming: bool) -> dict[str, Rows]:
    ignore = data.ignore_columns or ()
    skip_bad = data.skip_bad_rows
    return load_splits(data.dataset_name, data.dataset_config, streaming=streaming, ignore=ignore, skip_bad=skip_bad)


def _find_layout_for(data: DataArguments, rows: Rows, name: str) -> Layout:
    choice = PairChoice(data.ranked, data.min_score_gap)
    return find_layout(rows, name, parse_columns(data.columns), data.ignore_columns or (), data.format, choice)


def find_layout(
    rows: Rows,
    name: str,
    columns: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
    form: str | None = None,
    choice: PairChoice = ONE_PAIR,
) -> Layout:
    """Returns the layout of the first rows, with the columns of `--columns` in place of its own.

    Raises: DataError if there are no rows, if no known layout fits, or if an unused column looks like content.
    """
    first = islice(_read(rows, name), 10 * SAMPLE_ROWS)  # some of them may be bad rows, which are empty
    sample = list(islice((row for row in first if any(value is not None for value in row.values())), SAMPLE_ROWS))
    if not sample:
        raise DataError(f"{name} has no rows", expected="preference pairs", do="name another dataset or split")
    features: Features = rows.features or {}
    unpadded = [column for column, feature in features.items() if not _has_structs(feature)]
    return match_layout(sample, name, columns, unpadded=unpadded, ignored=ignored, form=form, choice=choice)


def _has_structs(feature: Any) -> bool:
    """Whether a column has Arrow structs, which have the keys of all rows; the objects of a JSON column do not."""
    return isinstance(feature, Mapping) or (isinstance(feature, (List, LargeList)) and _has_structs(feature.feature))


def _encode(rows: Dataset, encoder: Encoder, tally: Tally, processes: int | None) -> Dataset:
    began = time.time()
    several = encoder.layout.gives_several
    encoded = rows.map(
        encoder if several else encoder.encode_usable,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=FEATURES,
        num_proc=processes,
        desc=f"tokenising {tally.source}",
    )
    computed_now = any(Path(file["filename"]).stat().st_mtime >= began for file in encoded.cache_files)
    if computed_now and not has_bars():  # without a progress bar, a log gets one line
        say(f"tokenising {tally.source}: {len(rows):,} rows, {len(rows) / (time.time() - began):,.0f} rows/s")
    if several:  # the reason of a dropped pair cannot be told from the rows that are left
        reasons = read_column(encoded, "dropped")
        encoded = encoded.select([number for number, reason in enumerate(reasons) if not reason])
        tally.rows = len(encoded)
        for reason in filter(None, reasons):
            tally.add(reason)
        if not len(encoded):
            raise _no_pair_left(tally)
        return encoded.remove_columns("dropped")
    # The cache keeps only usable rows, contiguous on disk; the few others are encoded again for their reason.
    used = set(read_column(encoded, "row"))
    tally.rows = len(used)
    unusable = rows.select([row for row in range(len(rows)) if row not in used])
    for batch in unusable.iter(batch_size=1000):
        for reason in encoder(batch, range(len(next(iter(batch.values())))))["dropped"]:
            tally.add(reason)
    if not used:
        raise _no_pair_left(tally)
    return encoded.remove_columns("dropped")


def _count_changed(split: Dataset, tally: Tally) -> Dataset:
    """Counts shortened and noted pairs, and returns the split without these columns."""
    for column, counter in (("cut", tally.shortened), ("notes", tally.notes)):
        for keys in read_column(split, column):
            counter.update(keys.split())
    return split.remove_columns(["cut", "notes", "whole_tokens"])


def _describe_cuts(split: Dataset, limits: LengthLimits) -> list[str]:
    """Returns a warning if the limits cut many pairs; it names the `max_length` that would leave most of them whole."""
    cuts = sum(map(bool, read_column(split, "cut")))
    if cuts <= MOST_CUT * len(split):
        return []
    lengths = sorted(read_column(split, "whole_tokens"))
    held = {share: lengths[math.ceil(share * len(lengths)) - 1] for share in (0.95, 0.99)}
    advice = []
    if limits.total_tokens is not None and held[0.95] > limits.total_tokens:
        advice += [f"--max_length {tokens} leaves {share:.0%} whole" for share, tokens in held.items()]
    if limits.prompt_tokens is not None or limits.answer_tokens is not None:
        advice.append("raise --max_prompt_length or --max_completion_length")
    text = f"{cuts:,} of {len(split):,} training pairs ({cuts / len(split):.0%}) are cut by the length limits"
    return [f"{text}: {'; '.join(advice)}"]


def _encode_stream(rows: IterableDataset, encoder: Encoder, tally: Tally, seed: int) -> IterableDataset:
    names = list(next(iter(rows)))
    encoded = rows.map(encoder, batched=True, batch_size=256, with_indices=True, remove_columns=names)

    def kept_pairs() -> Iterator[dict[str, Any]]:
        # Every look at the first rows and every epoch starts the stream anew; each row counts once.
        for position, row in enumerate(_read(encoded, tally.source)):
            dropped, cut, notes = row.pop("dropped"), row.pop("cut"), row.pop("notes")
            del row["prompt_key"], row["whole_tokens"]
            if tally.add(dropped, cut, notes) if position >= tally.rows else not dropped:
                yield row

    kept = IterableDataset.from_generator(kept_pairs)
    if not any(True for _ in kept.take(1)):
        raise _no_pair_left(tally)
    return kept.shuffle(seed=seed, buffer_size=STREAM_BUFFER_ROWS)


def _hold_out(train: Dataset, fraction: float, most_pairs: int | None) -> tuple[Dataset, Dataset]:
    """Splits into training and held-out pairs; all pairs of a prompt are on one side, and no seed decides on which.

    The number of held-out pairs differs from the fraction by less than the pairs of one prompt. If `most_pairs` is
    reached, the remaining prompts stay in training.
    """
    keys = hash_prompts(train)
    pairs_of = Counter(keys)
    if len(pairs_of) < 2:
        raise DataError(
            "all training pairs have one prompt, so none can be held out",
            expected="at least two different prompts",
            do="name a split with --dataset_test_split, or --eval_strategy no --load_best_model_at_end false",
        )
    chosen: set[bytes] = set()
    target, taken = fraction * len(keys), 0
    for key in sorted(pairs_of):
        if pairs_of[key] > 2 * (target - taken):  # without it, the number is nearer to the target
            continue
        if chosen and most_pairs is not None and taken + pairs_of[key] > most_pairs:
            break
        chosen.add(key)
        taken += pairs_of[key]
    chosen = chosen or {min(sorted(pairs_of), key=pairs_of.__getitem__)}
    if len(chosen) == len(pairs_of):
        chosen.remove(max(chosen))
    held_out = [i for i, key in enumerate(keys) if key in chosen]
    rest = [i for i, key in enumerate(keys) if key not in chosen]
    return train.select(rest), train.select(held_out)


def _no_pair_left(tally: Tally) -> DataError:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.dropped.most_common())
    return DataError(
        f"no usable pair is left of the {tally.rows:,} rows of {tally.source} ({tally.layout}): {reasons}",
        expected="rows with a prompt and two different answers that fit the length limits",
        do=find_remedies(tally.dropped),
    )
