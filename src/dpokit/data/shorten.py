"""Cuts pairs that are too long: first the answers' ends, then whole turns of the prompt, and only then its tokens."""

import math
import re
from dataclasses import dataclass

from dpokit.data.formats import SYSTEM_ROLES
from dpokit.data.messages import Messages, UnusableError
from dpokit.data.transcripts import ASSISTANT, HUMAN

Ids = list[int]
_TURNS = re.compile(f"({HUMAN}|{ASSISTANT})")


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


def cut(prompt: Ids, chosen: Ids, rejected: Ids, limits: LengthLimits, *, fixed: int = 0) -> tuple[Ids, Ids, Ids]:
    """Cuts a pair to the limits: answers lose their end, and the prompt loses its start.

    Args:
        prompt, chosen, rejected: token ids.
        limits: the limits.
        fixed: tokens at the prompt's start that stay, such as 1 for a BOS.

    Raises:
        UnusableError: `no_room` if the limits leave no token of the prompt or of an answer.
    """
    prompt_limit, answer_limit = limits.fit(len(prompt), max(len(chosen), len(rejected)), fixed=fixed)
    chosen, rejected = chosen[:answer_limit], rejected[:answer_limit]
    if len(prompt) > prompt_limit:
        if prompt_limit <= fixed:
            raise UnusableError("no_room")
        prompt = prompt[:fixed] + prompt[len(prompt) - prompt_limit + fixed :]
    if not chosen or not rejected:
        raise UnusableError("no_room")
    return prompt, chosen, rejected


def list_shorter(prompt: str | Messages) -> list[str | Messages]:
    """Returns the prompt without the turns before its second question, before its third one, and so on.

    Turns before the first question, such as a greeting, are left out first. A system turn at the start stays. A text
    is parted if it is an HH transcript.
    """
    if isinstance(prompt, str):
        before, *rounds = prompt.split(HUMAN)
        return [before + "".join(HUMAN + text for text in rounds[first:]) for first in range(1, len(rounds))]
    system = _count_system(prompt)
    questions = [at for at, message in enumerate(prompt) if message["role"] == "user" and at > system]
    return [[*prompt[:system], *prompt[first:]] for first in questions]


def list_texts(prompt: str | Messages) -> list[str]:
    """Returns what each turn of a prompt says, without headers; a system turn is the first, "" without one."""
    if isinstance(prompt, str):
        return [*([] if HUMAN in prompt else [""]), *_TURNS.split(prompt)[::2]]
    texts = [message["content"] if isinstance(message["content"], str) else "" for message in prompt]
    return texts if _count_system(prompt) else ["", *texts]


def replace_text(prompt: str | Messages, at: int, text: str) -> str | Messages:
    """Returns the prompt with another text at this place of `list_texts`."""
    if isinstance(prompt, str):
        parts = _TURNS.split(prompt)
        parts[2 * (at if HUMAN in prompt else at - 1)] = text
        return "".join(parts)
    at -= not _count_system(prompt)
    return [*prompt[:at], {**prompt[at], "content": text}, *prompt[at + 1 :]]


def choose_text(tokens: list[int], excess: int, most: int) -> tuple[int, int]:
    """Returns which text of a prompt is cut next, and by how many tokens.

    A system turn keeps half of the room, and what the others leave of it; of the others the longest one is cut. Each
    keeps a token.

    Args:
        tokens: of each text of `list_texts`.
        excess: tokens that the prompt has beyond `most`.
        most: its limit.
    """
    system, *others = tokens
    if system > most // 2:
        return 0, min(excess, system - max(most // 2, 1))
    longest = max(others, default=0)
    return (1 + others.index(longest), min(excess, longest - 1)) if others else (0, 0)


def _count_system(prompt: Messages) -> int:
    return next((at for at, message in enumerate(prompt) if message["role"] not in SYSTEM_ROLES), len(prompt))
