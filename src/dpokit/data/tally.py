"""Counts of a split's rows: kept, dropped by reason, and shortened."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from dpokit.data.messages import ROLE_NAMES
from dpokit.safe_console import SafeConsole

CUT = ("turns", "prompt", "answer")  # what a pair can lose to the length limits: whole turns of its prompt, or tokens
REASONS = {
    "empty_row": "the row has no value, or it cannot be read and --skip_bad_rows is set",
    "missing_text": "a prompt or an answer is missing or is not text",
    "no_answer_turn": "the conversation does not end with the assistant's answer, but with the role in brackets",
    "unknown_role": "a message has a role that no chat template knows",
    "bad_json": "the column in brackets is not the JSON that it should be",
    "bad_arguments": "the arguments of a tool call are not JSON",
    "reserved_argument": "chat_template_kwargs has an argument that preparation sets itself",
    "second_system_turn": "the system column has another text than the system turn of the prompt",
    "different_prompts": "chosen and rejected answer different prompts",
    "too_long_text": "a prompt or an answer has more than 8 million characters",
    "empty_prompt": "the prompt is empty",
    "refused_by_template": "the model's chat template refuses the conversation",
    "left_out_by_template": "the model's chat template leaves out a part of the conversation, of the role in brackets",
    "changed_by_template": "the model's chat template writes the prompt in another way once an answer follows",
    "reasoning_doubled_by_template": "the model's chat template writes a second block of reasoning",
    "rendered_for_other_model": "the prompt is already rendered, with the control tokens of another model",
    "raw_conversation": "the row has several turns or a system turn, whose roles --prompt_format raw would leave out",
    "rendered_prompt": "the prompt is already rendered, and the row has messages, a system text or tools",
    "rendered_answer": "an answer is a rendered conversation",
    "needs_fast_tokenizer": "the tokenizer does not tell which tokens belong to which of several turns",
    "needs_template": "the model has no chat template, which the message's key in brackets needs",
    "control_word": "a message has a character that is a control token of the model",
    "empty_answer": "an answer has no word",
    "end_inside_answer": "an answer has the text of a token that ends a turn, such as <|im_end|>, before its end",
    "tie": "the label or the scores call the answers equally good",
    "both_bad": "the label calls both answers bad",
    "small_gap": "no two answers have scores that differ by --min_score_gap",
    "missing_label": "the row has no label or score, or one that is not known",
    "one_answer": "the row has fewer than two answers",
    "equal_answers": "chosen and rejected are the same",
    "length_gap": "the answers' lengths differ by more than --max_length_gap tokens",
    "duplicate_pair": "an earlier row or source has the same prompt and answers",
    "over_source_cap": "the source has more pairs than --max_pairs_per_source",
    "over_share": "the source has more pairs than its share of the mixture",
    "equal_after_cut": "chosen and rejected are the same within the length limits",
    "over_max_eval_samples": "the held-out prompt has more pairs than max_eval_samples",
    "no_room": "the length limits leave no token of the prompt and of each answer",
}
# Pairs that are kept, but not rendered as they stand. data.json counts them.
NOTES = {
    "other_thinking_mode": "the prompt is that of the template's other thinking mode, which suits the answers",
    "reasoning_rebuilt": "the prompt opens reasoning, the template writes none in an answer, and so dpokit wrote it",
    "no_separator": "there is no white space between prompt and answer, which stand as they are (--prompt_format raw)",
    "rendered_already": "the prompt is already rendered, and taken as it is",
    "other_role": "the template does not know a role, such as developer, and got one that it knows, such as system",
    "argument_left_out": "the template does not read an argument of chat_template_kwargs",
    "reasoning_left_out": "the template leaves out the reasoning of an answer",
    "tools_left_out": "the template leaves out the tools",
    "token_across_boundary": "a token of the whole text lies across prompt and answer: both were encoded separately",
}
# The advice if no row is left.
_LENGTHS = "raise --max_length, --max_prompt_length or --max_completion_length"
_OTHER_COLUMNS = "name the columns of prompt and answers: --columns prompt=NAME,chosen=NAME,rejected=NAME"
_ROLES = f"write one of the roles {', '.join(ROLE_NAMES)}"
REMEDIES = {
    "empty_row": "write a prompt and two answers in each row",
    "missing_text": f"write the text of each message as a string, or {_OTHER_COLUMNS}",
    "no_answer_turn": f"end each conversation with the assistant's message, and {_ROLES}",
    "unknown_role": _ROLES,
    "bad_json": "write valid JSON, or leave the column out with --ignore_columns",
    "bad_arguments": "write the arguments of tool calls as objects or as JSON, or leave out such rows",
    "reserved_argument": "remove the argument from chat_template_kwargs",
    "second_system_turn": "keep the system turn or the system column: --ignore_columns NAME",
    "different_prompts": f"give both answers one prompt, or {_OTHER_COLUMNS}",
    "too_long_text": "leave out such rows",
    "empty_prompt": _OTHER_COLUMNS,
    "refused_by_template": "change the messages to what the template accepts, or use another model",
    "left_out_by_template": "use a model whose template has tools and all roles, or leave out such rows",
    "changed_by_template": "use the template of a model without reasoning, or leave out such rows",
    "reasoning_doubled_by_template": "write the reasoning in reasoning_content",
    "rendered_for_other_model": "write prompts as messages or as plain text, or give --prompt_format raw for a model "
    "without a chat template",
    "raw_conversation": "leave --prompt_format raw out, or write prompt and answers as texts",
    "rendered_prompt": "write the prompt as messages",
    "rendered_answer": "write answers without the template's words, or whole conversations as messages",
    "needs_fast_tokenizer": "use a model with a tokenizer.json",
    "needs_template": "use a model with a chat template",
    "control_word": "remove the character, or use another model",
    "empty_answer": "write an answer, or leave out such rows",
    "end_inside_answer": "remove this text from the answers",
    "tie": "vote for one of the answers",
    "both_bad": "vote for one of the answers",
    "small_gap": "lower --min_score_gap, or use --ranked best_worst",
    "missing_label": "write the label or the score as the layout has it, or leave out such rows",
    "one_answer": "write two or more answers into each row",
    "equal_answers": "give each row two different answers",
    "length_gap": "raise --max_length_gap",
    "duplicate_pair": "leave the source out: an earlier one has all of its pairs",
    "over_source_cap": "raise --max_pairs_per_source",
    "over_share": "raise the fraction or weight of this source: it is less than one pair",
    "equal_after_cut": _LENGTHS,
    "over_max_eval_samples": "raise --max_eval_samples",
    "no_room": _LENGTHS,
}
# Reasons that a flag or a share asks for: no warning tells of them.
CHOSEN = ("length_gap", "duplicate_pair", "over_source_cap", "over_share", "over_max_eval_samples")
MOST_DROPPED = 0.1  # of a split's rows, without a warning
MOST_DETAILS = 10  # of one reason; data.json counts further ones without their detail


def describe_reason(reason: str) -> str:
    """Returns the meaning of a key of `Tally.dropped`: a key of REASONS, perhaps with a detail in brackets."""
    return REASONS.get(_name_reason(reason), "")


def find_remedies(dropped: Counter[str]) -> str:
    """Returns the advice for these counts of dropped rows, that of the most frequent reason first."""
    remedies = (REMEDIES.get(_name_reason(reason), "check the rows") for reason, _ in dropped.most_common())
    return "; ".join(dict.fromkeys(remedies))


def _name_reason(reason: str) -> str:
    return reason.partition(" (")[0]


@dataclass
class Tally:
    """The counts of one split."""

    source: str
    layout: str
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    is_stream: bool = False  # the counts grow while the split is read
    sources: list["Tally"] = field(default_factory=list)  # of a mixture; their sums are the split's own counts

    @classmethod
    def of(cls, parts: Sequence["Tally"], source: str) -> "Tally":
        """Returns the counts of a split with these sources; of one source, its own."""
        if len(parts) == 1:
            return parts[0]
        layout = " + ".join(dict.fromkeys(part.layout for part in parts))
        whole = cls(source, layout, is_stream=parts[0].is_stream, sources=list(parts))
        for part in parts:
            whole.rows += part.rows
            whole.dropped += part.dropped
        return whole

    def drop(self, reason: str, number: int) -> None:
        """Counts usable pairs that are left out of the mixture; their rows are counted already."""
        if number:
            self.dropped[reason] += number

    def add(self, dropped: str, cut: str = "", notes: str = "") -> bool:
        """Counts one encoded row; returns whether it is kept."""
        self.rows += 1
        if dropped:
            name = _name_reason(dropped)
            if dropped not in self.dropped and sum(_name_reason(key) == name for key in self.dropped) >= MOST_DETAILS:
                dropped = name
            self.dropped[dropped] += 1
        else:
            self.shortened.update(cut.split())
            self.notes.update(notes.split())
        return not dropped

    @property
    def kept(self) -> int:
        return self.rows - self.dropped.total()

    def record(self) -> dict[str, Any]:
        """Returns the split's part of data.json."""
        return ({"streamed": True} if self.is_stream else {}) | {
            "source": self.source,
            "format": self.layout,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "shortened": {part: self.shortened[part] for part in CUT},
            "notes": dict(self.notes.most_common()),
            **({"sources": [source.record_source() for source in self.sources]} if self.sources else {}),
        }

    def record_source(self) -> dict[str, Any]:
        """Returns the part of data.json of one source of a mixture."""
        dropped = dict(self.dropped.most_common())
        return {
            "source": self.source,
            "format": self.layout,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dropped,
        }


