"""Cuts pairs that are too long: first the answers' ends, then whole turns of the prompt, and only then its tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpokit.data.formats import SYSTEM_ROLES
from dpokit.data.messages import Messages, UnusableError
from dpokit.data.transcripts import ASSISTANT, HUMAN

Ids = list[int]
PROBE = "probe"


@dataclass(frozen=True)
class LengthLimits:
    """The most tokens of a prompt, of an answer, and of both together; None for no limit.

    Attributes:
        prompt_share: the share of `total_tokens` that a long prompt keeps, however long the answers are.
    """

    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    total_tokens: int | None = None
    prompt_share: float = 0.5

    def fit(self, prompt: int, answer: int, *, fixed: int = 0) -> tuple[int, int]:
        """Returns the tokens that the prompt and the longer answer keep.

        An answer keeps what the prompt leaves of `total_tokens`, but need not go below `1 - prompt_share` of it. The
        prompt then keeps what the answer leaves.

        Args:
            prompt, answer: their numbers of tokens.
            fixed: tokens of the prompt that must not remain alone, such as a BOS.
        """
        prompt = min(prompt, prompt if self.prompt_tokens is None else self.prompt_tokens)
        answer = min(answer, answer if self.answer_tokens is None else self.answer_tokens)
        total = self.total_tokens
        if total is None:
            return prompt, answer
        kept = min(prompt, max(min(math.ceil(self.prompt_share * total), total - 1), fixed + 1))
        answer = min(answer, max(total - kept, 0))
        return min(prompt, total - answer), answer


def cut(
    prompt: Ids, chosen: Ids, rejected: Ids, limits: LengthLimits, *, head: int = 0, fixed: int = 0
) -> tuple[Ids, Ids, Ids]:
    """Cuts a pair to the limits: answers lose their end, and the prompt loses tokens after its head.

    Args:
        prompt, chosen, rejected: token ids.
        limits: the limits.
        head: tokens at the prompt's start that stay, such as a system turn and the header of the question.
        fixed: the same for a prompt that is too short for `head`, such as 1 for a BOS.

    Raises:
        UnusableError: `no_room` if the limits leave no token of the prompt or of an answer.
    """
    prompt_limit, answer_limit = limits.fit(len(prompt), max(len(chosen), len(rejected)), fixed=fixed)
    chosen, rejected = chosen[:answer_limit], rejected[:answer_limit]
    if len(prompt) > prompt_limit:
        if prompt_limit <= fixed:
            raise UnusableError("no_room")
        kept = head if head < prompt_limit else fixed
        prompt = prompt[:kept] + prompt[len(prompt) - prompt_limit + kept :]
    if not chosen or not rejected:
        raise UnusableError("no_room")
    return prompt, chosen, rejected


def list_shorter(prompt: str | Messages) -> list[str | Messages]:
    """Returns the prompt without its first question and the turns up to the next, without two, and so on.

    A system turn at the start stays. A text is parted if it is an HH transcript.
    """
    if isinstance(prompt, str):
        before, *rounds = prompt.split(HUMAN)
        return [before + "".join(HUMAN + text for text in rounds[first:]) for first in range(1, len(rounds))]
    system = prompt[: _count_system(prompt)]
    questions = [at for at, message in enumerate(prompt) if message["role"] == "user"]
    return [[*system, *prompt[first:]] for first in questions[1:]]


def replace_first_question(prompt: str | Messages) -> str | Messages | None:
    """Returns the prompt with another first question, to find what precedes a question; None if it has none."""
    if isinstance(prompt, str):
        before, mark, rest = prompt.partition(HUMAN)
        if not mark:
            return PROBE
        _, mark, rest = rest.partition(ASSISTANT)
        return f"{before}{HUMAN} {PROBE}{mark}{rest}" if mark else None
    first = _count_system(prompt)
    if first == len(prompt) or prompt[first]["role"] != "user":
        return None
    return [*prompt[:first], {**prompt[first], "content": PROBE}, *prompt[first + 1 :]]


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of equal ids at the start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _count_system(prompt: Messages) -> int:
    return next((at for at, message in enumerate(prompt) if message["role"] not in SYSTEM_ROLES), len(prompt))
