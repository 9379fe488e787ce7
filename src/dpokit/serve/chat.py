"""`dpokit chat`: base and tuned side by side in a terminal, with the same models as the page."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

from dpokit.data.messages import Messages
from dpokit.errors import SettingsError
from dpokit.serve.failures import LOST, describe_failure, revive_device
from dpokit.serve.models import ModelReply, Models
from dpokit.serve.request_limits import RefusedError, RequestLimits, SamplingSettings, read_question
from dpokit.terminal import escape_controls

HELP = "Enter sends the question. {}/new starts a new conversation, /end ends."
CHOICE = "/base or /tuned sets the answer that the conversation continues with (now {}); "
GAP = "  "


def answer_once(
    models: Models,
    messages: Messages,
    sampling: SamplingSettings,
    *,
    on_text: Callable[[str, ModelReply], None] | None = None,
) -> dict[str, Any]:
    """The answer of every side, with its model, tokens and implicit reward, as JSON values.

    Args:
        models: loaded models.
        messages: the conversation up to the question.
        sampling: how answers are sampled.
        on_text: called with the side and its answer so far.

    Raises: RefusedError: the conversation does not fit into the model's context.
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


def ask_one(models: Models, prompt: str, sampling: SamplingSettings, limits: RequestLimits) -> dict[str, Any]:
    """The result of `answer_once` for a single question. Raises: SettingsError if the question is refused."""
    try:
        return answer_once(models, [{"role": "user", "content": read_question(prompt, limits)}], sampling)
    except RefusedError as refusal:
        raise SettingsError(
            str(refusal), expected="a question that the models can answer", do="correct --prompt, or check the server"
        ) from None


def talk(models: Models, sampling: SamplingSettings, *, limits: RequestLimits, lines: TextIO, screen: TextIO) -> None:
    """Reads questions from `lines` and prints answers to `screen`, until the input ends or a line is /end.

    Ctrl+C stops an answer; between answers it ends the chat.
    """
    messages: Messages = []
    followed_side = "tuned"

    def show_help() -> None:
        print(HELP.format(CHOICE.format(followed_side) if len(models.names) > 1 else ""), file=screen)

    show_help()
    while True:
        print("\n> ", end="", file=screen, flush=True)
        line = lines.readline()
        text = line.strip()
        if not line or text == "/end":
            return
        if text == "/new":
            messages = []
        elif text.removeprefix("/") in models.names and text.startswith("/"):
            followed_side = text.removeprefix("/")
        elif text.startswith("/"):
            show_help()
        elif text:
            try:
                conversation: Messages = [*messages, {"role": "user", "content": read_question(text, limits)}]
                result = answer_once(models, conversation, sampling, on_text=_Progress(screen))
            except Exception as failure:
                print(free_and_describe(failure), file=screen)
            except KeyboardInterrupt:
                print("\nstopped", file=screen)
            else:
                print_answers(result, screen)
                messages = [*conversation, {"role": "assistant", "content": result["answers"][followed_side]["text"]}]


def free_and_describe(failure: Exception) -> str:
    """Frees the memory of a failed call, and returns the failure as text for the terminal."""
    if not revive_device(failure):
        return LOST
    return escape_controls(describe_failure(failure, hint=" ".join(str(failure).split())[:300]))


class _Progress:
    """Shows a growing answer on one line of a terminal; prints nothing to a file or pipe."""

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen if screen.isatty() else None

    def __call__(self, side: str, reply: ModelReply) -> None:
        if self._screen is None:
            return
        width = shutil.get_terminal_size().columns - 1
        shown = f"{side}: {' '.join(escape_controls(reply.text).split())}"
        shown = shown if len(shown) <= width else f"{side}: ...{shown[len(side) + 5 - width :]}"
        print(f"\r\033[K{shown[:width]}", end="", file=self._screen, flush=True)


def print_answers(result: dict[str, Any], screen: TextIO) -> None:
    """Prints the answers side by side, or below each other in a narrow terminal."""
    if screen.isatty():
        print("\r\033[K", end="", file=screen)
    columns = [_column(side, answer) for side, answer in result["answers"].items()]
    width = shutil.get_terminal_size().columns
    column_width = (width - len(GAP) * (len(columns) - 1)) // len(columns)
    if column_width < 30:
        for lines in columns:
            print("\n".join(_wrap(lines, width)), end="\n\n", file=screen)
        return
    wrapped = [_wrap(lines, column_width) for lines in columns]
    for row in range(max(map(len, wrapped))):
        cells = [lines[row] if row < len(lines) else "" for lines in wrapped]
        print(GAP.join(cell.ljust(column_width) for cell in cells).rstrip(), file=screen)


def _column(side: str, answer: dict[str, Any]) -> list[str]:
    notes = [f"{answer['tokens']:,} tokens"] if answer["tokens"] else []
    notes += ["ended by the model" if answer["ended"] else "cut at the limit"]
    if answer["reward"] is not None:
        notes += [f"implicit reward {answer['reward']:+.3f}"]
    model, text = (escape_controls(answer[name]) for name in ("model", "text"))
    return [f"{side}: {model}", *text.splitlines(), f"({', '.join(notes)})"]


def _wrap(lines: Sequence[str], width: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, width) or [""]]
