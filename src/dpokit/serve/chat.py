"""`dpokit chat`: base beside tuned in a terminal, by the same code that answers the page."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

from dpokit.data.formats import Messages
from dpokit.errors import SettingsError
from dpokit.serve.failures import LOST, describe, revive_device
from dpokit.serve.models import Models, Reply
from dpokit.serve.request_limits import Limits, RefusedError, Sampling, read_question
from dpokit.terminal import escape_controls

HELP = "Enter asks. {}/new begins anew, /end ends."
CHOICE = "/base or /tuned sets which answer the conversation goes on with (now {}); "
GAP = "  "


def answer_once(
    models: Models, messages: Messages, sampling: Sampling, *, on_text: Callable[[str, Reply], None] | None = None
) -> dict[str, Any]:
    """Every side's answer, and what is known of it.

    Args:
        models: loaded.
        messages: the conversation up to the question.
        on_text: gets each side and its answer so far.

    Raises: RefusedError: a conversation that the models have no room for.
    """
    replies = {}
    for side in models.names:
        replies[side] = models.answer(
            side,
            messages,
            sampling,
            on_text=partial(on_text, side) if on_text else lambda _: None,
            is_stopped=lambda: False,
        )
    rewards = models.find_rewards(messages, replies)
    return {
        "messages": messages,
        "sampling": vars(sampling),
        "answers": {
            side: {
                "model": models.names[side],
                "text": reply.text,
                "tokens": reply.tokens,
                "ended": reply.ended,
                "reward": rewards[side] if rewards is not None else None,
            }
            for side, reply in replies.items()
        },
    }


def ask_one(models: Models, prompt: str, sampling: Sampling, limits: Limits) -> dict[str, Any]:
    """`answer_once` to one question. Raises: SettingsError where it is refused."""
    try:
        return answer_once(models, [{"role": "user", "content": read_question(prompt, limits)}], sampling)
    except RefusedError as refusal:
        raise SettingsError(
            str(refusal), expected="a question that can be answered", do="correct --prompt, or look at the server"
        ) from None


def talk(models: Models, sampling: Sampling, *, limits: Limits, lines: TextIO, screen: TextIO) -> None:
    """Questions from `lines` and answers on `screen`, until there are no more or somebody says /end.

    Ctrl+C stops an answer, and ends the talk where there is none on its way.
    """
    messages: Messages = []
    goes_on = "tuned"

    def show_help() -> None:
        print(HELP.format(CHOICE.format(goes_on) if len(models.names) > 1 else ""), file=screen)

    show_help()
    while True:
        print("\n> ", end="", file=screen, flush=True)
        line = lines.readline()
        word = line.strip()
        if not line or word == "/end":
            return
        if word == "/new":
            messages = []
        elif word.removeprefix("/") in models.names and word.startswith("/"):
            goes_on = word.removeprefix("/")
        elif word.startswith("/"):
            show_help()
        elif word:
            try:
                asked: Messages = [*messages, {"role": "user", "content": read_question(word, limits)}]
                found = answer_once(models, asked, sampling, on_text=_Progress(screen))
            except Exception as failure:
                print(describe_here(failure), file=screen)
            except KeyboardInterrupt:
                print("\nstopped", file=screen)
            else:
                print_answers(found, screen)
                messages = [*asked, {"role": "assistant", "content": found["answers"][goes_on]["text"]}]


def describe_here(failure: Exception) -> str:
    """A failure in words; what a failed call holds is given back."""
    if not revive_device(failure):
        return LOST
    return escape_controls(describe(failure, hint=" ".join(str(failure).split())[:300]))


class _Progress:
    """One line that says how far an answer is; only where somebody looks on."""

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen if screen.isatty() else None

    def __call__(self, side: str, reply: Reply) -> None:
        if self._screen is None:
            return
        width = shutil.get_terminal_size().columns - 1
        shown = f"{side}: {' '.join(escape_controls(reply.text).split())}"
        shown = shown if len(shown) <= width else f"{side}: ...{shown[len(side) + 5 - width :]}"
        print(f"\r\033[K{shown[:width]}", end="", file=self._screen, flush=True)


def print_answers(found: dict[str, Any], screen: TextIO) -> None:
    """The answers side by side, or below each other where the terminal is narrow."""
    if screen.isatty():
        print("\r\033[K", end="", file=screen)
    columns = [_column(side, answer) for side, answer in found["answers"].items()]
    width = shutil.get_terminal_size().columns
    each = (width - len(GAP) * (len(columns) - 1)) // len(columns)
    if each < 30:
        for lines in columns:
            print("\n".join(_wrap(lines, width)), end="\n\n", file=screen)
        return
    wrapped = [_wrap(lines, each) for lines in columns]
    for at in range(max(map(len, wrapped))):
        cells = [lines[at] if at < len(lines) else "" for lines in wrapped]
        print(GAP.join(cell.ljust(each) for cell in cells).rstrip(), file=screen)


def _column(side: str, answer: dict[str, Any]) -> list[str]:
    notes = [f"{answer['tokens']:,} tokens"] if answer["tokens"] else []
    notes += ["ended by the model" if answer["ended"] else "cut at the limit"]
    if answer["reward"] is not None:
        notes += [f"implicit reward {answer['reward']:+.3f}"]
    model, text = (escape_controls(answer[name]) for name in ("model", "text"))
    return [f"{side}: {model}", *text.splitlines(), f"({', '.join(notes)})"]


def _wrap(lines: Sequence[str], width: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, width) or [""]]
