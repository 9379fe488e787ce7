"""Prepares the data of a run: tokenised splits, counts and held-out pairs."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from transformers import PreTrainedTokenizerBase

from dpokit.console import has_bars
from dpokit.data.columns import fingerprint_ids, hash_prompts, read_column
from dpokit.data.encode_rows import encode_rows, refuse_empty
from dpokit.data.formats import Pair
from dpokit.data.messages import Messages
from dpokit.data.mixture import Mixture, MixtureRules, Part, StreamPart, mix_pairs, mix_streams
from dpokit.data.rendering import Renderer
from dpokit.data.shorten import LengthLimits
from dpokit.data.source_rows import SourceRows, choose_rows, load_sources, naming_source
from dpokit.data.tally import Tally, describe_losses
from dpokit.data.text_columns import Rows
from dpokit.data.tokens import Encoder
from dpokit.data.transcripts import parse_transcript
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments

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
        for name, split in (("train", self.train), ("eval", self.eval)):
            if isinstance(split, Dataset):
                splits[name]["fingerprint"] = fingerprint_ids([split])
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
    return _prepare(data, renderer, max_length=max_length, with_eval=with_eval, processes=processes, seed=seed)[0]


def _prepare(
    data: DataArguments,
    renderer: Renderer,
    *,
    max_length: int | None,
    with_eval: bool,
    processes: int | None,
    seed: int = 0,
    streaming: bool | None = None,
) -> tuple[PreparedData, list[SourceRows], list[int]]:
    """Prepares the data; see `prepare_data`.

    Returns:
        The prepared data; the rows of each source of the held-out pairs, and the number of each held-out pair's source.
    """
    limits = find_limits(data, max_length)
    loaded = load_sources(data, streaming=data.dataset_streaming if streaming is None else streaming)
    title = data.describe()
    rules = MixtureRules(
        data.max_length_gap, data.drop_duplicates, data.max_pairs_per_source, data.balance_sources, data.mixture_seed
    )
    train_rows = choose_rows(data, loaded, training=True)
    eval_rows: list[SourceRows] = []
    if with_eval and data.eval_fraction is None:
        eval_rows = choose_rows(data, loaded, training=False)
    findings = []
    tallies = {}
    origins: list[int] = []
    if isinstance(train_rows[0].rows, IterableDataset):
        train: Rows
        train, tallies["train"] = _stream(train_rows, renderer, limits, rules, title, seed)
    else:
        mixture = _encode_parts(train_rows, renderer, limits, rules, processes)
        tallies["train"] = Tally.of([part.tally for part in train_rows], title)
        train, origins = mixture.pairs, mixture.origins
        if mixture.shared:
            findings.append(
                f"{mixture.shared:,} usable pairs are in an earlier source, too: --drop_duplicates true leaves them out"
            )
    held_out = None
    if eval_rows:
        for part in eval_rows:
            if isinstance(part.rows, IterableDataset):
                part.rows = Dataset.from_list(list(part.rows))  # bounded by max_eval_samples, which streams require
        whole = _encode_parts(eval_rows, renderer, limits, MixtureRules(), processes, shares=False)
        tallies["eval"] = Tally.of([part.tally for part in eval_rows], title)
        held_out, origins = whole.pairs, whole.origins
    elif isinstance(train, Dataset) and data.eval_fraction is not None:  # held out also if the run does not evaluate
        rest, taken = choose_held_out(train, data.eval_fraction, data.max_eval_samples)
        held_out, train = train.select(taken), train.select(rest)
        tallies["eval"] = _move(tallies["train"], [origins[pair] for pair in taken], data.eval_fraction)
        origins = [origins[pair] for pair in taken]
        surplus = origins[data.max_eval_samples or len(origins) :]
        if surplus:  # a single prompt has more pairs than max_eval_samples
            tallies["eval"].drop("over_max_eval_samples", len(surplus))
            for number, source in enumerate(tallies["eval"].sources):
                source.drop("over_max_eval_samples", surplus.count(number))
            origins = origins[: data.max_eval_samples]
            held_out = held_out.select(range(len(origins)))
        eval_rows = train_rows

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
    unused = list(dict.fromkeys(column for part in train_rows for column in part.layout.unused))
    prepared = PreparedData(
        train, held_out if with_eval else None, tallies, findings, fingerprint, unused, renderer.prompt_form
    )
    return prepared, eval_rows, origins


def _encode_parts(
    parts: Sequence[SourceRows],
    renderer: Renderer,
    limits: LengthLimits,
    rules: MixtureRules,
    processes: int | None,
    *,
    shares: bool = True,
) -> Mixture:
    """Returns the pairs of all sources; without `shares`, all of each."""
    encoded = []
    for number, part in enumerate(parts, 1):
        with naming_source(part.source, number, len(parts)):
            pairs = encode_rows(part.rows, Encoder(renderer, part.layout, limits), part.tally, processes)
        source = part.source if shares else replace(part.source, fraction=None, weight=None, count=None)
        encoded.append(Part(source, pairs, part.tally))
    return mix_pairs(encoded, rules)


def _stream(
    parts: Sequence[SourceRows], renderer: Renderer, limits: LengthLimits, rules: MixtureRules, title: str, seed: int
) -> tuple[IterableDataset, Tally]:
    """Returns the shuffled pairs of streams, and their counts, which grow while the streams are read."""
    for part in parts:
        part.tally.is_stream = True
    tally = Tally.of([part.tally for part in parts], title)
    streams = [StreamPart(part.source, part.rows, Encoder(renderer, part.layout, limits), part.tally) for part in parts]
    pairs = IterableDataset.from_generator(mix_streams(streams, rules, tally))
    if not any(True for _ in pairs.take(1)):
        raise refuse_empty(tally)
    return pairs.shuffle(seed=seed, buffer_size=STREAM_BUFFER_ROWS), tally


def _move(train: Tally, origins: Sequence[int], fraction: float) -> Tally:
    """Moves held-out pairs from the counts of the training split, and returns those of the held-out pairs."""
    name = f"{fraction:.2%} of the training pairs"
    counts = Counter(origins)
    held_out = Tally(name, train.layout, rows=len(origins))
    train.rows -= len(origins)
    for number, source in enumerate(train.sources):
        source.rows -= counts[number]
        held_out.sources.append(Tally(source.source, source.layout, rows=counts[number]))
    return held_out


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
    if data.eval_fraction is None:
        chosen = choose_rows(data, load_sources(data, streaming=False), training=False)
        mixture = _encode_parts(
            chosen, renderer, find_limits(data, max_length), MixtureRules(), processes, shares=False
        )
        tally = Tally.of([part.tally for part in chosen], " + ".join(part.source.title for part in chosen))
        pairs, origins = _count_changed(mixture.pairs, tally), mixture.origins
    else:
        prepared, chosen, origins = _prepare(
            data, renderer, max_length=max_length, with_eval=True, processes=processes, streaming=False
        )
        tally = prepared.tallies["eval"]
        assert prepared.eval is not None
        pairs = prepared.eval
    prompts, sources = [], []
    for number, row_number in zip(origins, read_column(pairs, "row"), strict=False):
        part = chosen[number]
        row = part.rows[row_number]
        prompts.append(next(pair.prompt for pair in part.layout.to_pairs(row) if isinstance(pair, Pair)))
        sources.append(str(row.get("source") or ""))
    return HeldOut(pairs, sources, prompts, [count_turns(prompt) for prompt in prompts], tally)


def find_limits(data: DataArguments, max_length: int | None) -> LengthLimits:
    """Returns the limits that the flags set; `max_length` is that of the model where the user set none."""
    return LengthLimits(data.max_prompt_length, data.max_completion_length, max_length, data.prompt_share)


def count_turns(prompt: str | Messages) -> int:
    """Counts the questions in a prompt; a plain text is one question."""
    messages = parse_transcript(prompt) if isinstance(prompt, str) else prompt
    return sum(message["role"] == "user" for message in messages)


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


def choose_held_out(train: Dataset, fraction: float, most_pairs: int | None) -> tuple[list[int], list[int]]:
    """Returns the numbers of the training pairs and of the held-out ones.

    All pairs of a prompt are on one side, and no seed decides on which.

    The number of held-out pairs differs from the fraction by less than the pairs of one prompt. If `most_pairs` is
    reached, the remaining prompts stay in training.

    Raises: DataError if all pairs have one prompt.
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
    return rest, held_out
