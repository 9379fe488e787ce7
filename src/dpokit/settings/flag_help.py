"""The flags that `--help` of a recipe shows, by group, with their defaults. No torch.

The defaults of TRL's flags repeat TRL's own, because importing TRL takes seconds; a test compares them. dpokit's flags
take their default and their text from here.
"""

from dataclasses import field
from typing import Any, NamedTuple

from dpokit.settings.flag_facts import FLAG_FACTS


class Help(NamedTuple):
    """A flag's default and its meaning; `kinds` are the kinds of recipe that have it."""

    default: Any
    text: str
    kinds: tuple[str, ...] = ("dpo", "sft")
    is_own: bool = False


class ByKind(NamedTuple):
    """A default that depends on the recipe's kind."""

    dpo: Any
    sft: Any


DPO = ("dpo",)


def _own(default: Any, text: str) -> Help:
    return Help(default, text, is_own=True)


GROUPS: dict[str, dict[str, Help]] = {
    "data": {
        "dataset_name": Help(None, "Pairs: a Hub id, a file or a folder."),
        "dataset_config": Help(None, "The dataset's configuration on the Hub."),
        "dataset_train_split": Help("train", "The split to train on; train[:90%] is a slice."),
        "dataset_test_split": Help("test", "The split of the held-out pairs."),
        "dataset_streaming": Help(False, "Read the rows while training instead of before it."),
        "datasets": _own(
            None, "A mixture, as TRL's list in YAML: path, name, split, columns, and fraction, weight or count."
        ),
        "dataset_mixer": _own(
            None, 'A mixture, as names with the share that is taken of each: {"a.jsonl": 1.0, "b.jsonl": 0.5}.'
        ),
        "mixture_seed": _own(0, "Decides which pairs are taken of a source that does not give all of them."),
        "balance_sources": _own(False, "Take as many pairs of each source as the smallest one has."),
        "max_pairs_per_source": _own(None, "Take at most N training pairs of each source."),
        "max_length_gap": _own(None, "Leave out training pairs whose answers differ by more than N tokens."),
        "drop_duplicates": _own(
            False, "Leave out training pairs with the prompt and answers of an earlier row or source."
        ),
        "eval_fraction": _own(None, "Hold out this share of the training pairs, by prompt, instead of a test split."),
        "max_train_samples": _own(None, "Use only the first N rows of the training split, of each source."),
        "max_eval_samples": _own(
            None, "Use only the first N rows of the evaluation split, of each source; with eval_fraction N pairs."
        ),
        "max_length": Help(1024, "Most tokens of prompt and answer together."),
        "prompt_share": _own(0.5, "The share of max_length that a long prompt keeps when long answers are cut."),
        "max_prompt_length": _own(None, "Keep at most this many tokens of a prompt: whole turns of its end."),
        "max_completion_length": _own(None, "Keep at most this many tokens of an answer, from its start."),
        "columns": _own(None, "Columns of another name: prompt=question,chosen=answers.best (prompt, chosen, ...)."),
        "ignore_columns": _own(None, "Columns that are left out, separated by commas."),
        "format": _own(None, "The layout of the rows, for rows that fit several, such as implicit_plain."),
        "ranked": _own("best_worst", "The pairs of a row that has several answers with scores."),
        "min_score_gap": _own(0.0, "Leave out pairs of answers whose scores differ by less."),
        "skip_bad_rows": _own(False, "Drop rows of JSONL and CSV files that cannot be read, instead of stopping."),
        "prompt_format": _own(
            "transcript", "Without a chat template, join prompt and answer as an HH transcript, or as they are (raw)."
        ),
        "template_date": _own(
            None, "Date, as 2026-11-29, for chat templates that write one; by default that of the first start."
        ),
    },
    "model": {
        "model_name_or_path": Help(None, "The base: a Hub id, a folder, a GGUF file or a finished run."),
        "model_revision": Help("main", "Branch, tag or commit of a model on the Hub."),
        "dtype": Help("float32", "Precision of the weights: float32, bfloat16, float16 or auto."),
        "attn_implementation": Help(None, "Such as sdpa or flash_attention_2."),
        "use_peft": Help(False, "Train a LoRA adapter instead of all weights."),
        "lora_r": Help(16, "Rank of the adapter."),
        "lora_alpha": Help(32, "Scale of the adapter, divided by its rank."),
        "lora_target_modules": Help(None, "Layers with an adapter; all-linear for all."),
        "load_in_4bit": Help(False, "QLoRA: the base in 4 bits."),
        "load_in_8bit": Help(False, "The base in 8 bits."),
        "trust_remote_code": Help(False, "Run the model's own Python code."),
    },
    "training": {
        "learning_rate": Help(ByKind(1e-6, 2e-5), "Highest rate of the schedule."),
        "num_train_epochs": Help(3.0, "Passes over the pairs."),
        "max_steps": Help(-1, "Number of steps instead of epochs."),
        "per_device_train_batch_size": Help(8, "Pairs of one micro-batch of one process."),
        "gradient_accumulation_steps": Help(1, "Micro-batches of a step."),
        "lr_scheduler_type": Help("linear", "Such as linear, cosine or constant."),
        "warmup_steps": Help(0, "Steps with a rising rate; below 1 a share of all steps."),
        "weight_decay": Help(0.0, "Weight decay of AdamW."),
        "max_grad_norm": Help(1.0, "Longer gradients are scaled down to this norm."),
        "optim": Help("adamw_torch_fused", "The optimizer."),
        "seed": Help(42, "Of the order of pairs and of dropout."),
        "beta": Help(0.1, "Strength of the pull towards the reference.", DPO),
        "loss_type": Help(ByKind(["sigmoid"], "nll"), "One loss, or several that are added; sigmoid is DPO's."),
        "loss_weights": Help(None, "A weight for each of several losses.", DPO),
        "label_smoothing": Help(0.0, "Share of the labels that are taken to be wrong.", DPO),
        "precompute_ref_log_probs": Help(False, "Compute the reference once, before training.", DPO),
        "gradient_checkpointing": Help(True, "Compute activations twice to save memory."),
    },
    "evaluation": {
        "eval_strategy": Help("no", "When to evaluate: no, steps or epoch."),
        "eval_steps": Help(None, "Steps between two; below 1 a share of all steps."),
        "per_device_eval_batch_size": Help(8, "Pairs of a batch of one process."),
        "eval_answers": _own(8, "Held-out prompts answered at each evaluation, to detect degenerate answers."),
        "metric_for_best_model": Help(None, "The metric that decides which checkpoint is best."),
        "load_best_model_at_end": Help(False, "Keep the best checkpoint's weights, not the last."),
        "logging_steps": Help(10, "Steps between two records of metrics.jsonl."),
        "report_to": Help("none", "Trackers: wandb, tensorboard, trackio, mlflow, ..."),
        "disable_tqdm": Help(None, "No progress; each logged step is a line."),
        "run_name": Help(None, "The run's name in the tracker."),
        "run_group": _own(None, "Group of this run in the tracker, for example the trials of a sweep."),
        "run_tags": _own(None, "Tags of this run in the tracker."),
    },
    "saving": {
        "output_dir": Help(None, "The run folder."),
        "overwrite_run": _own(False, "Delete the run that output_dir holds and begin a new one there."),
        "resume_from_checkpoint": Help(None, "auto, never, or a checkpoint's folder."),
        "accept_changes": _own(None, "Settings that a resumed run may change, separated by commas."),
        "save_strategy": Help("steps", "When to save: no, steps, epoch or best."),
        "save_steps": Help(500, "Steps between two; below 1 a share of all steps."),
        "save_total_limit": Help(None, "Most checkpoints to keep."),
        "merge_after_training": _own(False, "After training, run `dpokit merge`: base and adapter become one model."),
        "push_to_hub": Help(False, "After training, run `dpokit push`."),
        "hub_model_id": Help(None, "The repository on the Hub: USER/NAME."),
        "hub_license": _own(None, "With --push_to_hub: the Hub's identifier of the model's licence."),
    },
    "placement": {
        "use_cpu": Help(False, "Train on the CPU."),
        "bf16": Help(None, "Mixed precision; by default where the machine has it."),
        "fp16": Help(False, "Mixed precision with loss scaling, for older GPUs."),
        "torch_compile": Help(False, "Compile the model."),
        "ddp_timeout": Help(1800, "Seconds that a process waits for the others."),
        "preempt_signal": _own(None, "The signal on which the run saves and ends; by default SIGTERM and SIGUSR1."),
        "save_before_seconds": _own(None, "Save and end this long before the Slurm job's time limit."),
    },
    "dpokit": {
        "shared_prefix": _own(True, "Compute a prompt once for all of its answers, if the model allows it."),
        "group_by_prompt": _own(True, "Train the pairs of one prompt in the same step, up to 8 of them."),
        "gates": _own("stop", "If a check shows that the result will be wrong: stop, or warn and continue."),
        "trust_checkpoint": _own(
            False, "Load ZeRO and FSDP2 shards that another user or machine wrote; unpickling them can run any code."
        ),
    },
}
HELP: dict[str, Help] = {name: row for group in GROUPS.values() for name, row in group.items()}

