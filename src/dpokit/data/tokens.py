"""Turns pairs into token ids: the prompt as at inference, answers that end with EOS, both cut to the same limits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

from dpokit.data.chat_rendering import RenderedAnswer, RenderedPair
from dpokit.data.columns import FEATURES
from dpokit.data.layouts import Layout
from dpokit.data.messages import UnusableError
from dpokit.data.rendering import Ids, Renderer
from dpokit.errors import ModelError


@dataclass(frozen=True)
class LengthLimits:
    """The most tokens of a prompt, of an answer, and of both together; None for no limit."""

    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    total_tokens: int | None = None


def cut(
    prompt: Ids, chosen: Ids, rejected: Ids, limits: LengthLimits, *, keep_first: bool = False
) -> tuple[Ids, Ids, Ids]:
    """Cuts a pair to the limits: the prompt keeps its end, the answers keep their start, and both have one prompt.

    If prompt and answer exceed `total_tokens`, the cut shortens the prompt's start first, down to the one token that
    predicts the answer's first token, and then the answer's end.

    Args:
        prompt, chosen, rejected: token ids.
        limits: the limits.
        keep_first: whether the prompt's first token is a BOS, which stays.

    Raises:
        UnusableError: `no_room` if the limits leave no token of the prompt or of an answer.
    """
    chosen, rejected = chosen[: limits.answer_tokens], rejected[: limits.answer_tokens]
    fixed = int(keep_first)
    prompt_limit = len(prompt) if limits.prompt_tokens is None else limits.prompt_tokens
    if limits.total_tokens is not None:
        longest = max(len(chosen), len(rejected))
        prompt_limit = min(prompt_limit, max(limits.total_tokens - longest, fixed + 1))
        answer_limit = max(limits.total_tokens - min(prompt_limit, len(prompt)), 0)
        chosen, rejected = chosen[:answer_limit], rejected[:answer_limit]
    if len(prompt) > prompt_limit:
        if prompt_limit <= fixed:
            raise UnusableError("no_room")
        prompt = prompt[:fixed] + prompt[len(prompt) - prompt_limit + fixed :]
    if not chosen or not rejected:
        raise UnusableError("no_room")
    return prompt, chosen, rejected


@cache
def hash_code() -> str:
    """Returns the sha256 of what makes token ids of a row: the code of this package, and its libraries' versions."""
    digest = sha256("".join(f"{name} {version(name)}\n" for name in ("jinja2", "tokenizers", "transformers")).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass
class Encoder:
    """Turns batches of rows into token ids and masks, or into a reason for dropping them.

    Attributes:
        code: `datasets` keeps encoded rows under a hash of this object's attributes; with this one, rows that other
            code has encoded are encoded again.
    """

    renderer: Renderer
    layout: Layout
    limits: LengthLimits
    code: str = field(default_factory=hash_code)

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Encodes a batch of columns, pair by pair: the columns of FEATURES. A row without a pair has one entry.

        `dropped` is a reason or empty, `cut` names the shortened parts, `notes` has keys of `tally.NOTES`.
        """
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        rendered: list[RenderedPair | None] = []
        reasons: list[str] = []
        pairs = [(pair, index) for row, index in zip(rows, indices, strict=True) for pair in self.layout.to_pairs(row)]
        for pair, index in pairs:
            try:
                if isinstance(pair, UnusableError):
                    raise pair
                rendered.append(self.renderer.render(pair))
                reasons.append("")
            except ModelError as error:  # a template that does not end
                raise ModelError(f"in row {index + 1}, {error.seen}", expected=error.expected, do=error.do) from error
            except UnusableError as error:
                rendered.append(None)
                reasons.append(str(error))
        encoded = self._encode([pair for pair in rendered if pair is not None])
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for texts, reason, (_, index) in zip(rendered, reasons, pairs, strict=True):
            values = _Encoded()
            if texts is not None:
                try:
                    values = self._cut(next(encoded))
                except UnusableError as error:
                    reason = str(error)
            for name, value in {**vars(values), "row": index, "dropped": reason}.items():
                columns[name].append(value)
        return columns

    def encode_usable(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Encodes a batch and leaves out the dropped rows."""
        columns = self(batch, indices)
        used = [not reason for reason in columns["dropped"]]
        return {name: list(compress(values, used)) for name, values in columns.items()}

    def _encode(self, pairs: list[RenderedPair]) -> Iterator["_Encoded"]:
        """Yields the ids and masks of each pair, not yet cut."""
        prompts = self.renderer.encode_prompts([pair.prompt for pair in pairs])
        sides = [
            self._encode_answers(pairs, prompts, [pair.chosen for pair in pairs]),
            self._encode_answers(pairs, prompts, [pair.rejected for pair in pairs]),
        ]
        for pair, prompt, chosen, rejected in zip(pairs, prompts, *sides, strict=True):
            notes = sorted(pair.notes | chosen.notes | rejected.notes)
            yield _Encoded(prompt, chosen.ids, rejected.ids, chosen.mask, rejected.mask, notes=" ".join(notes))

    def _encode_answers(
        self, pairs: list[RenderedPair], prompts: list[Ids], answers: list[RenderedAnswer]
    ) -> list["_EncodedAnswer"]:
        renderer = self.renderer
        alone = renderer.encode_continued([answer.text for answer in answers])
        encoded = [_EncodedAnswer(ids, []) for ids in alone]
        joined = [at for at, pair in enumerate(pairs) if pair.is_joined]
        texts = [pairs[at].prompt + answers[at].text for at in joined]
        for at, ids in zip(joined, renderer.encode_prompts(texts) if texts else [], strict=True):
            prompt = prompts[at]
            if ids[: len(prompt)] == prompt:
                encoded[at] = _EncodedAnswer(ids[len(prompt) :], [])
            elif ids != prompt + alone[at]:
                encoded[at] = _EncodedAnswer(alone[at], [], frozenset({"token_across_boundary"}))
        for at, answer in enumerate(answers):
            if answer.scored is not None:
                encoded[at] = replace(encoded[at], mask=renderer.find_mask(pairs[at].prompt, answer, encoded[at].ids))
        return encoded

    def _cut(self, pair: "_Encoded") -> "_Encoded":
        """Returns the pair cut to the limits. Raises: UnusableError if nothing is left, or the answers become equal."""
        ids = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        keep_first = ids[0][:1] == [self.renderer.tokenizer.bos_token_id]
        short = cut(*ids, self.limits, keep_first=keep_first)
        if short[1] == short[2]:
            raise UnusableError("equal_after_cut")
        chosen_mask, rejected_mask = pair.chosen_mask[: len(short[1])], pair.rejected_mask[: len(short[2])]
        if any(mask and not any(mask) for mask in (chosen_mask, rejected_mask)):
            raise UnusableError("no_room")  # the limit leaves none of the assistant's tokens
        parts = ["prompt"] if len(short[0]) < len(ids[0]) else []
        parts += ["answer"] if len(short[1]) < len(ids[1]) or len(short[2]) < len(ids[2]) else []
        return _Encoded(*short, chosen_mask, rejected_mask, " ".join(parts), pair.notes)


@dataclass(frozen=True)
class _EncodedAnswer:
    ids: Ids
    mask: list[int]
    notes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Encoded:
    """The columns of a row that its pair fills; see `columns.FEATURES`."""

    prompt_ids: Ids = field(default_factory=list)
    chosen_ids: Ids = field(default_factory=list)
    rejected_ids: Ids = field(default_factory=list)
    chosen_mask: list[int] = field(default_factory=list)
    rejected_mask: list[int] = field(default_factory=list)
    cut: str = ""
    notes: str = ""
