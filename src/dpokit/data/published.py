"""Published layouts of one pair a row that are converted into rows that `formats` reads. No torch."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpokit.data.formats import CHOSEN, PROMPTS, REJECTED, Named, Row
from dpokit.data.messages import ROLE_NAMES, Messages, UnusableError, describe_value, is_turns
from dpokit.data.transcripts import ASSISTANT, HUMAN, separate_turns

# The words with which a chat template begins the assistant's turn.
OPENINGS = re.compile(
    r"<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n|"
    r"<\|assistant\|>\n?|\[/INST\]"
)


@dataclass(frozen=True)
class Ranking:
    """Answers to one prompt, each with a score; a higher one is better.

    Attributes:
        prompt: None if each answer is a whole conversation.
    """

    answers: Sequence[tuple[Any, float]]
    prompt: Any = None


@dataclass(frozen=True)
class Published(Named):
    """A published layout that is converted.

    Attributes:
        looks: a description of its rows.
        columns: the columns that every row has, by the names that `convert` uses, each with the names that it may have
            in the rows.
        convert: returns a row of `formats`, or a ranking. Raises: UnusableError for a row that is not of this layout,
            or has no usable label.
        optional: further columns, which `convert` reads or knows to be of no use.
        by_name: whether rows have this layout only if `--format` names it.
        refuses_labels: whether rows have this layout only without a further column that ranks the answers, unless
            `--format` names it.
    """

    looks: str
    columns: Mapping[str, tuple[str, ...]]
    convert: Callable[[Row], Row | Ranking]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_name: bool = False
    refuses_labels: bool = False


def list_columns(*names: str, **renamed: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Returns `Published.columns`: each name alone, and the given names for others."""
    return {name: (name,) for name in names} | renamed


def ask(text: Any) -> dict[str, Any]:
    """Returns a user's message."""
    return {"role": "user", "content": text}


def reply(text: Any) -> dict[str, Any]:
    """Returns an assistant's message."""
    return {"role": "assistant", "content": text}


