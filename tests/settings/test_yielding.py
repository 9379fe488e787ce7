"""Defaults that contradict a stronger layer change; two flags of one layer never do."""

import pytest
from conftest import ROOT
from test_recipes import defaults_of

from dpokit.errors import SettingsError
from dpokit.settings.load import load_settings
from dpokit.settings.yielding import COUPLES, yield_defaults

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}
QUANTISED = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["all-linear"], "load_in_4bit": True}
QUANTISED |= {"bnb_4bit_quant_type": "nf4"}
# name: (the recipe's defaults, the user's flags, changed defaults; ... for a default that is removed)
TABLE = {
    "no evaluation": (BEST, {"eval_strategy": "no"}, {"load_best_model_at_end": False}),
    "no evaluation, the best saved": (
        BEST | {"save_strategy": "best"},
        {"eval_strategy": "no"},
        {"load_best_model_at_end": False, "save_strategy": "steps"},
    ),
    "no evaluation, a schedule by it": (
        BEST | {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"eval_strategy": "no"},
        {"load_best_model_at_end": False, "lr_scheduler_type": ...},
    ),
    "no saves": (BEST, {"save_strategy": "no"}, {"load_best_model_at_end": False}),
    "evaluation each epoch": (BEST, {"eval_strategy": "epoch"}, {"save_strategy": "epoch"}),
    "saves each epoch": (BEST, {"save_strategy": "epoch"}, {"eval_strategy": "epoch"}),
    "other evaluations than saves": (
        BEST,
        {"eval_strategy": "steps", "save_strategy": "epoch"},
        {"load_best_model_at_end": False},
    ),
    "evaluation every 100 steps": (BEST, {"eval_steps": 100}, {"save_steps": 100}),
    "saves every 100 steps": (BEST, {"save_steps": 100}, {"eval_steps": 100}),
    "saves every second evaluation": (BEST, {"save_steps": 0.2}, {}),
    "saves between evaluations": (
        BEST,
        {"eval_steps": 100, "save_steps": 50},
        {"load_best_model_at_end": False},
    ),
    "another metric": (
        BEST | {"greater_is_better": False},
        {"metric_for_best_model": "eval_rewards/margins"},
        {"greater_is_better": ...},
    ),
    "no PEFT": (QUANTISED, {"use_peft": False}, dict.fromkeys(set(QUANTISED) - {"use_peft"}, ...)),
    "8 bit": (QUANTISED, {"load_in_8bit": True}, {"load_in_4bit": ..., "bnb_4bit_quant_type": ...}),
    "4 bit": ({"use_peft": True, "load_in_8bit": True}, {"load_in_4bit": True}, {"load_in_8bit": ...}),
    "no quantisation": (QUANTISED, {"load_in_4bit": False}, {"bnb_4bit_quant_type": ...}),
    "fp16": ({"bf16": True, "dtype": "bfloat16"}, {"fp16": True}, {"bf16": False, "dtype": "float16"}),
    "bf16": ({"fp16": True}, {"bf16": True}, {"fp16": False}),
    "epochs": ({"max_steps": 1000, "num_train_epochs": 1}, {"num_train_epochs": 1}, {"max_steps": ...}),
    "steps": ({"num_train_epochs": 3}, {"max_steps": 10}, {}),
    "another schedule": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}},
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_kwargs": ...},
    ),
    "another optimizer": ({"optim": "adamw_torch", "optim_args": "a=1"}, {"optim": "sgd"}, {"optim_args": ...}),
    "one loss": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1]},
        {"loss_type": "sigmoid"},
        {"loss_weights": ...},
    ),
    "the same losses": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1]},
        {"loss_type": ["sigmoid", "sft"]},
        {},
    ),
    "a reference that moves": (
        {"precompute_ref_log_probs": True},
        {"sync_ref_model": True},
        {"precompute_ref_log_probs": False},
    ),
    "a reference computed ahead": (
        {"sync_ref_model": True},
        {"precompute_ref_log_probs": True},
        {"sync_ref_model": False},
    ),
    "other data": (
        {"dataset_name": "a", "dataset_config": "c", "dataset_train_split": "train_prefs", "dataset_test_split": "t"},
        {"dataset_name": "b"},
        {"dataset_config": ..., "dataset_train_split": ..., "dataset_test_split": ...},
    ),
    "other columns": (
        {"dataset_name": "a", "columns": ["prompt=question"], "ignore_columns": ["images"]}
        | {"format": "shp", "ranked": "all"},
        {"dataset_name": "b"},
        {"columns": ..., "ignore_columns": ..., "format": ..., "ranked": ...},
    ),
    "a split for a share of the prompts": (
        {"eval_fraction": 0.05},
        {"dataset_test_split": "validation"},
        {"eval_fraction": ...},
    ),
    "a share of the prompts for a split": (
        {"dataset_test_split": "validation"},
        {"eval_fraction": 0.05},
        {"dataset_test_split": ...},
    ),
    "a mixture for a dataset": (
        {"dataset_name": "a", "dataset_train_split": "train_prefs", "columns": ["prompt=question"]},
        {"datasets": [{"path": "a"}, {"path": "b"}]},
        {"dataset_name": ..., "dataset_train_split": ..., "columns": ...},
    ),
    "a mixer for a dataset": (
        {"dataset_name": "a", "dataset_config": "c"},
        {"dataset_mixer": {"a": 0.5, "b": 1.0}},
        {"dataset_name": ..., "dataset_config": ...},
    ),
    "a dataset for a mixture": ({"datasets": [{"path": "a"}]}, {"dataset_name": "b"}, {"datasets": ...}),
    "a mixer for a mixture": ({"datasets": [{"path": "a"}]}, {"dataset_mixer": {"b": 1.0}}, {"datasets": ...}),
    "the same data": ({"dataset_name": "a", "dataset_train_split": "train_prefs"}, {"dataset_name": "a"}, {}),
    "a stream": ({"precompute_ref_log_probs": True}, {"dataset_streaming": True}, {"precompute_ref_log_probs": False}),
    "no workers": (
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
        {"dataloader_num_workers": 0},
        {"dataloader_persistent_workers": ..., "dataloader_prefetch_factor": ...},
    ),
    "a part held out": ({"dataset_test_split": "t"}, {"eval_fraction": 0.1}, {"dataset_test_split": ...}),
}


