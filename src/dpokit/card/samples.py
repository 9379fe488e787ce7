"""Samples of base and tuned side by side, as HTML that no sampled text can leave. No torch."""

from typing import Any

from markupsafe import Markup

from dpokit.card.escape import escape, escape_lines

MOST_LETTERS = 700  # of a prompt or an answer


def show_sample(sample: dict[str, Any]) -> Markup:
    """One line of HTML: the prompt, then the answers side by side; no text can leave its cell."""
    answers = [one for one in sample["answers"] if one["side"] != "chosen"]
    heads = Markup("").join(Markup("<th>{}</th>").format(one["side"]) for one in answers)
    cells = Markup("").join(
        Markup('<td valign="top"><code>{}</code>{}</td>').format(
            escape_lines(_cut(one["text"])), "" if not one["cut"] else " (cut off at the length limit)"
        )
        for one in answers
    )
    return Markup(
        "<details><summary>{}</summary><p><b>Prompt</b><br><code>{}</code></p>"
        "<table><thead><tr>{}</tr></thead><tbody><tr>{}</tr></tbody></table></details>"
    ).format(_first_words(sample["prompt"]), escape_lines(_cut(sample["prompt"], end=True)), heads, cells)


def _first_words(prompt: str) -> Markup:
    """Of the prompt's last question, for the line that unfolds a sample."""
    asked = [line for line in prompt.splitlines() if line.strip() and not line.strip().endswith("Assistant:")]
    words = " ".join((asked or ["a prompt"])[-1].removeprefix("Human:").split())
    return escape(words if len(words) <= 80 else f"{words[:77]}...")


def _cut(text: str, *, end: bool = False) -> str:
    """The text, or of a long one the head; its end where that matters, as in a prompt."""
    more = len(text) - MOST_LETTERS
    if more <= 0:
        return text
    return f"[{more:,} letters ...] {text[-MOST_LETTERS:]}" if end else f"{text[:MOST_LETTERS]} [... {more:,} letters]"
