"""Turns pairs into token ids: the prompt as at inference, answers that end with EOS, both within the length limits."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import compress, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from dpokit.data.chat_rendering import RenderedAnswer, RenderedPair
from dpokit.data.columns import FEATURES, hash_ids
from dpokit.data.formats import Pair
from dpokit.data.layouts import Layout
from dpokit.data.messages import UnusableError
from dpokit.data.rendering import Ids, Renderer
from dpokit.data.shorten import LengthLimits, choose_text, cut, list_shorter, list_texts, replace_text
from dpokit.errors import ModelError

MOST_TRIES = 8


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
        rendered: list[RenderedPair] = []
        usable: list[Pair | None] = []
        reasons: list[str] = []
        pairs = [(pair, index) for row, index in zip(rows, indices, strict=True) for pair in self.layout.to_pairs(row)]
        for pair, index in pairs:
            try:
                if isinstance(pair, UnusableError):
                    raise pair
                rendered.append(self.renderer.render(pair))
                usable.append(pair)
                reasons.append("")
            except ModelError as error:  # a template that does not end
                raise ModelError(f"in row {index + 1}, {error.seen}", expected=error.expected, do=error.do) from error
            except UnusableError as error:
                usable.append(None)
                reasons.append(str(error))
        encoded = self._encode(rendered)
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for whole, reason, (_, index) in zip(usable, reasons, pairs, strict=True):
            values = _Encoded()
            if whole is not None:
                try:
                    values = self._shorten(whole, next(encoded))
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

    def _check_ends(self, pair: "_Encoded") -> None:
        """Raises UnusableError if an answer has a token that ends a turn inside one of its turns."""
        ends, most = self.renderer.ends, self.renderer.end_count
        for ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)):
            turns = groupby(zip(mask or [1] * len(ids), ids, strict=True), key=itemgetter(0))
            counts = [sum(number in ends for _, number in turn) for is_scored, turn in turns if is_scored]
            if max(counts, default=0) > most:
                raise UnusableError("end_inside_answer")

    def _shorten(self, pair: Pair, whole: "_Encoded") -> "_Encoded":
        """Returns the encoded pair within the limits. Raises: UnusableError if too little or no difference is left."""
        self._check_ends(whole)
        fixed = int(whole.prompt_ids[:1] == [self.renderer.tokenizer.bos_token_id])
        encoded, parts = whole, list[str]()
        if len(whole.prompt_ids) > self._find_prompt_limit(whole, fixed):
            encoded, parts = self._shorten_prompt(pair, whole, fixed)
        ids = (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)
        short = cut(*ids, self.limits, fixed=fixed)
        if short[1] == short[2]:
            raise UnusableError("equal_after_cut")
        chosen_mask, rejected_mask = encoded.chosen_mask[: len(short[1])], encoded.rejected_mask[: len(short[2])]
        if any(mask and not any(mask) for mask in (chosen_mask, rejected_mask)):
            raise UnusableError("no_room")  # the limit leaves none of the assistant's tokens
        parts += ["prompt"] if len(short[0]) < len(ids[0]) and "prompt" not in parts else []
        parts += ["answer"] if len(short[1]) < len(ids[1]) or len(short[2]) < len(ids[2]) else []
        key, tokens = hash_ids(whole.prompt_ids), whole.count_tokens()
        return _Encoded(*short, chosen_mask, rejected_mask, key, tokens, " ".join(parts), encoded.notes)

    def _find_prompt_limit(self, pair: "_Encoded", fixed: int) -> int:
        answer = max(len(pair.chosen_ids), len(pair.rejected_ids))
        return self.limits.fit(len(pair.prompt_ids), answer, fixed=fixed)[0]

    def _shorten_prompt(self, pair: Pair, whole: "_Encoded", fixed: int) -> tuple["_Encoded", list[str]]:
        """Returns the pair with a prompt of fewer turns, and then of shorter texts; and what was cut.

        Headers stay, as the prompt is rendered again. A prompt that is already rendered, or that the template refuses
        in a shorter form, stays whole.
        """
        most = self._find_prompt_limit(whole, fixed)
        if isinstance(pair.prompt, str) and self.renderer.is_rendered(pair.prompt):
            return whole, []
        try:
            shorter = [replace(pair, prompt=prompt) for prompt in list_shorter(pair.prompt)]
            parts = ["turns"] if shorter else []
            if shorter:
                first = bisect_left(shorter, True, key=lambda candidate: len(self._encode_prompt(candidate)) <= most)
                pair = shorter[min(first, len(shorter) - 1)]
            ids = self._encode_prompt(pair)
            more = 0  # a text whose start was cut may have as many tokens as before
            while len(ids) > most and more < MOST_TRIES:
                parts = [*parts, "prompt"] if "prompt" not in parts else parts
                texts = list_texts(pair.prompt)
                sizes = [len(row) for row in self.renderer.encode(texts)]
                at, number = choose_text(sizes, len(ids) - most + more, most)
                if number <= 0:
                    break  # the headers alone have no room
                pair = replace(pair, prompt=replace_text(pair.prompt, at, self.renderer.drop_tokens(texts[at], number)))
                before, ids = len(ids), self._encode_prompt(pair)
                more = more + 1 if len(ids) >= before else 0
            return next(self._encode([self.renderer.render(pair)])), parts
        except UnusableError:
            return whole, []

    def _encode_prompt(self, pair: Pair) -> Ids:
        return self.renderer.encode_prompts([self.renderer.render(pair).prompt])[0]


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
    prompt_key: bytes = b""
    whole_tokens: int = 0
    cut: str = ""
    notes: str = ""

    def count_tokens(self) -> int:
        """Counts the prompt and the longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))
