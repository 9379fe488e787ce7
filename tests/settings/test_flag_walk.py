"""Walks every training flag: a changed value changes something that a run shows, or it is refused.

CHANGES has a real run for each flag, beside a run without it; REFUSALS the flags that are refused for some values;
ELSEWHERE the flags that need a GPU, several processes or a network, and the test that proves them.
"""

import ast
import json
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from compare_runs import interrupt
from conftest import ROOT, write_pairs
from datasets import Dataset
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

import dpokit.run
from dpokit.errors import DpokitError, SettingsError
from dpokit.interrupts import Preempted
from dpokit.run import train
from dpokit.rundir import RunDir, read_metrics
from dpokit.settings.flag_facts import FLAG_FACTS, REFUSED
from dpokit.settings.load import load_settings
from dpokit.train.dpo_trainer import PairTrainer

# 12 pairs of different prompts, of which 4 are held out: 4 steps an epoch.
BASE = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_length": 64,
    "eval_fraction": 0.34,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "eval_answers": 0}
SAVES = {"save_strategy": "steps", "save_steps": 1}
BEST = {**EVALUATES, **SAVES, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
EPOCH = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["c_attn"]}
FOUR_BIT = {**LORA, "lora_target_modules": ["q_proj"], "load_in_4bit": True, "model_name_or_path": "tiny_qwen2"}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3}
WHOLE = {"eval_fraction": None}
WORKER = {"dataloader_num_workers": 1}


@dataclass
class Observation:
    """All that a run shows: its folder, its console, its trainer, and its end if it was ended."""

    run: RunDir
    trainer: Any = None
    console: str = ""
    end: str = "finished"
    signals: dict[str, bool] = field(default_factory=dict)
    reference_batches: list[int] = field(default_factory=list)
    processes: list[int | None] = field(default_factory=list)
    loader: Any = None
    evaluation_batches: int = 0
    compiler: str = ""
    verbosity: int = 0
    is_deterministic: bool = False


View = Callable[[Observation], Any]


def logged(*names: str) -> View:
    """The values of these metrics, in the order of the records that have one of them."""
    return lambda observed: [
        [record[name] for name in names]
        for record in read_metrics(observed.run.metrics_jsonl)
        if all(name in record for name in names)
    ]


def number_of(name: str) -> View:
    return lambda observed: len(logged(name)(observed))


def weights(observed: Observation) -> str:
    folder = observed.run.adapter if observed.run.adapter.exists() else observed.run.model
    tensors = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    parts = (f"{name} {value.dtype} {value.float().numpy().tobytes().hex()}" for name, value in sorted(tensors.items()))
    return sha256("".join(parts).encode()).hexdigest()


def content_of(pattern: str) -> View:
    return lambda observed: [path.read_text() for path in sorted(observed.run.path.glob(pattern))]


def file_names(observed: Observation) -> list[str]:
    return sorted(str(path.relative_to(observed.run.path)) for path in observed.run.path.rglob("*") if path.is_file())


def folders(observed: Observation) -> list[str]:
    return sorted(str(path.relative_to(observed.run.path)) for path in observed.run.path.rglob("*") if path.is_dir())


def recorded(name: str) -> View:
    return lambda observed: (observed.run.read_run() or {}).get(name)


def data(split: str, name: str) -> View:
    return lambda observed: json.loads(observed.run.data_json.read_text())[split][name]


def of_trainer(read: Callable[[Any], Any]) -> View:
    return lambda observed: read(observed.trainer)


def of_loader(name: str) -> View:
    return lambda observed: getattr(observed.loader, name)


def of_quantised(read: Callable[[Any], Any]) -> View:
    """A fact about a 4-bit layer."""
    return lambda observed: read(observed.trainer.model.base_model.model.model.layers[0].self_attn.k_proj.weight)


def recomputing(trainer: Any) -> dict[str, Any] | None:
    """The options with which a layer's activations are recomputed; None if they are kept."""
    layer = trainer.model.transformer.h[0]
    return layer._gradient_checkpointing_func.keywords if layer.gradient_checkpointing else None


loss = logged("loss")
ANY = object()  # any other value than without the flag


