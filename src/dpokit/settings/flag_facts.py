"""The table of facts about each setting, one row per setting. No torch.

A row holds the reason why the flag is refused, or the facts that hold for it. Each flag needs a row; a test reports the
flags without one.
"""

from enum import Flag, auto


class Fact(Flag):
    """A fact about a supported setting."""

    NONE = 0
    IDENTITY = auto()  # a folder whose run has another value holds another run
    EXACT = auto()  # the training steps depend on it: a resume needs the same value unless --accept_changes names it
    FROM_RUN = auto()  # evaluate, chat and serve take it from a run folder, by `read_run_settings`
    SAME_TOKENS = auto()  # tokens and reference log-probs do not depend on it: trials that differ in it share both
    BY_SWEEP = auto()  # a sweep sets it for each trial, so a search space must not set it
    MACHINE = auto()  # its default depends on the machine; a plan for other devices decides it again
    HELD_OUT = auto()  # the choice of held-out pairs depends on it
    TRAIN_ROWS = auto()  # the choice of training rows depends on it, and with eval_fraction that of held-out pairs
    VOCABULARY = auto()  # the token ids of a text depend on it
    LENGTH = auto()  # it cuts prompts or answers, of held-out pairs too
    LOSS = auto()  # the loss of a pair depends on it, for the same log-probs
    LORA = auto()  # describes an adapter
    FOUR_BIT = auto()  # describes how weights are quantised to 4 bits
    RUN_NAME = auto()  # differs between any two runs, and no result depends on it
    PRIVATE = auto()  # may name a person's accounts or paths: never shown in a model card


NONE, IDENTITY, EXACT, FROM_RUN, SAME_TOKENS = Fact.NONE, Fact.IDENTITY, Fact.EXACT, Fact.FROM_RUN, Fact.SAME_TOKENS
BY_SWEEP, MACHINE, HELD_OUT, LORA, FOUR_BIT = Fact.BY_SWEEP, Fact.MACHINE, Fact.HELD_OUT, Fact.LORA, Fact.FOUR_BIT
LENGTH, LOSS, RUN_NAME, PRIVATE = Fact.LENGTH, Fact.LOSS, Fact.RUN_NAME, Fact.PRIVATE
TRAIN_ROWS, VOCABULARY = Fact.TRAIN_ROWS, Fact.VOCABULARY

ORDER = "rows are read in a seeded random order, which a resume can repeat"
AT_THE_END = "the model is uploaded once, at the end of the run"
ROW_EACH = "each answer is a row of its own"
CHOSEN = "the chosen answers of preference pairs are trained on"
SUMS = "an evaluation adds up its metrics batch by batch and keeps no predictions"
IN_TRAINING = "an evaluation in the middle of training has its precision: --bf16, --fp16, --dtype"
ALWAYS_TRAINS = "a recipe always trains, and --eval_strategy decides whether it evaluates"
TOKENIZER = "the tokenizer's own value is used; set it in the model's folder"

