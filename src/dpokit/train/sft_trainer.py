"""TRL's SFTTrainer on the chosen answers of tokenised pairs, with exact steps and metrics.

Overrides its private methods.
"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from dpokit.model.score import find_mask
from dpokit.model.shared_prefix import IGNORED
from dpokit.train.steps import Batch, StepTrainer


class AnswerCollator:
    """TRL's collator, with prompt and chosen answer in one row; and `counts`: whether each row is real or a dummy.

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
        return {**self._pad(examples), "counts": torch.tensor([row.get("counts", True) for row in rows])}


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
        """The number of predicted tokens (the first token of a row is not predicted); 0 for a dummy."""
        return float((batch["labels"][:, 1:] != IGNORED).sum()) if batch["counts"].all() else 0.0

    def count_positions(self, batch: Batch) -> tuple[float, float]:
        """The tokens of the rows, and the positions that are computed."""
        rows = batch["attention_mask"]
        return float(rows.sum()), float(rows.numel())

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, a mean over the tokens of the batch; `measure` scales it to the batch's share of the step."""
        score = super().compute_loss
        return self.measure(
            inputs, lambda batch: score(model, batch, return_outputs=return_outputs), return_outputs=return_outputs
        )
