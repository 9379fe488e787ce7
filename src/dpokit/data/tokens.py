"""Turns pairs into token ids: the prompt as at inference, answers that end with EOS, both within the length limits."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

from dpokit.data.chat_rendering import RenderedAnswer, RenderedPair
from dpokit.data.columns import FEATURES, hash_ids
from dpokit.data.formats import Pair
from dpokit.data.layouts import Layout
from dpokit.data.messages import UnusableError
from dpokit.data.rendering import Ids, Renderer
from dpokit.data.shorten import LengthLimits, count_common, cut, list_shorter, replace_first_question
from dpokit.errors import ModelError


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
        """Raises UnusableError if an answer of one turn has a token that ends a turn before its end."""
        ends = self.renderer.ends
        for ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)):
            if not mask and sum(map(ids.count, ends)) > self.renderer.count_ends():
                raise UnusableError("end_inside_answer")

    def _shorten(self, pair: Pair, whole: "_Encoded") -> "_Encoded":
        """Returns the encoded pair within the limits. Raises: UnusableError if too little or no difference is left."""
        self._check_ends(whole)
        fixed = head = int(whole.prompt_ids[:1] == [self.renderer.tokenizer.bos_token_id])
        most = self._find_prompt_limit(whole, fixed)
        parts, encoded = [], whole
        if len(whole.prompt_ids) > most:
            pair, encoded = self._drop_turns(pair, whole, most)
            parts += ["turns"] if encoded is not whole else []
            most = self._find_prompt_limit(encoded, fixed)
            if len(encoded.prompt_ids) > most:
                parts.append("prompt")
                head = max(self._count_head(pair, encoded.prompt_ids, most), fixed)
        ids = (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)
        short = cut(*ids, self.limits, head=head, fixed=fixed)
        if short[1] == short[2]:
            raise UnusableError("equal_after_cut")
        chosen_mask, rejected_mask = encoded.chosen_mask[: len(short[1])], encoded.rejected_mask[: len(short[2])]
        if any(mask and not any(mask) for mask in (chosen_mask, rejected_mask)):
            raise UnusableError("no_room")  # the limit leaves none of the assistant's tokens
        parts += ["answer"] if len(short[1]) < len(ids[1]) or len(short[2]) < len(ids[2]) else []
        key, tokens = hash_ids(whole.prompt_ids), whole.count_tokens()
        return _Encoded(*short, chosen_mask, rejected_mask, key, tokens, " ".join(parts), encoded.notes)

    def _find_prompt_limit(self, pair: "_Encoded", fixed: int) -> int:
        answer = max(len(pair.chosen_ids), len(pair.rejected_ids))
        return self.limits.fit(len(pair.prompt_ids), answer, fixed=fixed)[0]

    def _drop_turns(self, pair: Pair, whole: "_Encoded", most: int) -> tuple[Pair, "_Encoded"]:
        """Returns the pair without the fewest whole turns of its prompt's start that leave at most `most` tokens.

        If its last question is longer, this question is left, and if the template refuses what is left, the whole pair.
        """
        shorter = [replace(pair, prompt=prompt) for prompt in list_shorter(pair.prompt)]

        def fits(candidate: Pair) -> bool:
            return len(self.renderer.encode_prompts([self.renderer.render(candidate).prompt])[0]) <= most

        if not shorter:
            return pair, whole
        try:
            chosen = shorter[min(bisect_left(shorter, True, key=fits), len(shorter) - 1)]
            return chosen, next(self._encode([self.renderer.render(chosen)]))
        except UnusableError:
            return pair, whole

    def _count_head(self, pair: Pair, prompt_ids: Ids, most: int) -> int:
        """Counts the tokens before the first question: a system turn and a header. 0 if `most` tokens have no room."""
        other = replace_first_question(pair.prompt)
        if other is None:
            return 0
        try:
            ids = self.renderer.encode_prompts([self.renderer.render(replace(pair, prompt=other)).prompt])[0]
        except UnusableError:
            return 0
        head, tail = count_common(ids, prompt_ids), count_common(ids[::-1], prompt_ids[::-1])
        return head if head + tail < most else 0


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
