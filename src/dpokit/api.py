"""The public Python API, for notebooks and scripts: `import dpokit`. Importing this module needs no torch.

Each function raises `DpokitError` for what the user can correct. Only a signal that asks a run to save and end raises
`SystemExit`, with exit code 75.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpokit.rundir import RunDir

if TYPE_CHECKING:
    from datasets import Dataset

NOTEBOOK = "notebook"  # the recipe's name in run.json if no recipe is named


def load_pairs(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    max_samples: int | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    format: str | None = None,
    ranked: str = "best_worst",
    min_score_gap: float = 0.0,
) -> "Dataset":
    """Reads the preference pairs of a dataset in any layout that training knows.

    Args:
        dataset_name: a Hub id, a file or a folder.
        dataset_config: the dataset's configuration, if it has several.
        split: which split.
        max_samples: reads only the first rows of the split.
        columns: columns of another name, as `--columns`: `{"prompt": "question", "chosen": "answers.best"}`.
        ignore_columns: columns that are left out, as `--ignore_columns`.
        format: the layout's name, as `--format`.
        ranked, min_score_gap: the pairs of rows with several answers, as `--ranked` and `--min_score_gap`.

    Returns:
        A `datasets.Dataset` with the columns `prompt`, `chosen` and `rejected`: texts, or lists of `{role, content}` if
        the prompts are messages; `tools` and `chat_template_kwargs`, as JSON, if a row has them; and `margin`, if a row
        has such a column or scores of its answers. `Dataset.to_json` writes a file that `dataset_name` accepts. Rows
        that hold no pair are left out; one line on stderr counts them by reason.

    Raises: DataError: the dataset cannot be read, has no known layout, or has a column of content that nothing uses.
        SettingsError: `columns` has an unknown name.
    """
    from datasets import Dataset

    from dpokit.console import quiet_dependencies, say
    from dpokit.data.messages import UnusableError
    from dpokit.data.ranking import PairChoice
    from dpokit.data.source_rows import find_layout
    from dpokit.data.sources import get_split, load_splits
    from dpokit.settings.flags import parse_columns

    quiet_dependencies()
    names = parse_columns([json.dumps(dict(columns))] if columns else None)
    splits = load_splits(dataset_name, dataset_config, streaming=False, ignore=ignore_columns)
    rows = get_split(splits, split, "split")
    rows = rows if max_samples is None else rows.take(max_samples)
    name = f"{dataset_name}, split {split}"
    layout = find_layout(rows, name, names, ignore_columns, format, PairChoice(ranked, min_score_gap))
    pairs: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for pair in (pair for row in rows for pair in layout.to_pairs(row)):
        if isinstance(pair, UnusableError):
            dropped[str(pair)] += 1
            continue
        values: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for side in ("chosen", "rejected"):
            if isinstance(values[side], str) and not isinstance(pair.prompt, str):
                values[side] = [{"role": "assistant", "content": values[side]}]
        if layout.has_context:
            values |= {"tools": pair.tools, "chat_template_kwargs": dict(pair.template_kwargs) or None}
        values["margin"] = pair.margin
        pairs.append(values)
    reasons = "".join(f", {count:,} rows left out ({reason})" for reason, count in dropped.most_common())
    say(f"{name}: {len(pairs):,} pairs of layout {layout.name!r}{reasons}")
    if all(pair["margin"] is None for pair in pairs):
        for pair_values in pairs:
            del pair_values["margin"]
    return Dataset.from_list(pairs)


def train_model(settings: Mapping[str, Any], *, recipe: str | os.PathLike[str] | None = None) -> RunDir:
    """Trains in this process, as `accelerate launch` of a recipe does with one process, and returns the run folder.

    Args:
        settings: every flag of a recipe by its name, such as `{"learning_rate": 1e-5, "use_peft": True}`;
            `model_name_or_path`, `dataset_name` and `output_dir` are needed without a recipe. `kind` is `dpo` (if it
            is missing) or `sft`.
        recipe: a recipe's file or name, whose defaults the settings override. Without it, TRL's defaults hold.

    Raises: DpokitError: an error that the user can correct.
    """
    from dpokit.run import train
    from dpokit.settings.layers import find_recipe, read_defaults

    if recipe is None:
        kind = {name: settings[name] for name in ("kind",) if name in settings}
        return train(NOTEBOOK, kind, {name: value for name, value in settings.items() if name not in kind})
    path = find_recipe(str(recipe))
    return train(str(path), read_defaults(path), settings)


def evaluate_model(
    model: str | RunDir,
    *,
    base: str | None = None,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    answers: int = 0,
) -> dict[str, Any]:
    """Compares a model with its base on held-out pairs, as `dpokit evaluate` does.

    Args:
        model: a run folder, a model's folder or a Hub id.
        base: the model to compare with; without it the run's or the adapter's own base.
        data, split: the held-out pairs; without them the run's own.
        limit: scores only the first pairs.
        answers: both models answer this many prompts.

    Returns: what `pairs.json` in the new folder of `eval/` holds, such as `verdict` and, for `base` and `tuned`,
        `ranking_accuracy` with its interval; with `answers` also the counts of the sampled answers.

    Raises: DpokitError: an error that the user can correct.
    """
    from dpokit.evaluate.command import run_evaluation

    name = str(model.path) if isinstance(model, RunDir) else str(model)
    return run_evaluation(name, base=base, data=data, split=split, limit=limit, answers=answers, argv=[])


def merge_model(
    run: str | os.PathLike[str] | RunDir,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    dequantized_base: bool = False,
    accept_drift: bool = False,
    limit: int | None = 100,
    checkpoint: int | None = None,
    proof: bool = True,
) -> dict[str, Any]:
    """Merges a run's adapter into its base and measures the drift, as `dpokit merge` does.

    Args:
        run: a run folder.
        dtype: of the merged weights; None for the run's `--dtype`, or without it the dtype of its base.
        max_shard_size: the largest file of weights, in the notation of transformers.
        dequantized_base: merges into the dequantized 4-bit or 8-bit base instead of the original one.
        accept_drift: merges into another base, or with drift beyond the bound, instead of raising an error.
        limit: number of held-out pairs that the drift is measured on; None for all.
        checkpoint: the step of a checkpoint to merge; None for the final weights.
        proof: measures the drift.

    Returns: what `merged/merge.json` holds. `RunDir.merged` is the folder of the model.

    Raises: DpokitError: an error that the user can correct.
    """
    from dpokit.merge.merge import MergeOptions, merge_run

    options = MergeOptions(dtype, max_shard_size, dequantized_base, accept_drift, limit, checkpoint, proof)
    return merge_run(run if isinstance(run, RunDir) else RunDir(Path(run)), options)
