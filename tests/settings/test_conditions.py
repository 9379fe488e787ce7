"""A setting without an effect is refused or reported by name; the table agrees with the libraries."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import yaml
from conftest import write_pairs
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig

from dpokit.checkpoint.resume import claim_folder
from dpokit.errors import SettingsError
from dpokit.run import build_trainer
from dpokit.rundir import RunDir
from dpokit.settings.checks import LOSS_TYPES
from dpokit.settings.conditions import (
    CONDITIONS,
    DIVERGENCE_LOSSES,
    OPTIMIZERS_WITH_ARGS,
    OPTIMIZERS_WITH_TARGETS,
    OPTIMIZERS_WITHOUT_BETAS,
    OPTIMIZERS_WITHOUT_EPSILON,
    SCHEDULES_WITHOUT_OPTIONS,
    SCHEDULES_WITHOUT_WARMUP,
    SMOOTHED_LOSSES,
)
from dpokit.settings.load import load_settings
from dpokit.train.batches import OWN_KEYS
from dpokit.train.gates import Gates
from dpokit.train.value_checks import check_values

ON_CPU = {"use_cpu": True}
KEEPS_BEST = {"eval_strategy": "steps", "load_best_model_at_end": True, "eval_steps": 5, "save_steps": 5}
# flag: (its value, settings with which it does nothing, settings with which it has an effect or None)
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any] | None]] = {
    "label_smoothing": (0.1, {"loss_type": ["sigmoid", "hinge"]}, {"loss_type": ["sigmoid", "robust"]}),
    "discopop_tau": (0.1, {"loss_type": "sigmoid"}, {"loss_type": "discopop"}),
    "f_divergence_type": ("js_divergence", {"loss_type": ["sigmoid", "bco_pair"]}, {"loss_type": ["sigmoid", "sft"]}),
    "f_alpha_divergence_coef": (0.7, {"f_divergence_type": "js_divergence"}, {"f_divergence_type": "alpha_divergence"}),
    "ld_alpha": (0.5, {"loss_type": "sft"}, {"loss_type": "ipo"}),
    "beta": (0.5, {"loss_type": "sft"}, {"loss_type": ["sigmoid", "sft"]}),
    "ref_model_mixup_alpha": (0.5, {"sync_ref_model": False}, {"sync_ref_model": True}),
    "ref_model_sync_steps": (8, {"sync_ref_model": False}, {"sync_ref_model": True}),
    "sync_ref_model": (True, {"max_steps": 100, "ref_model_sync_steps": 512}, {"max_steps": 1000}),
    "precompute_ref_batch_size": (4, {"precompute_ref_log_probs": False}, {"precompute_ref_log_probs": True}),
    "num_train_epochs": (2.0, {"max_steps": 10}, {"max_steps": -1}),
    "lr_scheduler_kwargs": (
        {"min_lr": 1e-7},
        {"lr_scheduler_type": "constant_with_warmup"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
    ),
    "warmup_steps": (0.1, {"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant_with_warmup"}),
    "adam_beta1": (0.8, {"optim": "sgd"}, {"optim": "adamw_torch"}),
    "adam_beta2": (0.8, {"optim": "adafactor"}, {"optim": "paged_lion_8bit"}),
    "adam_epsilon": (1e-6, {"optim": "paged_lion_8bit"}, {"optim": "adamw_torch"}),
    "optim_args": ("momentum=0.9", {"optim": "adamw_torch"}, {"optim": "sgd"}),
    "optim_target_modules": ("all-linear", {"optim": "adamw_torch"}, {"optim": "apollo_adamw"}),
    "eval_steps": (10, {"eval_strategy": "epoch"}, {"eval_strategy": "steps"}),
    "eval_delay": (10, {"eval_strategy": "no"}, {"eval_strategy": "epoch"}),
    "eval_answers": (4, {"eval_strategy": "no"}, {"eval_strategy": "steps"}),
    "metric_for_best_model": ("eval_loss", {"load_best_model_at_end": False}, KEEPS_BEST),
    "greater_is_better": (True, {"eval_strategy": "no"}, {**KEEPS_BEST, "metric_for_best_model": "eval_loss"}),
    "save_steps": (10, {"save_strategy": "epoch"}, {"save_strategy": "steps"}),
    "save_strategy": (
        "best",
        {"eval_strategy": "no", "metric_for_best_model": None},
        {"eval_strategy": "steps", "metric_for_best_model": "eval_loss"},
    ),
    "save_total_limit": (2, {"save_strategy": "no"}, {"save_strategy": "epoch"}),
    "save_only_model": (True, {"save_strategy": "no"}, {"save_strategy": "epoch"}),
    "logging_steps": (10, {"logging_strategy": "epoch"}, {"logging_strategy": "steps"}),
    "lora_alpha": (8, {"use_peft": False}, {"use_peft": True}),
    "lora_dropout": (0.1, {"use_peft": True, "disable_dropout": True}, {"use_peft": True, "disable_dropout": False}),
    "lora_modules_to_save": (["wte"], {"use_peft": False}, {"use_peft": True}),
    "lora_r": (16, {"use_peft": False}, {"use_peft": True}),
    "lora_target_modules": (["c_attn"], {"use_peft": False}, {"use_peft": True}),
    "lora_target_parameters": (["c_attn.weight"], {"use_peft": False}, {"use_peft": True}),
    "lora_task_type": ("CAUSAL_LM", {"use_peft": False}, {"use_peft": True}),
    "use_dora": (True, {"use_peft": False}, {"use_peft": True}),
    "use_rslora": (True, {"use_peft": False}, {"use_peft": True}),
    "bnb_4bit_quant_storage": ("bfloat16", {"load_in_4bit": False}, {"load_in_4bit": True, "use_peft": True}),
    "bnb_4bit_quant_type": ("fp4", {"load_in_4bit": False}, {"load_in_4bit": True, "use_peft": True}),
    "use_bnb_nested_quant": (True, {"load_in_4bit": False}, {"load_in_4bit": True, "use_peft": True}),
    "model_revision": ("v2", {"model_name_or_path": __file__}, {"model_name_or_path": "openai-community/gpt2"}),
    "gradient_checkpointing": (True, {"activation_checkpointing": False}, {"activation_checkpointing": True}),
    "gradient_checkpointing_kwargs": (
        {"use_reentrant": True},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
    ),
    "activation_checkpointing_kwargs": (
        {"use_reentrant": True},
        {"gradient_checkpointing": False},
        {"activation_checkpointing": True},
    ),
    "liger_kernel_config": ({"rope": True}, {"use_liger_kernel": False}, {"use_liger_kernel": True}),
    "fsdp_config": ({"min_num_params": 10}, {"fsdp": ""}, None),
    "max_prompt_length": (600, {"max_length": 512}, {"max_length": 1024}),
    "max_completion_length": (513, {"max_length": 512}, {"max_length": None}),
    "dataset_test_split": ("test", {"eval_fraction": 0.1}, {"eval_fraction": None}),
    "dataset_config": ("en", {"dataset_name": __file__}, {"dataset_name": "some/data"}),
    "dataset_train_split": ("t", {"datasets": [{"path": "a", "split": "b"}]}, {"datasets": [{"path": "a"}]}),
    "columns": (["prompt=q"], {"datasets": [{"path": "a", "columns": ["q"]}]}, {"datasets": [{"path": "a"}]}),
    "ignore_columns": (["q"], {"datasets": [{"path": "a", "ignore_columns": "q"}]}, {"datasets": [{"path": "a"}]}),
    "format": ("shp", {"datasets": [{"path": "a", "format": "shp"}]}, {"datasets": [{"path": "a"}]}),
    "ranked": ("all", {"datasets": [{"path": "a", "ranked": "random"}]}, {"datasets": [{"path": "a"}]}),
    "min_score_gap": (2.0, {"datasets": [{"path": "a", "min_score_gap": 1}]}, {"datasets": [{"path": "a"}]}),
    "balance_sources": (True, {"dataset_name": "a"}, {"dataset_name": "a,b"}),
    "mixture_seed": (1, {"max_pairs_per_source": None}, {"dataset_mixer": {"a": 0.5, "b": 1.0}}),
    "dataset_num_proc": (2, {"dataset_streaming": True, "max_steps": 3}, {"dataset_streaming": False}),
    "group_by_prompt": (True, {"dataset_streaming": True, "max_steps": 3}, {"dataset_streaming": False}),
    "run_tags": (["a"], {"report_to": "none"}, {"report_to": "tensorboard"}),
    "project": ("mine", {"report_to": "none"}, {"report_to": "tensorboard"}),
    "trackio_space_id": ("me/space", {"report_to": "tensorboard"}, {"report_to": "trackio"}),
    "trackio_bucket_id": ("me/bucket", {"report_to": "none"}, {"report_to": "trackio"}),
    "hub_model_id": ("me/model", {"push_to_hub": False}, {"push_to_hub": True}),
    "hub_revision": ("main", {"push_to_hub": False}, {"push_to_hub": True}),
    "hub_license": ("mit", {"push_to_hub": False}, {"push_to_hub": True}),
    "hub_token": ("hf_a", {"push_to_hub": False}, {"push_to_hub": True}),
    "hub_private_repo": (True, {"push_to_hub": False}, {"report_to": "trackio"}),
}
SUPERVISED = {
    "label_smoothing_factor": (0.1, {"loss_type": "dft"}, {"loss_type": "nll"}),
    "shared_prefix": (True, {"loss_type": "nll"}, None),
    "group_by_prompt": (True, {"loss_type": "nll"}, None),
}
# case: (settings that do not fit, a part of the message, settings that fit, whether the first are refused)
CONFLICTS: dict[str, tuple[dict[str, Any], str, dict[str, Any], bool]] = {
    "alpha divergence 1": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        "equals reverse_kl",
        {"f_divergence_type": "alpha_divergence"},
        False,
    ),
    "EXO without smoothing": (
        {"loss_type": ["exo_pair"]},
        "exo_pair divides by label_smoothing, which is 0.0",
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
        True,
    ),
    "robust without smoothing": (
        {"loss_type": ["robust"]},
        "equals sigmoid",
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        False,
    ),
    "a small beta per token": (
        {"loss_type": ["sigmoid_norm"]},
        "beta 0.1 scales to almost nothing",
        {"loss_type": ["sigmoid_norm"], "beta": 2.0},
        False,
    ),
    "optimal transport of one pair": (
        {"loss_type": ["aot"], "per_device_train_batch_size": 1},
        "each batch has a single pair",
        {"loss_type": ["aot"], "per_device_train_batch_size": 2},
        False,
    ),
    "weights of sorted pairs": (
        {"loss_type": ["sigmoid", "aot_unpaired"], "use_weighting": True},
        "TRL cannot weigh the pairs of loss_type sigmoid aot_unpaired",
        {"loss_type": ["sigmoid"], "use_weighting": True},
        True,
    ),
    "weights of a mean over tokens": (
        {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
        "TRL cannot weigh",
        {"loss_type": ["ipo"], "use_weighting": True},
        True,
    ),
    "a moving reference of an adapter": (
        {"use_peft": True, "sync_ref_model": True},
        "the reference of an adapter",
        {"use_peft": True},
        True,
    ),
    "task": ({"use_peft": True, "lora_task_type": "SEQ_CLS"}, "only causal language models", {"use_peft": True}, True),
    "tokens of one device": (
        {"average_tokens_across_devices": False},
        "mean over the tokens",
        {"average_tokens_across_devices": True},
        True,
    ),
    "unordered workers": ({"dataloader_in_order": False}, "seeded random order", {"dataloader_in_order": True}, True),
    "an evaluation of nothing": (
        {"eval_on_start": True},
        "no held-out pairs are loaded",
        {"eval_on_start": True, "eval_strategy": "steps"},
        True,
    ),
    "options of no workers": (
        {"dataloader_persistent_workers": True},
        "there are no worker processes",
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
        True,
    ),
    "columns": ({"remove_unused_columns": False}, "no other columns", {"remove_unused_columns": True}, True),
    "predictions": ({"eval_do_concat_batches": False}, "keeps no predictions", {"eval_do_concat_batches": True}, True),
    "two names of the pairs": (
        {"dataset_name": "a", "datasets": [{"path": "b"}]},
        "one of them alone says which pairs are read",
        {"datasets": [{"path": "b"}]},
        True,
    ),
    "a share and a split": (
        {"datasets": [{"path": "a", "test_split": "test"}], "eval_fraction": 0.1},
        "or the test split of a source",
        {"datasets": [{"path": "a", "test_split": "test"}]},
        True,
    ),
    "balance and shares": (
        {"dataset_mixer": {"a": 0.5, "b": 1.0}, "balance_sources": True},
        "and so do these shares",
        {"dataset_name": "a,b", "balance_sources": True},
        True,
    ),
    "batches of accelerate": (
        {"accelerator_config": {"split_batches": True}},
        "dpokit deals the batches",
        {"accelerator_config": {"non_blocking": True}},
        True,
    ),
    "micro-batches of accelerate": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
        "gradient_accumulation_steps sets",
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
        True,
    ),
}


def load(recipe: dict[str, Any], call: dict[str, Any], kind: str = "dpo"):
    return load_settings("recipes/dpo_x.py", {"kind": kind, "output_dir": "runs/x", **ON_CPU, **recipe}, call)


def find_condition(flag: str, unmet: dict[str, Any]):
    """The condition of the flag that the last of these settings does not meet."""
    rows = [row for row in CONDITIONS if flag in row.flags and row.depends_on]
    return next((row for row in rows if list(unmet)[-1] in row.depends_on), rows[0])


ALL = CASES | SUPERVISED
# Their cases set activation_checkpointing, which transformers before 5.23 does not have.
MARKS = dict.fromkeys(["gradient_checkpointing", "activation_checkpointing_kwargs"], pytest.mark.pinned("transformers"))
FLAGS = [pytest.param(flag, marks=MARKS.get(flag, ())) for flag in ALL]


def name_kind(flag: str) -> str:
    return "sft" if flag in SUPERVISED else "dpo"


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_without_an_effect_is_refused_or_reported(flag):
    (value, without, _), kind = ALL[flag], name_kind(flag)
    condition = find_condition(flag, without)
    if condition.refuses:
        with pytest.raises(SettingsError, match=rf"call sets .*{flag}.*, which has no effect with") as refusal:
            load({}, {**without, flag: value}, kind)
        assert condition.remedy in refusal.value.do
        assert f"leave out {flag}" in refusal.value.do
    else:
        (note,) = load({}, {**without, flag: value}, kind).notes
        assert f"call sets {flag}" in note
        assert condition.remedy in note
        assert "\n" not in note


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_with_an_effect_is_accepted(flag):
    value, _, fitting = ALL[flag]
    if fitting is None:
        pytest.skip("needs several processes, or the other kind of recipe")
    assert [note for note in load({}, {**fitting, flag: value}, name_kind(flag)).notes if "no effect" in note] == []


@pytest.mark.parametrize("flag", FLAGS)
def test_a_recipes_default_without_an_effect_is_reported(flag):
    value, without, _ = ALL[flag]
    notes = load({**without, flag: value}, {}, name_kind(flag)).notes
    assert any(f"recipe dpo_x sets {flag}" in note for note in notes), notes


@pytest.mark.parametrize("flag", FLAGS[: len(CASES)])
def test_a_default_that_a_flag_makes_pointless_is_not_reported(flag):
    value, without, _ = CASES[flag]
    assert [note for note in load({flag: value}, without).notes if f"sets {flag}" in note] == []


@pytest.mark.parametrize("flag", FLAGS)
def test_a_yaml_file_without_an_effect_is_refused_or_reported(flag, tmp_path):
    (value, without, _), kind = ALL[flag], name_kind(flag)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**without, flag: value}))
    argv = ["--config", str(path)]
    if find_condition(flag, without).refuses:
        with pytest.raises(SettingsError, match=rf"own\.yaml sets .*{flag}"):
            load({}, argv, kind)
    else:
        assert any(f"own.yaml sets {flag}" in note for note in load({}, argv, kind).notes)


@pytest.mark.parametrize("case", CONFLICTS)
def test_contradicting_settings_are_refused_or_reported(case):
    settings, message, fitting, refuses = CONFLICTS[case]
    assert [note for note in load({}, fitting).notes if message in note] == []
    for recipe, call in (({}, settings), (settings, {})):
        if refuses:
            with pytest.raises(SettingsError) as refusal:
                load(recipe, call)
            assert message in refusal.value.seen
        else:
            assert [note for note in load(recipe, call).notes if message in note]


def test_every_condition_has_a_case():
    dependent = {flag for row in CONDITIONS if row.depends_on for flag in row.flags}
    assert dependent == CASES.keys() | SUPERVISED.keys()
    alone = {row.why.partition("{")[0] for row in CONDITIONS if not row.depends_on}
    messages = []
    for settings, *_ in CONFLICTS.values():
        try:
            messages += load({}, settings).notes
        except SettingsError as refusal:
            messages.append(refusal.seen)
    assert {why for why in alone if not any(why in message for message in messages)} == set()


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.0},
        {"save_only_model": False},
        {"warmup_steps": 0, "lr_scheduler_type": "constant"},
        {"warmup_steps": 9, "lr_scheduler_type": "constant", "optim": "schedule_free_adamw"},
    ],
)
def test_a_setting_of_no_harm_is_accepted(settings):
    assert load({}, settings).notes == []


def test_robust_with_half_of_the_labels_wrong_is_refused():
    with pytest.raises(SettingsError, match=r"label_smoothing is 0\.5"):
        load({}, {"loss_type": ["robust"], "label_smoothing": 0.5})


def test_a_secret_without_an_effect_is_not_shown():
    (note,) = load({}, {"hub_token": "hf_secret"}).notes
    assert "call sets hub_token ***, which has no effect with push_to_hub false" in note


# -- the table and the libraries ---------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path, tiny_gpt2):
    """A trainer whose policy is not its reference."""
    folder = tmp_path
    pairs = write_pairs(folder / "pairs.jsonl", 8)
    named = {"model_name_or_path": str(tiny_gpt2), "dataset_name": str(pairs), "output_dir": str(folder / "run")}
    settings = load_settings("dpo_x", {**named, **ON_CPU, "max_length": 64, "report_to": "none"}, [])
    run = RunDir(folder / "run")
    claim_folder(run, settings, world_size=1, placement="one device")
    trainer, _ = build_trainer(run, settings, Gates("stop"))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    trainer.model.eval()
    return trainer


def find_loss(trainer: Any, loss_type: str, **changes: Any) -> float:
    """TRL's loss of the same pairs with these of its attributes."""
    attributes = {"loss_types": [loss_type], "loss_weights": [1.0], "label_smoothing": 0.1, "beta": 0.3}
    attributes |= {"ld_alpha": None, "f_divergence_type": "reverse_kl", **changes}
    tau = attributes.pop("discopop_tau", 0.05)
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator(rows)
    for name in OWN_KEYS:
        batch.pop(name)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in attributes.items():
            patch.setattr(trainer, name, value)
        patch.setattr(trainer.args, "discopop_tau", tau)
        with torch.no_grad():
            return float(trainer._compute_loss(trainer.model, batch, False))


