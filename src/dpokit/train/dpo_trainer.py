"""TRL's DPOTrainer, with exact steps and exact metrics. Overrides its private methods.

Losses, PEFT and mixed precision are TRL's, unchanged. Its base classes change the rest: `steps` (batches, loss and
metrics), `resuming` and `saving` for each of TRL's trainers, `scoring` for DPO.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpokit.data.columns import IDS, count_tokens, hash_prompts
from dpokit.model.packed_rows import IGNORED, pack_pairs
from dpokit.model.score import ScoredTokenCollator
from dpokit.train.batches import Prompts
from dpokit.train.scoring import ScoringTrainer
from dpokit.train.steps import Batch, StepTrainer
from dpokit.train.transfer import HostBatch


class PairCollator:
    """TRL's collator, for rows that may have masks; adds the numbers of `OWN_KEYS` and `packed`, the pairs' layout."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None) -> None:
        self._pad = ScoredTokenCollator(tokenizer.pad_token_id, pad_to_multiple_of)

    def __call__(self, rows: list[Batch]) -> Batch:
        batch = HostBatch(self._pad(rows))
        ids, mask = batch["input_ids"], batch["completion_mask"]
        batch["needed_tokens"] = sum(len(row[name]) for row in rows for name in IDS)
        with suppress(ValueError):  # a pair without a layout, of which the first batch's check reports the reason
            batch["packed"] = packed = pack_pairs(ids, ids.masked_fill(mask == 0, IGNORED))
            # A branch lacks the answer's last token and has the prompt's last one, which the shared part lacks.
            batch["needed_tokens"] = packed.input_ids.shape[1] + len(packed.groups)
        batch["real"] = sum(row.get("counts", True) for row in rows)
        batch["row_tokens"] = int(batch["attention_mask"].sum())
        # The first token of a row is not predicted.
        batch["scored_tokens"] = mask[:, 1:].sum(dim=1).reshape(2, -1).sum(dim=1).tolist()
        return batch


class PairTrainer(StepTrainer, ScoringTrainer):
    """Trains on tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`, and masks of the scored tokens).

    Args:
        group_by_prompt: keep the pairs of one prompt together, in a step and in a micro-batch.
        arguments: of SavingTrainer and ScoringTrainer.
    """

    def __init__(self, *, group_by_prompt: bool = True, **arguments: Any) -> None:
        self._groups_by_prompt = group_by_prompt
        collator = PairCollator(arguments["processing_class"], arguments["args"].pad_to_multiple_of)
        super().__init__(data_collator=collator, **arguments)

    def weigh(self, batch: Batch) -> float:
        """The number of pairs; 0 for a dummy."""
        return float(batch["real"])

    def weigh_others(self, batch: Batch) -> Mapping[str, float]:
        """Numbers of scored tokens, for the metrics that are means over them."""
        chosen, rejected = map(float, batch["scored_tokens"])
        return {
            "entropy": chosen + rejected,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
            "mean_token_accuracy": chosen,
        }

    def find_prompts(self, rows: Dataset) -> Prompts | None:
        """The prompts of all pairs; None if their pairs are not kept together."""
        if not self._groups_by_prompt:
            return None
        return Prompts(hash_prompts(rows), count_tokens(rows, ("prompt_ids",)))

    def count_positions(self, batch: Batch) -> tuple[float, float]:
        """The tokens with each prompt and each answer of it once, and the positions that are computed."""
        needed = float(batch["needed_tokens"])
        return needed, needed if self.shared_prefix == "on" else float(batch["input_ids"].numel())

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, a mean over the pairs of the batch; `measure` scales it to the batch's share of the step."""
        self.prove_first_batch(model, inputs)
        self.drop_unused_layout(inputs)
        score = super().compute_loss
        return self.measure(
            inputs, lambda batch: score(model, batch, return_outputs=return_outputs), return_outputs=return_outputs
        )