# Names that people type, of other tools or shortened, and the flags they mean.
MEANT = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "warmup": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "base": "model_name_or_path",
    "dataset": "dataset_name",
    "data": "dataset_name",
    "split": "dataset_train_split",
    "test_split": "dataset_test_split",
    "eval_split": "dataset_test_split",
    "lora": "use_peft",
    "use_lora": "use_peft",
    "peft": "use_peft",
    "r": "lora_r",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "target_modules": "lora_target_modules",
    "qlora": "load_in_4bit",
    "4bit": "load_in_4bit",
    "8bit": "load_in_8bit",
    "output": "output_dir",
    "out": "output_dir",
    "output_path": "output_dir",
    "save_dir": "output_dir",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_run",
    "loss": "loss_type",
    "max_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "name": "run_name",
    "wandb": "report_to",
    "tracker": "report_to",
    "precision": "dtype",
    "cpu": "use_cpu",
    "device": "use_cpu",
    "flash_attention": "attn_implementation",
}
# Flags of the launcher, which stand before the recipe.
OF_LAUNCHER = ("gpus", "num_gpus", "n_gpus", "devices", "gpu", "nproc", "num_processes", "nodes", "config_file")
LAUNCHER = (
    "accelerate launch --num_processes 8 RECIPE (or --config_file accelerate_configs/ddp.yaml): before the recipe"
)


def own_field(name: str) -> Any:
    """The field of a dataclass for a flag of dpokit's own, with its default and its text."""
    return field(default=HELP[name].default, metadata={"help": HELP[name].text})


def is_shown(name: str, kind: str) -> bool:
    """Whether `--help` of a recipe of this kind shows the flag: not one that dpokit refuses."""
    return name in HELP and kind in HELP[name].kinds and not isinstance(FLAG_FACTS.get(name), str)


def find_default(name: str, kind: str) -> Any:
    """The flag's default where no layer sets it."""
    default = HELP[name].default
    return getattr(default, kind) if isinstance(default, ByKind) else default