def test_the_flags_of_a_loss_are_those_that_change_it(trainer):
    changes = {"label_smoothing": 0.3, "discopop_tau": 0.5, "ld_alpha": 0.5, "beta": 0.6}
    changes["f_divergence_type"] = "js_divergence"
    compare = set(LOSS_TYPES) - {"sft"}
    expected = {
        "label_smoothing": set(SMOOTHED_LOSSES),
        "discopop_tau": {"discopop"},
        "ld_alpha": compare,
        "beta": compare,
        "f_divergence_type": set(DIVERGENCE_LOSSES),
    }
    plain = {kind: find_loss(trainer, kind) for kind in LOSS_TYPES}
    for name, value in changes.items():
        changed = {kind for kind in LOSS_TYPES if find_loss(trainer, kind, **{name: value}) != plain[kind]}
        assert changed == expected[name], name


def test_robust_without_smoothing_equals_sigmoid(trainer):
    assert find_loss(trainer, "robust", label_smoothing=0.0) == pytest.approx(find_loss(trainer, "sigmoid"))


def test_alpha_divergence_1_equals_reverse_kl(trainer):
    alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}
    assert find_loss(trainer, "sigmoid", **alpha) == find_loss(trainer, "sigmoid")


def trace_rates(name: str, **options: Any) -> list[float]:
    """The learning rates of 8 steps."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    kwargs = options.pop("kwargs", None)
    schedule = get_scheduler(name, optimizer, options["warmup"], 8, scheduler_specific_kwargs=kwargs)
    rates = []
    for _ in range(8):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(*([1.0] if name in ("reduce_lr_on_plateau", "greedy") else []))
    return rates


NEEDED = {"warmup_stable_decay": {"num_decay_steps": 2}, "cosine_with_min_lr": {"min_lr": 0.1}}
NEEDED["cosine_warmup_with_min_lr"] = {"min_lr": 0.1}


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_schedules_without_a_warm_up_are_as_in_the_table(name):
    slow, fast = (trace_rates(name, warmup=warmup, kwargs=NEEDED.get(name)) for warmup in (0, 4))
    assert (slow == fast) == (name in SCHEDULES_WITHOUT_WARMUP)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_schedules_that_ignore_options_are_as_in_the_table(name):
    try:
        trace_rates(name, warmup=1, kwargs={"no_such_option": 1})
        ignores = True
    except TypeError:
        ignores = False
    assert ignores == (name in SCHEDULES_WITHOUT_OPTIONS)


def find_options(optim: str, **changes: Any) -> dict[str, Any]:
    """What transformers passes to the optimizer."""
    arguments = {"optim": optim, "output_dir": "x", "use_cpu": True, "bf16": False, "report_to": "none", **changes}
    options: dict[str, Any] = Trainer.get_optimizer_cls_and_kwargs(DPOConfig(**arguments))[1]
    return options


def test_offloading_without_a_gpu_is_refused():
    with pytest.raises(SettingsError, match="this run has no GPU"):
        check_values(load({}, {"activation_offloading": True}))


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_without_its_package_is_refused():
    with pytest.raises(SettingsError, match="liger-kernel is not installed"):
        check_values(load({}, {"use_liger_kernel": True}))


@pytest.mark.parametrize(
    ("optim", "args", "ignored"),
    [
        ("sgd", "momentum=0.9, foo=1", "foo"),
        ("adagrad", "momentum=0.9", "momentum"),
        ("rmsprop", "alpha=0.9,momentum=0.5", None),
        ("ademamix", "beta3=0.99,alpha=5.0", None),
        ("ademamix", "beta3=0.9999,alpha=5.0", None),  # its own default
    ],
)
def test_an_option_that_the_optimizer_ignores_is_refused(optim, args, ignored):
    settings = load({}, {"optim": optim, "optim_args": args})
    if ignored is None:
        check_values(settings)
    else:
        with pytest.raises(SettingsError, match=f"has no option {ignored}"):
            check_values(settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_the_flags_of_an_optimizer_are_those_of_the_table(optim):
    try:
        plain = find_options(optim)
    except (ImportError, ValueError) as error:
        pytest.skip(f"not installed: {error}")
    args = "momentum=0.5,alpha=0.5,eps=0.5,lr_decay=0.5,rank=7"
    changes = {
        "adam_beta1": (find_options(optim, adam_beta1=0.5) != plain, not optim.startswith(OPTIMIZERS_WITHOUT_BETAS)),
        "adam_epsilon": (
            find_options(optim, adam_epsilon=0.5) != plain,
            not optim.startswith(OPTIMIZERS_WITHOUT_EPSILON),
        ),
        "optim_args": (find_options(optim, optim_args=args) != plain, optim.startswith(OPTIMIZERS_WITH_ARGS)),
        "optim_target_modules": (
            find_options(optim, optim_target_modules="all-linear") != plain,
            optim.startswith(OPTIMIZERS_WITH_TARGETS),
        ),
    }
    assert {name: has for name, (has, _) in changes.items()} == {name: says for name, (_, says) in changes.items()}