def expect(defaults: dict, flags: dict, left: dict) -> dict:
    return {name: value for name, value in {**defaults, **left, **flags}.items() if value is not ...}


@pytest.mark.parametrize("case", TABLE)
def test_a_default_yields_to_a_stronger_flag(case):
    defaults, flags, left = TABLE[case]
    values, origins, notes = yield_defaults([("recipe own", defaults), ("command line", flags)])
    assert values == expect(defaults, flags, left)
    assert origins.keys() == values.keys()
    assert all(origins[name] == "command line" for name in {*flags, *left} & values.keys())
    assert bool(notes) == bool(left)
    assert all(any(name in note for note in notes) for name in left)


@pytest.mark.parametrize("case", TABLE)
def test_values_of_one_layer_never_yield(case):
    defaults, flags, _ = TABLE[case]
    values, _, notes = yield_defaults([("recipe own", {}), ("command line", {**defaults, **flags})])
    assert (values, notes) == ({**defaults, **flags}, [])


@pytest.mark.parametrize("case", TABLE)
def test_a_stronger_value_never_yields_to_a_weaker_flag(case):
    defaults, flags, _ = TABLE[case]
    over = {name: value for name, value in defaults.items() if name not in flags}
    values, _, notes = yield_defaults([("recipe own", flags), ("command line", over)])
    unchanged = {name: value for name, value in values.items() if name in over}
    assert unchanged == over, notes


def test_every_couple_is_in_the_table():
    met = set()
    for defaults, flags, left in TABLE.values():
        if not left:
            continue
        for couple in COUPLES:
            values = {**defaults, **flags}
            is_there = all(flag in values for flag in couple.flags) and set(couple.flags) & set(flags)
            if is_there and couple.clashes(values):
                met.add(couple)
    assert met == set(COUPLES)


RECIPES = sorted((ROOT / "recipes").glob("*.py"))
ALONE = ["--eval_strategy=no", "--eval_strategy=epoch", "--save_strategy=no", "--save_strategy=epoch"]
ALONE += ["--eval_steps=100", "--save_steps=100", "--use_peft=false", "--num_train_epochs=2.0", "--loss_type=sigmoid"]
ALONE += ["--load_best_model_at_end=false", "--sync_ref_model=true", "--precompute_ref_log_probs=true"]

# No default yields to this flag: the first recipe trains an adapter, the second ends before the reference moves.
REFUSED_ALONE = {("dpo_qlora", "sync_ref_model"), ("dpo_quickstart", "sync_ref_model")}
OF_DPO = ("loss_type", "sync_ref_model", "precompute_ref_log_probs")


@pytest.mark.parametrize("flag", ALONE)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_one_flag_alone_is_no_contradiction(recipe, flag, tmp_path):
    defaults = {**defaults_of(recipe), "output_dir": str(tmp_path), "use_cpu": True}
    name, _, value = flag.removeprefix("--").partition("=")
    if recipe.stem.startswith("sft") and name in OF_DPO:
        pytest.skip("a flag of DPO")
    if (recipe.stem, name) in REFUSED_ALONE:
        with pytest.raises(SettingsError, match=name):
            load_settings(str(recipe), defaults, [flag])
        return
    settings = load_settings(str(recipe), defaults, [flag])
    shown = settings.values()[name]
    assert str(shown[0] if isinstance(shown, list) else shown).lower() == value


def test_two_flags_that_contradict_each_other_are_an_error(tmp_path):
    argv = ["--eval_strategy", "no", "--load_best_model_at_end", "true", "--output_dir", str(tmp_path), "--use_cpu"]
    with pytest.raises(SettingsError, match="load_best_model_at_end is set, but eval_strategy is no"):
        load_settings("dpo_gpt2", BEST, argv)