def read_texts(value: Any, name: str) -> list[str]:
    """Returns a list of texts. Raises: UnusableError for another value."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
        raise UnusableError("missing_text", f"{name} is {describe_value(value)}")
    return list(value)


# Layouts of one pair in a row.


def _alternate(texts: Any, name: str) -> Messages:
    turns = read_texts(texts, name)
    return [reply(text) if number % 2 else ask(text) for number, text in enumerate(turns)]


def _continue_steps(row: Row) -> Row:
    steps = row["steps"]
    if not isinstance(steps, str) or not isinstance(row["prompt"], str):
        raise UnusableError("missing_text", f"initial_reason_steps is {describe_value(steps)}")
    prompt = [ask(row["prompt"]), *([reply(steps)] if steps.strip() else [])]
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}


def _add_history(row: Row) -> Row:
    history = row.get("history") or []
    if not isinstance(history, (list, tuple)) or is_turns(history):
        raise UnusableError("missing_text", f"history is {describe_value(history)}")
    turns = [turn for entry in history for turn in _alternate(entry, "history")]
    chosen, rejected = row["answers"] if "answers" in row else (row["chosen"], row["rejected"])
    prompt = [*turns, ask(row["prompt"])] if "history" in row else row["prompt"]  # rows of one kind
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _read_two_outputs(row: Row) -> Row:
    if len(read_texts(row["answers"], "output")) != 2:
        raise UnusableError("missing_text", "output is not a list of two texts")
    return _add_history(row)


def _replace_last_answer(row: Row) -> Row:
    turns, rejected = row["messages"], row["rejected"]
    if not is_turns(turns) or isinstance(turns, Mapping):
        raise UnusableError("missing_text", f"messages is {describe_value(turns)}")
    role = str(turns[-1].get("role") or turns[-1].get("from")).strip().lower()
    if ROLE_NAMES.get(role) != "assistant":
        raise UnusableError("no_answer_turn", role[:40])
    if isinstance(rejected, str):
        rejected = [*turns[:-1], reply(rejected)]
    return {"chosen": list(turns), "rejected": rejected}


def _separate_turns(row: Row) -> Row:
    """Returns an HH transcript with empty lines before its turns."""
    texts = {}
    for name in ("chosen", "rejected"):
        text = row[name]
        if not isinstance(text, str) or not text.lstrip().startswith("Human:") or "\nAssistant:" not in text:
            raise UnusableError("no_answer_turn", "no transcript")
        texts[name] = separate_turns(text.lstrip())
        if texts[name] == text or HUMAN not in texts[name] or ASSISTANT not in texts[name]:
            raise UnusableError("no_answer_turn", "a usual transcript")
    _check_prompt(row)
    return texts


def _check_prompt(row: Row) -> None:
    """Raises UnusableError for a prompt beside whole conversations that is not a part inside both of them.

    Answers that begin with their prompt are of the layout "explicit, plain".
    """
    prompt = row.get("prompt")
    if prompt is None:
        return
    if not isinstance(prompt, str) or any(row[name].find(prompt) < 1 for name in ("chosen", "rejected")):
        raise UnusableError("different_prompts", "the prompt is not inside the conversations")


def _split_rendered(row: Row) -> Row:
    """Returns the parts of rendered conversations, of which each ends with an answer."""
    parts = {}
    for name in ("chosen", "rejected"):
        text = row[name]
        places = list(OPENINGS.finditer(text)) if isinstance(text, str) else []
        if not places:
            raise UnusableError("no_answer_turn", "no rendered conversation")
        parts[name] = (text[: places[-1].end()], text[places[-1].end() :])
    _check_prompt(row)
    if parts["chosen"][0] != parts["rejected"][0]:
        raise UnusableError("different_prompts")
    return {"prompt": parts["chosen"][0]} | {name: answer for name, (_, answer) in parts.items()}


def _rank_lists(row: Row) -> Ranking:
    good, bad = (read_texts(row[name], name) for name in ("chosen", "rejected"))
    return Ranking([(text, 1.0) for text in good] + [(text, 0.0) for text in bad], row["prompt"])


# Tried before the layouts of `formats`, which would take some of their rows without a column that counts.
PAIRED = (
    Published(
        "Step-DPO",
        "prompt, initial_reason_steps, chosen, rejected: strings; the answers continue the steps",
        list_columns(prompt=PROMPTS, chosen=CHOSEN, rejected=REJECTED, steps=("initial_reason_steps",)),
        _continue_steps,
        list_columns("full_chosen", "full_rejected", "answer"),
    ),
    Published(
        "LLaMA-Factory",
        "instruction, input, chosen, rejected: strings; history: list of [question, answer]",
        list_columns("history", prompt=PROMPTS, chosen=CHOSEN, rejected=REJECTED),
        _add_history,
    ),
    Published(
        "LLaMA-Factory v1",
        "instruction, input: strings; output: list of the chosen and the rejected answer",
        list_columns(prompt=PROMPTS, answers=("output",)),
        _read_two_outputs,
        list_columns("history"),
        refuses_labels=True,
    ),
    Published(
        "ms-swift",
        "messages: conversation with the chosen answer; rejected_response: string, or rejected_messages",
        list_columns(messages=("messages", "conversations"), rejected=("rejected_response", "rejected_messages")),
        _replace_last_answer,
    ),
    Published(
        "lists of answers",
        "prompt: string; chosen, rejected: lists of answers as strings",
        list_columns(prompt=PROMPTS, chosen=CHOSEN, rejected=REJECTED),
        _rank_lists,
    ),
    Published(
        "lists of turns",
        "chosen, rejected: lists of strings, a question and an answer in turn",
        list_columns(chosen=CHOSEN, rejected=REJECTED),
        lambda row: {name: _alternate(row[name], name) for name in ("chosen", "rejected")},
    ),
    Published(
        "transcript without empty lines",
        'chosen, rejected: strings with "Human:" and "\\nAssistant:" turns',
        list_columns(chosen=CHOSEN, rejected=REJECTED),
        _separate_turns,
        list_columns(prompt=PROMPTS),
    ),
    Published(
        "rendered conversations",
        "chosen, rejected: strings with the control tokens of a chat template",
        list_columns(chosen=CHOSEN, rejected=REJECTED),
        _split_rendered,
        list_columns(prompt=PROMPTS),
    ),
)
