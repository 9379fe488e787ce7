"""TRL's SFTTrainer on the chosen answers of tokenised pairs, with exact steps and metrics.

Overrides its private methods.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from dpokit.model.packed_rows import IGNORED
from dpokit.model.score import find_mask
from dpokit.train.steps import Batch, StepTrainer
from dpokit.train.transfer import HostBatch


class AnswerCollator:
    """TRL's collator, with prompt and chosen answer in one row; adds the numbers of `OWN_KEYS`.

    Args:
        tokenizer: for its padding token.
        pad_to_multiple_of: of the width of a batch.
        answers_alone: no loss is computed on prompts, nor on the unscored tokens of answers.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None, *, answers_alone: bool
    ) -> None:
        self._pad = DataCollatorForLanguageModeling(
            pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=pad_to_multiple_of
        )
        self._answers_alone = answers_alone

    def __call__(self, rows: list[Batch]) -> Batch:
        examples = []
        for row in rows:
            prompt, answer = row["prompt_ids"], row["chosen_ids"]
            before, trained = prompt, answer
            if self._answers_alone:
                before = [IGNORED] * len(prompt)
                if mask := find_mask(row, "chosen"):
                    trained = [token if flag else IGNORED for token, flag in zip(answer, mask, strict=True)]
            examples.append({"input_ids": prompt + answer, "labels": before + trained})
        batch = HostBatch(self._pad(examples))
        batch["real"] = sum(row.get("counts", True) for row in rows)
        batch["needed_tokens"] = batch["row_tokens"] = int(batch["attention_mask"].sum())
        # The first token of a row is not predicted.
        batch["scored_tokens"] = int((batch["labels"][:, 1:] != IGNORED).sum())
        return batch


class AnswerTrainer(StepTrainer, SFTTrainer):
    """Trains on the chosen answers of tokenised pairs; a step's loss is the mean over its answer tokens."""

    columns = ("prompt_ids", "chosen_ids")
    shared_prefix = "off: a prompt has one answer"

    def __init__(self, **arguments: Any) -> None:
        args = arguments["args"]
        collator = AnswerCollator(
            arguments["processing_class"],
            args.pad_to_multiple_of,
            answers_alone=args.completion_only_loss is not False,
        )
        super().__init__(data_collator=collator, **arguments)

    def weigh(self, batch: Batch) -> float:
        """The number of predicted tokens; 0 for a dummy."""
        return float(batch["scored_tokens"]) if batch["real"] else 0.0

    def count_positions(self, batch: Batch) -> tuple[float, float]:
        """The tokens of the rows, and the positions that are computed."""
        return float(batch["needed_tokens"]), float(batch["attention_mask"].numel())

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, a mean over the tokens of the batch; `measure` scales it to the batch's share of the step."""
        score = super().compute_loss
        return self.measure(
            inputs, lambda batch: score(model, batch, return_outputs=return_outputs), return_outputs=return_outputs
        )