def describe_losses(name: str, tally: Tally) -> str:
    """Returns a finding that names the main reason if more than MOST_DROPPED of a split's rows are dropped; else ""."""
    dropped = Counter({reason: count for reason, count in tally.dropped.items() if reason not in CHOSEN})
    if tally.is_stream or dropped.total() <= MOST_DROPPED * tally.rows:
        return ""
    reason, count = dropped.most_common(1)[0]
    share = dropped.total() / tally.rows
    return (
        f"{dropped.total():,} of {tally.rows:,} {name} rows ({share:.0%}) are dropped, {count:,} of them as "
        f"{reason} ({describe_reason(reason)}): {find_remedies(Counter({reason: count}))}"
    )


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the table on stderr: a line for each split, then a line for each reason and finding."""
    console = SafeConsole(stderr=True, highlight=False)
    table = Table(title="data", title_justify="left", box=None, pad_edge=False)
    for name in ("split", "format", "rows", "kept", "dropped", *(f"{part} cut" for part in CUT)):
        table.add_column(name, justify="left" if name in ("split", "format") else "right")
    splits = {name: report[name] for name in ("train", "eval") if report.get(name)}
    for name, split in splits.items():
        counts = [split["rows"], split["kept"], split["rows"] - split["kept"], *split["shortened"].values()]
        table.add_row(name, split["format"], *("-" if split.get("streamed") else f"{count:,}" for count in counts))
    console.print(table)
    if report.get("prompt_form"):
        console.print(f"  form of the prompts: {report['prompt_form']}")
    for name, split in splits.items():
        if split.get("streamed"):
            console.print(f"  {name}: a stream; its rows are counted while they are read")
            continue
        for source in split.get("sources", ()):
            kept = f"{source['rows']:,} rows, {source['kept']:,} kept"
            console.print(f"  {name}: {source['source']} ({source['format']}): {kept}", markup=False)
        for reason, count in split["dropped"].items():
            console.print(f"  {name}: {count:,} dropped as {reason}: {describe_reason(reason)}", markup=False)
        for note, count in split["notes"].items():
            console.print(f"  {name}: {count:,} with {note}: {NOTES[note]}", markup=False)
    if report.get("unused_columns"):
        console.print(f"  columns that no pair depends on: {', '.join(report['unused_columns'])}", markup=False)
    for finding in report["findings"]:
        console.print(f"  note: {finding}", markup=False)
