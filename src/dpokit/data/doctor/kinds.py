"""The table of all findings: what each means, and what to do about it. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_EXAMPLES = 3
NO_RENSA = "nearly equal texts (pip install 'dpokit[data]' adds this search)"  # in `not_checked`


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        title: a name of at most 32 letters.
        why: why it matters, as a sentence.
        do: the flag that handles it; if there is no such flag, what to do in its place.
        share: the largest share of the pairs that is no finding yet.
    """

    title: str
    why: str
    do: str
    share: float = 0.0


KINDS = {
    "dropped": Kind(
        "rows without a usable pair",
        "Training leaves these rows out, so the model learns from less than the file holds.",
        "Correct the rows that the reasons name.",
        share=0.01,
    ),
    "repeated_pairs": Kind(
        "repeated pairs",
        "A pair that is there twice counts twice in the loss, and its answers are learnt by heart.",
        "Keep the first row of each: --drop_duplicates true.",
        share=0.01,
    ),
    "near_pairs": Kind(
        "nearly repeated pairs",
        "Pairs that differ in a few letters count as often as they are there, as repeated pairs do.",
        "Keep one row of each group; the examples show which rows are alike.",
        share=0.05,
    ),
    "near_prompts": Kind(
        "nearly repeated prompts",
        "--eval_fraction keeps equal prompts on one side, but not prompts that are only nearly equal.",
        "Name a split of other prompts with --dataset_test_split, or leave out all prompts of a group but one.",
        share=0.05,
    ),
    "opposite_pairs": Kind(
        "pairs that say the opposite",
        "One row prefers A to B and another B to A: the two cancel out, and the loss cannot fall below ln 2 on them.",
        "Decide which of the two is right; or tell the loss that labels are wrong: --label_smoothing 0.1.",
    ),
    "loops": Kind(
        "loops of preferences",
        "A is better than B, B than C, and C than A: no reward can order such answers.",
        "Leave out one pair of each loop; or tell the loss that labels are wrong: --label_smoothing 0.1.",
    ),
    "leaked_prompts": Kind(
        "held-out prompts also trained",
        "The evaluation then measures memory, and its accuracy says less about new prompts.",
        "Leave these rows out of one split; or hold prompts out of the training split: --eval_fraction 0.05.",
    ),
    "near_leaked_prompts": Kind(
        "held-out prompts nearly trained",
        "A prompt that differs in a few letters from a trained one says little about new prompts.",
        "Leave these rows out of the held-out split, or name another one with --dataset_test_split.",
        share=0.01,
    ),
    "length": Kind(
        "length as a shortcut",
        "Who always takes the longer (or the shorter) answer is often right, so the model learns a length.",
        "Weigh the tokens beyond the shorter answer's length less: --ld_alpha 0.5; or leave out pairs of very "
        "different lengths: --max_length_gap 100.",
    ),
    "opening": Kind(
        "first words as a shortcut",
        "The first words of an answer alone tell which one is preferred, so a model can learn these words only.",
        "Look at the openings in the table, and leave out or rewrite the answers of one source that begin alike.",
    ),
    "refusal": Kind(
        "refusals as a shortcut",
        "Whether an answer refuses tells which one is preferred, so the model learns to refuse always, or never.",
        "Add pairs in which the refusal is the other answer.",
    ),
    "markup": Kind(
        "lists, headings as a shortcut",
        "Lists, headings, bold text and code tell which answer is preferred, so the model learns a look.",
        "Add pairs whose answers both have lists, or leave out those in which only one has.",
    ),
    "punctuation": Kind(
        "punctuation as a shortcut",
        "Punctuation tells which answer is preferred, so the model learns marks in place of content.",
        "Look at the examples: often one of two sources wrote all rejected answers.",
    ),
    "script": Kind(
        "script as a shortcut",
        "The letters (Latin with or without accents, Cyrillic, Chinese, ...) tell which answer is preferred.",
        "Leave out pairs whose answers are in two languages, unless the choice of language is the lesson.",
    ),
    "all_shortcuts": Kind(
        "all shortcuts together",
        "A model that never reads the words can still tell many of the preferred answers.",
        "Handle the strongest shortcut of this table first, and check the data again.",
    ),
    "cut": Kind(
        "pairs cut by length limits",
        "The model never sees what is cut: the start of a prompt, or the end of an answer.",
        "Raise --max_length; the table of lengths says what each limit costs.",
        share=0.05,
    ),
    "control_characters": Kind(
        "control characters",
        "Control and direction characters are invisible to a reader, but they are tokens that a model learns.",
        "Remove them and write the file again, or leave these rows out.",
    ),
    "invisible_answers": Kind(
        "answers without a visible mark",
        "The answer holds only characters of no width, so the model learns to say nothing.",
        "Leave these rows out.",
    ),
    "damaged_text": Kind(
        "text in a wrong encoding",
        "UTF-8 that was read as Latin-1 or Windows-1252, or characters that were lost: the model learns them.",
        "Export the data again as UTF-8; the package ftfy repairs what cannot be exported again.",
    ),
    "keys": Kind(
        "keys and tokens",
        "A tuned model can repeat a key that it was trained on, and whoever reads the data can use it.",
        "Revoke the keys, and remove them from the data.",
    ),
    "emails": Kind(
        "e-mail addresses",
        "A tuned model can repeat an address that it was trained on; data of persons may not be published everywhere.",
        "Put a placeholder in their place, such as name@example.com, unless they are made up.",
        share=0.001,
    ),
    "phones": Kind(
        "phone numbers",
        "A tuned model can repeat a number that it was trained on; data of persons may not be published everywhere.",
        "Put a placeholder in their place, unless they are made up.",
        share=0.001,
    ),
}


@dataclass
class Finding:
    """How many rows are of a kind.

    Attributes:
        kind: a key of KINDS.
        count: of pairs, or of what `unit` names.
        total: of how many.
        detail: further numbers, as a sentence; "" for none.
        examples: texts, masked and shortened, by their names.
        do: the remedy, if it is not that of the kind.
        is_certain: for shortcuts, whether the accuracy is beyond chance; the share of other kinds decides.
    """

    kind: str
    count: int
    total: int
    unit: str = "pairs"
    detail: str = ""
    examples: Sequence[dict[str, str]] = field(default_factory=list)
    do: str = ""
    is_certain: bool | None = None

    @property
    def is_problem(self) -> bool:
        """Whether `--strict` fails on it."""
        if self.is_certain is not None:
            return self.is_certain
        return self.count > KINDS[self.kind].share * self.total

    def record(self) -> dict[str, Any]:
        """Returns JSON values, for data-check.json."""
        kind = KINDS[self.kind]
        return {
            "kind": self.kind,
            "title": kind.title,
            "is_problem": self.is_problem,
            "count": self.count,
            "total": self.total,
            "unit": self.unit,
            "detail": self.detail,
            "why": kind.why,
            "do": self.do or kind.do,
            "examples": list(self.examples)[:MOST_EXAMPLES],
        }