@dataclass(frozen=True)
class Change:
    """A value of a flag, and what must change.

    Attributes:
        value: the value on the command line.
        view: reads what must change.
        becomes: what the view must read with the flag.
        given: settings of both runs, as defaults of the recipe.
        environment: environment variables of both runs.
    """

    value: str
    view: View
    becomes: Any = ANY
    given: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


CHANGES: dict[str, Change] = {
    # The loss and the reference.
    "beta": Change("0.5", loss),
    "disable_dropout": Change("false", loss),
    "discopop_tau": Change("0.5", loss, given={"loss_type": ["discopop"]}),
    "f_alpha_divergence_coef": Change("0.9", loss, given={"f_divergence_type": "alpha_divergence"}),
    "f_divergence_type": Change("js_divergence", loss),
    "label_smoothing": Change("0.3", loss, given={"loss_type": ["robust"], "label_smoothing": 0.1}),
    "label_smoothing_factor": Change("0.2", loss, given={"kind": "sft"}),
    "ld_alpha": Change("0.5", loss),
    "loss_type": Change("hinge", loss),
    "loss_type of supervised training": Change("dft", loss, given={"kind": "sft"}),
    "loss_weights": Change("1 0.5", loss, given={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
    "completion_only_loss": Change("false", loss, given={"kind": "sft"}),
    "precompute_ref_batch_size": Change(
        "3", lambda observed: max(observed.reference_batches), 3, {"precompute_ref_log_probs": True}
    ),
    "precompute_ref_log_probs": Change("true", of_trainer(lambda trainer: trainer.ref_model is None), True),
    "ref_model_mixup_alpha": Change("0.1", loss, given=MOVING),
    "ref_model_sync_steps": Change("2", loss, given=MOVING),
    "router_aux_loss_coef": Change("0.5", loss, given={"model_name_or_path": "tiny_mixture"}),
    "shared_prefix": Change("false", recorded("shared_prefix"), "off: --shared_prefix false"),
    "group_by_prompt": Change(
        "false", logged("logps/chosen"), given={"dataset_name": "repeated.jsonl", "max_length": 128}
    ),
    "sync_ref_model": Change("true", loss, given={"ref_model_sync_steps": 1}),
    "use_weighting": Change("true", loss),
    # The model.
    "attn_implementation": Change(
        "eager", of_trainer(lambda trainer: trainer.model.config._attn_implementation), "eager"
    ),
    "dtype": Change("bfloat16", of_trainer(lambda trainer: trainer.model.dtype), torch.bfloat16),
    "model_name_or_path": Change("tiny_qwen2", weights),
    "model_revision": Change("v2", weights, given={"model_name_or_path": "on the Hub"}),
    "neftune_noise_alpha": Change("5", loss),
    "lora_alpha": Change("64", weights, given=LORA),
    "lora_dropout": Change(
        "0.5",
        loss,
        given={**LORA, "disable_dropout": False, "model_name_or_path": "tiny_qwen2", "lora_target_modules": ["q_proj"]},
    ),
    "lora_modules_to_save": Change("ln_f", content_of("adapter/adapter_config.json"), given=LORA),
    "lora_r": Change("2", weights, given=LORA),
    "lora_target_modules": Change("c_fc", weights, given=LORA),
    "lora_target_parameters": Change(
        "q_proj.weight", weights, given={**LORA, "lora_target_modules": ["k_proj"], "model_name_or_path": "tiny_qwen2"}
    ),
    "use_dora": Change(
        "true", weights, given={**LORA, "lora_target_modules": ["q_proj"], "model_name_or_path": "tiny_qwen2"}
    ),
    "use_peft": Change("true", folders, ["adapter"], {"lora_target_modules": ["c_attn"]}),
    "use_rslora": Change("true", weights, given=LORA),
    "load_in_4bit": Change(
        "true", of_quantised(lambda weight: type(weight).__name__), "Params4bit", FOUR_BIT | {"load_in_4bit": False}
    ),
    "load_in_8bit": Change(
        "true", of_quantised(lambda weight: type(weight).__name__), "Int8Params", FOUR_BIT | {"load_in_4bit": False}
    ),
    "bnb_4bit_quant_storage": Change("float32", of_quantised(lambda weight: weight.dtype), torch.float32, FOUR_BIT),
    "bnb_4bit_quant_type": Change("fp4", of_quantised(lambda weight: weight.quant_state.quant_type), "fp4", FOUR_BIT),
    "use_bnb_nested_quant": Change("true", of_quantised(lambda weight: weight.quant_state.nested), True, FOUR_BIT),
    # Steps, schedule and optimizer.
    "adam_beta1": Change("0.5", weights),
    "adam_beta2": Change("0.5", weights),
    "adam_epsilon": Change("1e-2", weights),
    "gradient_accumulation_steps": Change("2", logged("epoch")),
    "learning_rate": Change("1e-4", logged("learning_rate")),
    "lr_scheduler_kwargs": Change(
        '{"min_lr": 5e-4}',
        logged("learning_rate"),
        given={"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
    ),
    "lr_scheduler_type": Change("constant", logged("learning_rate")),
    "max_grad_norm": Change("1e-3", weights, given={"optim": "sgd"}),
    "max_steps": Change("1", of_trainer(lambda trainer: trainer.state.global_step), 1),
    "num_train_epochs": Change("2", of_trainer(lambda trainer: trainer.state.global_step), given=EPOCH),
    "optim": Change("sgd", weights),
    "optim_args": Change("momentum=0.9", weights, given={"optim": "sgd"}),
    "per_device_train_batch_size": Change("3", logged("epoch")),
    "seed": Change("7", loss, given={"disable_dropout": False}),
    "warmup_steps": Change("2", logged("learning_rate")),
    "weight_decay": Change("0.5", weights),
    # Data.
    "columns": Change("chosen=rejected,rejected=chosen", logged("logps/chosen")),
    "data_seed": Change("7", logged("logps/chosen")),
    "dataloader_drop_last": Change("true", of_trainer(lambda trainer: trainer.state.global_step), 2, EPOCH),
    "dataloader_multiprocessing_context": Change(
        "fork", of_loader("multiprocessing_context"), torch.multiprocessing.get_context("fork"), WORKER
    ),
    "dataloader_num_workers": Change("1", of_loader("num_workers"), 1),
    "dataloader_persistent_workers": Change("true", of_loader("persistent_workers"), True, WORKER),
    "dataloader_prefetch_factor": Change("3", of_loader("prefetch_factor"), 3, WORKER),
    "dataset_config": Change("second", loss, given={"dataset_name": "configs", "dataset_config": "first"}),
    "dataset_name": Change("other.jsonl", recorded("data_fingerprint")),
    "datasets": Change('{"path": "other.jsonl", "count": 6}', data("train", "kept"), 4),
    "dataset_mixer": Change('{"other.jsonl": 0.6}', data("train", "kept"), 4),
    "mixture_seed": Change("7", loss, given={"max_pairs_per_source": 6}),
    "balance_sources": Change("true", data("train", "kept"), 14, given={"dataset_name": "pairs.jsonl,other.jsonl"}),
    "max_pairs_per_source": Change("6", data("train", "kept"), 4),
    "max_length_gap": Change("6", data("train", "dropped")),
    "drop_duplicates": Change("true", data("train", "dropped"), given={"dataset_name": "doubled.jsonl"}),
    "dataset_num_proc": Change("2", lambda observed: observed.processes, [2]),
    "dataset_streaming": Change(
        "true", of_trainer(lambda trainer: type(trainer.train_dataset).__name__), "IterableDataset", WHOLE
    ),
    "dataset_test_split": Change(
        "validation", data("eval", "kept"), 5, {**EVALUATES, **WHOLE, "dataset_name": "splits"}
    ),
    "dataset_train_split": Change("validation", data("train", "kept"), 5, {**WHOLE, "dataset_name": "splits"}),
    "eval_fraction": Change("0.5", data("eval", "kept"), 6, EVALUATES),
    "max_completion_length": Change("3", logged("num_tokens")),
    "max_eval_samples": Change("2", data("eval", "kept"), 2, EVALUATES),
    "max_length": Change("40", logged("num_tokens")),
    "max_prompt_length": Change("5", logged("num_tokens"), given=WHOLE),
    "max_train_samples": Change("6", data("train", "rows")),
    "prompt_share": Change("0.9", data("train", "shortened"), given={"max_length": 40}),
    "pad_to_multiple_of": Change("100", logged("wasted_positions"), given={"shared_prefix": False}),
    # Evaluation.
    "eval_answers": Change("2", lambda observed: bool(recorded("answers_of_base")(observed)), True, EVALUATES),
    "eval_delay": Change("2", number_of("eval_loss"), 1, EVALUATES),
    "eval_on_start": Change("true", number_of("eval_loss"), 3, EVALUATES),
    "eval_steps": Change("2", number_of("eval_loss"), 1, EVALUATES),
    "eval_strategy": Change("epoch", number_of("eval_loss"), 1),
    "greater_is_better": Change("true", recorded("best"), given=BEST),
    "load_best_model_at_end": Change("true", recorded("best"), given={**BEST, "load_best_model_at_end": False}),
    "metric_for_best_model": Change("eval_rewards/margins", recorded("best"), given=BEST),
    "per_device_eval_batch_size": Change("1", lambda observed: observed.evaluation_batches, 4, EVALUATES),
    # Saving and resuming.
    "output_dir": Change("elsewhere", lambda observed: observed.run.path.name, "elsewhere"),
    "preempt_signal": Change(
        "USR2", lambda observed: observed.signals, {"SIGTERM": False, "SIGUSR1": False, "SIGUSR2": True}
    ),
    "save_before_seconds": Change(
        "1e9", lambda observed: observed.end, "Preempted", SAVES, {"SLURM_JOB_END_TIME": "2000000000"}
    ),
    "save_only_model": Change("true", file_names, given=SAVES),
    "save_steps": Change("2", folders, ["checkpoint-2", "model"], SAVES),
    "save_strategy": Change("steps", folders, given={"save_steps": 1}),
    "save_total_limit": Change("1", folders, ["checkpoint-2", "model"], SAVES),
    # Logs, trackers and checks.
    "disable_tqdm": Change("true", lambda observed: observed.console.count("training: step"), 2),
    "gates": Change("warn", lambda observed: observed.end, "finished", {"learning_rate": 1e30, "max_grad_norm": 0.0}),
    "include_num_input_tokens_seen": Change("true", number_of("num_input_tokens_seen"), 2),
    "log_level": Change("error", lambda observed: observed.verbosity, logging.ERROR),
    "logging_steps": Change("3", number_of("loss"), 2, {"max_steps": 3}),
    "logging_strategy": Change("no", number_of("loss"), 1),
    "report_to": Change("tensorboard", folders, ["model", "tensorboard", "tensorboard/run"]),
    "run_name": Change("mine", folders, ["model", "tensorboard", "tensorboard/mine"], {"report_to": "tensorboard"}),
    "skip_memory_metrics": Change("false", number_of("train_mem_cpu_alloc_delta"), 1),
    # Execution.
    "accelerator_config": Change(
        '{"non_blocking": true}', of_trainer(lambda trainer: trainer.accelerator.non_blocking), True
    ),
    "activation_checkpointing": Change("true", of_trainer(recomputing)),
    "activation_checkpointing_kwargs": Change(
        '{"use_reentrant": true}', of_trainer(recomputing), {"use_reentrant": True}, {"gradient_checkpointing": True}
    ),
    "ddp_broadcast_buffers": Change("false", of_trainer(lambda t: t.accelerator.ddp_handler.broadcast_buffers), False),
    "ddp_bucket_cap_mb": Change("7", of_trainer(lambda t: t.accelerator.ddp_handler.bucket_cap_mb), 7),
    "ddp_find_unused_parameters": Change(
        "false", of_trainer(lambda t: t.accelerator.ddp_handler.find_unused_parameters), False
    ),
    "ddp_static_graph": Change("true", of_trainer(lambda t: t.accelerator.ddp_handler.static_graph), True),
    "full_determinism": Change("true", lambda observed: observed.is_deterministic, True),
    "gradient_checkpointing": Change("true", of_trainer(recomputing)),
    "gradient_checkpointing_kwargs": Change(
        '{"use_reentrant": true}', of_trainer(recomputing), {"use_reentrant": True}, {"gradient_checkpointing": True}
    ),
    "torch_compile_backend": Change("eager", lambda observed: observed.compiler, "EAGER"),
}

# Flags that are refused for every value that would change something: the value, other flags, and a part of the message.
REFUSALS = {
    "average_tokens_across_devices": ("false", (), "mean over the tokens"),
    "dataloader_in_order": ("false", (), "seeded random order"),
    "eval_do_concat_batches": ("false", (), "keeps no predictions"),
    "lora_task_type": ("SEQ_CLS", ("--use_peft",), "causal language models"),
    "parallelism_config": ('{"cp_size": 2}', (), "invalid ParallelismConfig"),
    "remove_unused_columns": ("false", (), "no other columns"),
}

# Flags that one tiny run on a CPU cannot show: why, and the test that proves them.
ELSEWHERE = {
    "ignore_columns": (
        "a column that is an error without it",
        "tests/data/test_unused_columns.py::test_a_run_uses_and_ignores_the_named_columns",
    ),
    "skip_bad_rows": (
        "a row that is an error without it",
        "tests/data/test_bad_rows.py::test_bad_rows_are_dropped_counted_and_keep_their_numbers",
    ),
    "format": (
        "rows that are an error without it",
        "tests/data/test_prepare.py::test_every_layout_in_a_file_has_the_ids_of_a_single_row",
    ),
    "min_score_gap": (
        "rows with scores",
        "tests/data/test_published.py::test_several_answers_give_the_pairs_of_the_flags",
    ),
    "ranked": (
        "rows of several answers",
        "tests/data/test_published.py::test_a_run_counts_each_pair_of_several_in_a_row",
    ),
    "prompt_format": (
        "prompts that are no transcripts",
        "tests/data/test_plain_prompts.py::test_the_flag_changes_the_data_and_is_recorded",
    ),
    "template_date": (
        "a template with a date",
        "tests/checkpoint/test_resume.py::test_a_run_keeps_the_date_that_its_template_writes",
    ),
    "activation_offloading": ("a GPU", "tests/settings/test_conditions.py::test_offloading_without_a_gpu_is_refused"),
    "accept_changes": (
        "a resume",
        "tests/checkpoint/test_resume.py::test_a_changed_setting_is_refused_unless_it_is_accepted",
    ),
    "bf16": (
        "a GPU, or a processor with bf16",
        "tests/train/test_gates.py::test_bf16_on_a_processor_that_has_it_passes",
    ),
    "dataloader_pin_memory": ("a GPU", None),
    "ddp_backend": ("several processes", None),
    "ddp_timeout": (
        "several processes",
        "tests/distributed/test_coordination.py::test_a_silent_builder_is_given_up_after_the_time_out",
    ),
    "deepspeed": ("several processes", "tests/test_placements.py::test_two_cpu_processes_train_as_one_does"),
    "fp16": ("a GPU", "tests/settings/test_settings.py::test_fp16_on_a_cpu_names_the_flag_to_change"),
    "fsdp": ("several processes", "tests/test_placements.py::test_two_cpu_processes_train_as_one_does"),
    "fsdp_config": ("several processes", "tests/test_placements.py::test_two_cpu_processes_train_as_one_does"),
    "hub_license": (
        "a network",
        "tests/test_after_training.py::test_the_commands_are_in_order_and_push_privately_by_default",
    ),
    "hub_model_id": (
        "a network",
        "tests/test_after_training.py::test_the_commands_are_in_order_and_push_privately_by_default",
    ),
    "hub_private_repo": (
        "a network",
        "tests/test_after_training.py::test_a_repository_of_the_other_visibility_is_refused",
    ),
    "hub_revision": (
        "a network",
        "tests/test_after_training.py::test_the_commands_are_in_order_and_push_privately_by_default",
    ),
    "hub_token": ("a network", "tests/test_after_training.py::test_a_command_gets_the_token_but_no_launcher_variables"),
    "kind": ("a recipe's own key", "tests/train/test_sft_trainer.py::test_an_unknown_kind_is_refused"),
    "liger_kernel_config": ("a GPU", None),
    "log_level_replica": ("several processes", None),
    "log_on_each_node": ("several machines", None),
    "merge_after_training": (
        "programs of their own",
        "tests/test_after_training.py::test_a_finished_run_is_evaluated_merged_and_pushed",
    ),
    "optim_target_modules": ("the package of GaLore or APOLLO", None),
    "project": ("a tracker", "tests/train/test_trackers.py::test_wandb_gets_settings_metrics_and_final_numbers"),
    "push_to_hub": ("a network", "tests/test_after_training.py::test_a_finished_run_is_evaluated_merged_and_pushed"),
    "run_group": ("a tracker", "tests/train/test_trackers.py::test_wandb_gets_settings_metrics_and_final_numbers"),
    "run_tags": ("a tracker", "tests/train/test_trackers.py::test_wandb_gets_settings_metrics_and_final_numbers"),
    "tf32": ("a GPU", None),
    "torch_compile": (
        "a compiler",
        "tests/train/test_gates.py::test_a_compiled_model_on_two_processes_passes_all_gates",
    ),
    "torch_compile_mode": ("a compiler", None),
    "torch_empty_cache_steps": ("a GPU", None),
    "trackio_bucket_id": ("a network", None),
    "trackio_space_id": ("a network", None),
    "trust_checkpoint": (
        "sharded checkpoints",
        "tests/hostile/test_shards.py::test_a_resume_of_zero_loads_no_shards_of_others",
    ),
    "trust_remote_code": (
        "a model with code",
        "tests/merge/test_merge.py::test_a_model_with_custom_code_is_merged_if_it_is_trusted",
    ),
    "use_cpu": ("a GPU", "tests/settings/test_settings.py::test_a_cpu_run_on_a_gpu_machine_is_not_in_bf16"),
    "use_liger_kernel": ("a GPU", "tests/settings/test_conditions.py::test_liger_without_its_package_is_refused"),
}

# Flags of a second start: the flag, and what must differ from a resume without it.
RESUMES = {
    "ignore_data_skip": Change("true", logged("logps/chosen")),
    "overwrite_run": Change("true", lambda observed: len((observed.run.read_run() or {})["generations"]), 1),
    "resume_from_checkpoint": Change("never", lambda observed: observed.end, "RunFolderError"),
}


class Walker:
    """Trains tiny runs; a run without the flag is trained once for all flags that share its settings."""

    def __init__(self, folder: Path, names: Mapping[str, Path], patch: pytest.MonkeyPatch) -> None:
        self.folder, self.names, self.patch = folder, names, patch
        self._plain: dict[str, Observation] = {}

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of a recipe; models and data are named by their keys in `names`."""
        named = {"model_name_or_path": "tiny_gpt2", "dataset_name": "pairs.jsonl"} | dict(given)
        places = {
            name: ",".join(str(self.names[each]) for each in named[name].split(","))
            for name in ("model_name_or_path", "dataset_name")
        }
        return {**BASE, **given, **places}

    def observe_plain(self, change: Change) -> Observation:
        """The run without the flag."""
        key = json.dumps([change.given, change.environment], sort_keys=True)
        if key not in self._plain:
            self._plain[key] = self.observe(change)
        return self._plain[key]

    def observe(self, change: Change, *flags: str, folder: Path | None = None) -> Observation:
        """A run with the flags, in a new folder or in this one."""
        folder = folder or self.folder / str(len(list(self.folder.iterdir()))) / "run"
        folder.parent.mkdir(exist_ok=True)
        observed = Observation(RunDir(folder))
        with self.patch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL and transformers retire some flags
            patch.chdir(folder.parent)
            patch.setenv("DPOKIT_CACHE", str(folder.parent / "cache"))
            for name, value in change.environment.items():
                patch.setenv(name, value)
            self._watch(observed, patch)
            try:
                observed.run = train("dpo_test", {**self.defaults(change.given), "output_dir": str(folder)}, flags)
                self._look_at(observed)
            except (DpokitError, Preempted) as error:
                observed.end = type(error).__name__
                observed.console = str(error)
        return observed

    def _look_at(self, observed: Observation) -> None:
        """Keeps what the process forgets after the test."""
        observed.loader = observed.trainer.get_train_dataloader()
        if observed.trainer.eval_dataset is not None:
            observed.evaluation_batches = len(observed.trainer.get_eval_dataloader())
        observed.compiler = observed.trainer.accelerator.state.dynamo_plugin.backend.value
        observed.verbosity = transformers_logging.get_verbosity()
        observed.is_deterministic = torch.are_deterministic_algorithms_enabled()

    def _watch(self, observed: Observation, patch: pytest.MonkeyPatch) -> None:
        """Keeps the trainer and its signals, the sizes of the reference's batches, and the processes that tokenise."""
        build, score, tokenise = dpokit.run.build_trainer, PairTrainer.compute_ref_log_probs, Dataset.map

        def build_and_keep(*arguments: Any, **named: Any) -> Any:
            for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
                handler = signal.getsignal(getattr(signal, name))
                observed.signals[name] = getattr(handler, "__name__", "") == "note"
            observed.trainer, prepared = build(*arguments, **named)
            return observed.trainer, prepared

        def score_and_count(trainer: Any, model: Any, inputs: Any) -> Any:
            observed.reference_batches.append(len(inputs["input_ids"]) // 2)
            return score(trainer, model, inputs)

        def tokenise_and_count(rows: Any, *arguments: Any, **named: Any) -> Any:
            observed.processes.append(named.get("num_proc"))
            return tokenise(rows, *arguments, **named)

        patch.setattr(Dataset, "map", tokenise_and_count)
        patch.setattr(dpokit.run, "build_trainer", build_and_keep)
        patch.setattr(PairTrainer, "compute_ref_log_probs", score_and_count)


def write_data(folder: Path) -> dict[str, Path]:
    """Files and folders of pairs, by name: `splits` has three splits, `configs` two configurations."""
    paths = {
        name: folder / name
        for name in ("pairs.jsonl", "other.jsonl", "repeated.jsonl", "doubled.jsonl", "splits", "configs")
    }
    write_pairs(paths["pairs.jsonl"], 12)
    write_pairs(paths["repeated.jsonl"], 24, of_a_prompt=3)
    write_pairs(paths["other.jsonl"], 10)
    paths["doubled.jsonl"].write_text(paths["pairs.jsonl"].read_text() + paths["other.jsonl"].read_text())
    paths["splits"].mkdir()
    for split, number in (("train", 8), ("test", 4), ("validation", 5)):
        write_pairs(paths["splits"] / f"{split}.jsonl", number)
    paths["configs"].mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("first", "second"))
    card = f"---\nconfigs:\n{configs}---\n"
    (paths["configs"] / "README.md").write_text(card)
    write_pairs(paths["configs"] / "first.jsonl", 8)
    write_pairs(paths["configs"] / "second.jsonl", 11)
    return paths


def build_mixture(folder: Path, tokenizer: Any) -> Path:
    """A random mixture of 2 experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    size = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    MixtralForCausalLM(MixtralConfig(**size, **heads, **experts)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_hub_cache(folder: Path, revisions: Mapping[str, Path]) -> Path:
    """A cache of the Hub with revisions of the model `me/tiny`."""
    for name, model in revisions.items():
        shutil.copytree(model, folder / "models--me--tiny" / "snapshots" / f"commit-{name}")
        reference = folder / "models--me--tiny" / "refs" / name
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(f"commit-{name}")
    return folder


@pytest.fixture(scope="module")
def walker(tmp_path_factory, tiny_gpt2, tiny_qwen2, plain_tokenizer):
    folder = tmp_path_factory.mktemp("walk_inputs")
    names = {"tiny_gpt2": tiny_gpt2, "tiny_qwen2": tiny_qwen2, **write_data(folder)}
    names["on the Hub"] = Path("me/tiny")
    names["tiny_mixture"] = build_mixture(folder / "mixture", plain_tokenizer)
    hub = write_hub_cache(folder / "hub", {"main": tiny_gpt2, "v2": tiny_qwen2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
        yield Walker(tmp_path_factory.mktemp("walk"), names, patch)


@pytest.fixture(autouse=True)
def restore_process():
    """Restores what `--full_determinism` and `--log_level` change in the whole process."""
    environment, verbosity = dict(os.environ), transformers_logging.get_verbosity()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    transformers_logging.set_verbosity(verbosity)


def argument(walker: Walker, name: str, value: str) -> list[str]:
    """The flag on the command line, by its key in the table."""
    name = name.partition(" ")[0]
    values = value.split() if name == "loss_weights" else [str(walker.names.get(value, value))]
    if name in ("datasets", "dataset_mixer"):
        values = [value.replace("other.jsonl", str(walker.names["other.jsonl"]))]
    return [f"--{name}", *values]


MARKS = {
    "torch_compile_backend": pytest.mark.slow,
    "activation_checkpointing": pytest.mark.pinned("transformers"),
    "activation_checkpointing_kwargs": pytest.mark.pinned("transformers"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in CHANGES])
def test_a_changed_flag_changes_the_run(name, walker, capfd):
    change = CHANGES[name]
    plain = walker.observe_plain(change)
    assert plain.trainer is not None, plain.console
    before = change.view(plain)
    capfd.readouterr()
    changed = walker.observe(change, *argument(walker, name, change.value))
    changed.console += "".join(capfd.readouterr())
    assert changed.trainer is not None, changed.console
    after = change.view(changed)
    assert after != before, changed.console
    assert change.becomes in (ANY, after), changed.console


def test_two_equal_runs_show_the_same(walker):
    """Else a difference would prove nothing."""
    changes = {name: change for name, change in CHANGES.items() if change.becomes is ANY and not change.given}
    first, second = (walker.observe(changes["beta"]) for _ in range(2))
    assert {name for name, change in changes.items() if change.view(first) != change.view(second)} == set()


@pytest.mark.parametrize("name", RESUMES)
def test_a_changed_flag_changes_a_resume(name, walker):
    change = RESUMES[name]
    first = Change("", loss, given={**SAVES, "max_steps": 3})
    whole = walker.observe_plain(first)
    views = []
    for flags in ([], argument(walker, name, change.value)):
        cut = interrupt(whole.run, walker.folder / f"cut {name} {len(flags)}" / "run", after=2)
        views.append(change.view(walker.observe(first, *flags, folder=cut.path)))
    assert views[0] != views[1]
    assert change.becomes in (ANY, views[1])


def test_lora_flags_of_a_loaded_adapter_are_reported(walker, capfd):
    first = walker.observe(Change("", loss, given=LORA))
    walker.names["adapter"] = first.run.adapter
    capfd.readouterr()
    given = {"model_name_or_path": "adapter", "dataset_name": "other.jsonl", "use_peft": True}
    second = walker.observe(Change("", loss, given=given), "--lora_r", "2")
    assert second.end == "finished", second.console
    assert "no effect: lora_r, as the adapter" in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", REFUSALS)
def test_a_flag_without_an_effect_is_refused_by_name(name, tmp_path):
    value, more, reason = REFUSALS[name]
    with pytest.raises(SettingsError, match=name) as refusal:
        load_settings("dpo_test", {**BASE, "output_dir": str(tmp_path)}, [*more, f"--{name}", value])
    assert reason in str(refusal.value)


def test_every_flag_is_walked_or_refused_or_listed():
    tables = {"CHANGES": CHANGES, "REFUSALS": REFUSALS, "ELSEWHERE": ELSEWHERE, "RESUMES": RESUMES, "REFUSED": REFUSED}
    places = {name: [table for table, rows in tables.items() if name in rows] for name in FLAG_FACTS}
    assert {name: rows for name, rows in places.items() if len(rows) != 1} == {}
    names = {name.partition(" ")[0] for rows in tables.values() for name in rows}
    assert names - FLAG_FACTS.keys() == set()


@pytest.mark.parametrize("name", [name for name, (_, proof) in ELSEWHERE.items() if proof])
def test_a_named_proof_exists(name):
    path, _, test = ELSEWHERE[name][1].partition("::")
    functions = [
        node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
    ]
    assert test in functions