FLAG_FACTS: dict[str, Fact | str] = {
    "accelerator_config": NONE,
    "accept_changes": BY_SWEEP,
    "activation_checkpointing": NONE,
    "activation_checkpointing_kwargs": NONE,
    "activation_offloading": NONE,
    "adam_beta1": EXACT | SAME_TOKENS,
    "adam_beta2": EXACT | SAME_TOKENS,
    "adam_epsilon": EXACT | SAME_TOKENS,
    "assistant_only_loss": "the loss already covers the answer alone; --completion_only_loss false adds its prompt",
    "attn_implementation": FROM_RUN,
    "auto_find_batch_size": (
        "it changes the global batch in the middle of a run; lower "
        "per_device_train_batch_size and raise gradient_accumulation_steps instead"
    ),
    "average_tokens_across_devices": NONE,
    "balance_sources": EXACT | FROM_RUN | HELD_OUT,
    "batch_eval_metrics": SUMS,
    "beta": EXACT | FROM_RUN | SAME_TOKENS | LOSS,
    "bf16": EXACT | MACHINE,
    "bf16_full_eval": IN_TRAINING,
    "bnb_4bit_quant_storage": EXACT | FROM_RUN | FOUR_BIT,
    "bnb_4bit_quant_type": EXACT | FROM_RUN | FOUR_BIT,
    "chat_template_path": TOKENIZER,
    "columns": FROM_RUN | HELD_OUT,
    "completion_only_loss": EXACT | FROM_RUN | LOSS,
    "data_seed": EXACT | FROM_RUN | SAME_TOKENS,
    "dataloader_drop_last": EXACT,
    "dataloader_in_order": NONE,
    "dataloader_multiprocessing_context": NONE,
    "dataloader_num_workers": NONE,
    "dataloader_persistent_workers": NONE,
    "dataloader_pin_memory": NONE,
    "dataloader_prefetch_factor": NONE,
    "dataset_config": FROM_RUN | HELD_OUT,
    "dataset_kwargs": CHOSEN,
    "dataset_mixer": EXACT | FROM_RUN | HELD_OUT,
    "dataset_name": IDENTITY | FROM_RUN | HELD_OUT,
    "dataset_num_proc": NONE,
    "dataset_streaming": NONE,
    "dataset_test_split": FROM_RUN | HELD_OUT,
    "dataset_text_field": CHOSEN,
    "dataset_train_split": FROM_RUN | TRAIN_ROWS,
    "datasets": EXACT | FROM_RUN | HELD_OUT,
    "ddp_backend": NONE,
    "ddp_broadcast_buffers": NONE,
    "ddp_bucket_cap_mb": NONE,
    "ddp_find_unused_parameters": NONE,
    "ddp_static_graph": NONE,
    "ddp_timeout": NONE,
    "debug": (
        "transformers' search for overflows fails on attention masks; gates and alarms name values that are not finite"
    ),
    "deepspeed": NONE,
    "disable_dropout": EXACT | FROM_RUN,
    "disable_tqdm": NONE,
    "discopop_tau": EXACT | FROM_RUN | LOSS,
    "do_eval": ALWAYS_TRAINS,
    "do_predict": ALWAYS_TRAINS,
    "do_train": ALWAYS_TRAINS,
    "drop_duplicates": EXACT | FROM_RUN | HELD_OUT,
    "dtype": EXACT | FROM_RUN,
    "enable_jit_checkpoint": "it saves the wrong random state, and a preempted job looks completed",
    "eos_token": TOKENIZER,
    "eval_accumulation_steps": SUMS,
    "eval_answers": NONE,
    "eval_delay": NONE,
    "eval_do_concat_batches": NONE,
    "eval_fraction": FROM_RUN | HELD_OUT,
    "eval_on_start": NONE,
    "eval_packing": ROW_EACH,
    "eval_steps": SAME_TOKENS,
    "eval_strategy": NONE,
    "eval_use_gather_object": SUMS,
    "f_alpha_divergence_coef": EXACT | FROM_RUN | LOSS,
    "f_divergence_type": EXACT | FROM_RUN | SAME_TOKENS | LOSS,
    "format": EXACT | FROM_RUN | HELD_OUT,
    "fp16": EXACT | MACHINE,
    "fp16_full_eval": IN_TRAINING,
    "fsdp": NONE,
    "fsdp_config": NONE,
    "full_determinism": NONE,
    "gates": NONE,
    "gradient_accumulation_steps": SAME_TOKENS,
    "gradient_checkpointing": SAME_TOKENS,
    "gradient_checkpointing_kwargs": NONE,
    "greater_is_better": NONE,
    "group_by_prompt": EXACT | SAME_TOKENS,
    "hub_always_push": AT_THE_END,
    "hub_license": PRIVATE,
    "hub_model_id": PRIVATE,
    "hub_private_repo": PRIVATE,
    "hub_revision": PRIVATE,
    "hub_strategy": AT_THE_END,
    "hub_token": PRIVATE,
    "ignore_bias_buffers": "it repairs models of 2023 that transformers no longer has",
    "ignore_columns": FROM_RUN | HELD_OUT,
    "ignore_data_skip": NONE,
    "include_for_metrics": SUMS,
    "include_num_input_tokens_seen": NONE,
    "kind": FROM_RUN | LOSS,
    "label_names": SUMS,
    "label_smoothing": EXACT | FROM_RUN | SAME_TOKENS | LOSS,
    "label_smoothing_factor": NONE,
    "ld_alpha": EXACT | FROM_RUN | LOSS,
    "learning_rate": EXACT | SAME_TOKENS,
    "length_column_name": ORDER,
    "liger_kernel_config": NONE,
    "load_best_model_at_end": NONE,
    "load_in_4bit": EXACT | FROM_RUN,
    "load_in_8bit": EXACT | FROM_RUN,
    "local_rank": "the launcher numbers the processes",
    "log_level": NONE,
    "log_level_replica": NONE,
    "log_on_each_node": NONE,
    "logging_first_step": "the first step is always logged",
    "logging_nan_inf_filter": "a loss that is not finite is logged as it is, and stops the run",
    "logging_steps": SAME_TOKENS,
    "logging_strategy": NONE,
    "lora_alpha": EXACT | FROM_RUN | SAME_TOKENS | LORA,
    "lora_dropout": EXACT | FROM_RUN | SAME_TOKENS | LORA,
    "lora_modules_to_save": EXACT | FROM_RUN | LORA,
    "lora_r": EXACT | FROM_RUN | SAME_TOKENS | LORA,
    "lora_target_modules": EXACT | FROM_RUN | SAME_TOKENS | LORA,
    "lora_target_parameters": EXACT | FROM_RUN | LORA,
    "lora_task_type": LORA,
    "loss_type": EXACT | FROM_RUN | SAME_TOKENS | LOSS,
    "loss_weights": EXACT | FROM_RUN | SAME_TOKENS | LOSS,
    "lr_scheduler_kwargs": EXACT | SAME_TOKENS,
    "lr_scheduler_type": EXACT | SAME_TOKENS,
    "max_completion_length": FROM_RUN | LENGTH,
    "max_eval_samples": FROM_RUN | HELD_OUT,
    "max_grad_norm": EXACT | SAME_TOKENS,
    "max_length": FROM_RUN | LENGTH,
    "max_length_gap": EXACT | FROM_RUN | HELD_OUT,
    "max_pairs_per_source": EXACT | FROM_RUN | HELD_OUT,
    "max_prompt_length": FROM_RUN | LENGTH,
    "max_steps": EXACT | SAME_TOKENS,
    "max_train_samples": FROM_RUN | TRAIN_ROWS,
    "merge_after_training": NONE,
    "metric_for_best_model": NONE,
    "min_score_gap": EXACT | FROM_RUN | HELD_OUT,
    "mixture_seed": EXACT | FROM_RUN | HELD_OUT,
    "model_init_kwargs": ("it would apply to the reference only; use --dtype, --attn_implementation, --model_revision"),
    "model_name_or_path": IDENTITY | FROM_RUN | VOCABULARY,
    "model_revision": EXACT | FROM_RUN | VOCABULARY,
    "neftune_noise_alpha": EXACT,
    "num_train_epochs": EXACT | SAME_TOKENS,
    "optim": EXACT | SAME_TOKENS,
    "optim_args": EXACT | SAME_TOKENS,
    "optim_target_modules": EXACT,
    "output_dir": BY_SWEEP | RUN_NAME,
    "overwrite_run": BY_SWEEP,
    "packing": ROW_EACH,
    "packing_strategy": ROW_EACH,
    "pad_to_multiple_of": NONE,
    "pad_token": "TRL retires it; the tokenizer's own padding token is used, or its EOS",
    "padding_free": "TRL warns and still pads",
    "parallelism_config": NONE,
    "per_device_eval_batch_size": FROM_RUN | SAME_TOKENS,
    "per_device_train_batch_size": FROM_RUN | SAME_TOKENS,
    "precompute_ref_batch_size": NONE,
    "precompute_ref_log_probs": NONE,
    "prediction_loss_only": SUMS,
    "preempt_signal": NONE,
    "project": PRIVATE,
    "prompt_format": EXACT | FROM_RUN | HELD_OUT,
    "prompt_share": FROM_RUN | LENGTH,
    "push_to_hub": NONE,
    "ranked": EXACT | FROM_RUN | HELD_OUT,
    "ref_model_mixup_alpha": EXACT | LOSS,
    "ref_model_sync_steps": EXACT | LOSS,
    "remove_unused_columns": NONE,
    "report_to": NONE,
    "restore_callback_states_from_checkpoint": "a resume restores what dpokit's callbacks need by itself",
    "resume_from_checkpoint": BY_SWEEP,
    "router_aux_loss_coef": EXACT | FROM_RUN | LOSS,
    "run_group": BY_SWEEP | PRIVATE,
    "run_name": RUN_NAME | PRIVATE,
    "run_tags": SAME_TOKENS | PRIVATE,
    "save_before_seconds": NONE,
    "save_on_each_node": "one rank writes the weights, to a run folder that all nodes share",
    "save_only_model": NONE,
    "save_steps": SAME_TOKENS,
    "save_strategy": NONE,
    "save_total_limit": NONE,
    "seed": EXACT | FROM_RUN | SAME_TOKENS,
    "shared_prefix": FROM_RUN,
    "shuffle_dataset": ORDER,
    "skip_bad_rows": FROM_RUN | HELD_OUT,
    "skip_memory_metrics": NONE,
    "sync_ref_model": EXACT | LOSS,
    "template_date": FROM_RUN | HELD_OUT,
    "tf32": EXACT,
    "torch_compile": NONE,
    "torch_compile_backend": NONE,
    "torch_compile_mode": NONE,
    "torch_empty_cache_steps": NONE,
    "trackio_bucket_id": PRIVATE,
    "trackio_space_id": PRIVATE,
    "trackio_static_space_id": "a run stays in its Space; freeze the Space with trackio",
    "train_sampling_strategy": ORDER,
    "truncation_mode": ("prompts keep their end and answers their start: --max_prompt_length, --max_completion_length"),
    "trust_checkpoint": NONE,
    "trust_remote_code": NONE,
    "use_bnb_nested_quant": EXACT | FROM_RUN | FOUR_BIT,
    "use_cache": "training needs no cache, and the tuned model keeps the setting of its base",
    "use_cpu": MACHINE,
    "use_dora": EXACT | FROM_RUN | SAME_TOKENS | LORA,
    "use_liger_kernel": NONE,
    "use_peft": EXACT | FROM_RUN,
    "use_rslora": EXACT | FROM_RUN | SAME_TOKENS | LORA,
    "use_weighting": EXACT | FROM_RUN | LOSS,
    "warmup_steps": EXACT | SAME_TOKENS,
    "weight_decay": EXACT | SAME_TOKENS,
}
# Settings of the processes that load data.
WORKER_OPTIONS = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
REFUSED = {name: fact for name, fact in FLAG_FACTS.items() if isinstance(fact, str)}


def flags_with(fact: Fact) -> tuple[str, ...]:
    """The names of all settings that have the fact, in alphabetical order."""
    return tuple(name for name, facts in FLAG_FACTS.items() if isinstance(facts, Fact) and fact in facts)


def flags_of_pairs(*, with_training_rows: bool) -> tuple[str, ...]:
    """The settings that choose a run's pairs, cut them and turn them into tokens.

    Args:
        with_training_rows: also those that choose the training rows: for training pairs, and for pairs that
            `eval_fraction` holds out of them.
    """
    facts = (HELD_OUT, *([TRAIN_ROWS] if with_training_rows else []), LENGTH, VOCABULARY)
    return tuple(name for fact in facts for name in flags_with(fact))


def is_public(name: str) -> bool:
    """Whether a model card may show the setting; False for one without a row, and for an unsupported one."""
    facts = FLAG_FACTS.get(name)
    return isinstance(facts, Fact) and PRIVATE not in facts
