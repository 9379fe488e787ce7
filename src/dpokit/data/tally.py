"""Counts of a split's rows: kept, dropped by reason, and shortened."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from dpokit.safe_console import SafeConsole

REASONS = {
    "missing_text": "a prompt or an answer is missing or is not text",
    "no_answer_turn": "the conversation does not end with the assistant's answer",
    "different_prompts": "chosen and rejected answer different prompts",
    "too_long_text": "a prompt or an answer has more than 8 million characters",
    "empty_prompt": "the prompt is empty",
    "refused_by_template": "the model's chat template refuses the conversation",
    "control_word": "a message has a character that is a control token of the model",
    "empty_answer": "an answer has no word",
    "tie": "the vote calls both answers equally good",
    "both_bad": "the vote calls both answers bad",
    "equal_answers": "chosen and rejected are the same",
    "equal_after_cut": "chosen and rejected are the same within the length limits",
    "over_max_eval_samples": "the held-out prompt has more pairs than max_eval_samples",
    "no_room": "the length limits leave no token of the prompt and of each answer",
}


@dataclass
class Tally:
    """The counts of one split."""

    source: str
    layout: str
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)

    def add(self, dropped: str, cut: str = "") -> bool:
        """Counts one encoded row; returns whether it is kept."""
        self.rows += 1
        if dropped:
            self.dropped[dropped] += 1
        else:
            self.shortened.update(cut.split())
        return not dropped

    @property
    def kept(self) -> int:
        return self.rows - self.dropped.total()

    def record(self) -> dict[str, Any]:
        """Returns the split's part of data.json."""
        return {
            "source": self.source,
            "format": self.layout,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "shortened": {"prompt": self.shortened["prompt"], "answer": self.shortened["answer"]},
        }


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the table on stderr: a line for each split, then a line for each reason and finding."""
    console = SafeConsole(stderr=True, highlight=False)
    table = Table(title="data", title_justify="left", box=None, pad_edge=False)
    for name in ("split", "format", "rows", "kept", "dropped", "prompt cut", "answer cut"):
        table.add_column(name, justify="left" if name in ("split", "format") else "right")
    splits = {name: report[name] for name in ("train", "eval") if report.get(name)}
    for name, split in splits.items():
        counts = [split["rows"], split["kept"], split["rows"] - split["kept"], *split["shortened"].values()]
        table.add_row(name, split["format"], *(f"{count:,}" for count in counts))
    console.print(table)
    for name, split in splits.items():
        for reason, count in split["dropped"].items():
            console.print(f"  {name}: {count:,} dropped as {reason}: {REASONS[reason]}")
    for finding in report["findings"]:
        console.print(f"  note: {finding}")
