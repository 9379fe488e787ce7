"""What became of the rows: kept, dropped and why, shortened, and what should give one pause."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from dpokit.safe_console import SafeConsole

REASONS = {
    "missing_text": "a prompt or an answer is missing or is no text",
    "no_answer_turn": "the conversation does not end with the assistant's answer",
    "different_prompts": "chosen and rejected answer different prompts",
    "too_long_text": "a prompt or an answer has more than 8 million letters",
    "empty_prompt": "there is no prompt",
    "refused_by_template": "the model's chat template refuses the conversation",
    "control_word": "a message holds a character that the model takes for a command",
    "empty_answer": "an answer has no word",
    "tie": "somebody who voted found both answers alike",
    "both_bad": "somebody who voted found both answers bad",
    "equal_answers": "chosen and rejected are the same",
    "equal_after_cut": "chosen and rejected are the same as far as the length limits let them be seen",
    "over_max_eval_samples": "max_eval_samples asks for fewer pairs than the held-out prompt has",
    "no_room": "the length limits leave no token of the prompt and of each answer",
}


@dataclass
class Tally:
    """Counts of one split, row by row."""

    source: str
    layout: str
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)

    def add(self, dropped: str, cut: str = "") -> bool:
        """Counts one encoded row; True where it is kept."""
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
        """The split's part of data.json."""
        return {
            "source": self.source,
            "format": self.layout,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "shortened": {"prompt": self.shortened["prompt"], "answer": self.shortened["answer"]},
        }


def print_report(report: Mapping[str, Any]) -> None:
    """The table on screen (stderr): a line for each split, then one for each reason and finding."""
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
