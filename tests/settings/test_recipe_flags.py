"""Every recipe with the single flags that people are most likely to add: accepted, or refused by one clear message."""

import re

import pytest
from conftest import ROOT
from test_recipes import defaults_of

from dpokit.errors import DpokitError, SettingsError
from dpokit.settings.checks import show_choices
from dpokit.settings.load import load_settings
from dpokit.train.value_checks import check_values

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
ACCEPTED = """
--loss_type sigmoid | --loss_type ipo | --loss_type hinge | --loss_type sigmoid_norm | --loss_type sigmoid sft
--loss_type apo_zero | --loss_type robust --label_smoothing 0.1 | --beta 0.3 | --precompute_ref_log_probs
--precompute_ref_log_probs false | --disable_dropout false
--dataset_name me/data | --dataset_name pairs.jsonl --eval_fraction 0.1 | --dataset_name pairs.jsonl
--dataset_name me/data --dataset_train_split train_prefs --dataset_test_split test_prefs | --dataset_test_split test
--eval_fraction 0.1 | --max_train_samples 10 | --max_length 256
--eval_strategy no | --eval_strategy epoch | --eval_strategy steps | --eval_steps 7 | --eval_on_start
--save_strategy no | --save_strategy epoch | --save_strategy best | --save_steps 30 | --save_total_limit 1
--load_best_model_at_end | --load_best_model_at_end false | --metric_for_best_model eval_loss | --merge_after_training
--max_steps 10 | --num_train_epochs 2 | --learning_rate 1e-6 | --lr_scheduler_type linear | --warmup_steps 10
--optim sgd | --weight_decay 0.1 | --max_grad_norm 1 | --seed 1 | --output_dir runs/x | --model_name_or_path gpt2
--per_device_train_batch_size 1 | --per_device_eval_batch_size 1 | --gradient_accumulation_steps 4
--use_peft | --use_peft false | --use_peft --lora_r 8 | --load_in_4bit --use_peft | --load_in_4bit false
--bf16 | --bf16 false | --dtype float32 | --dtype bfloat16 | --gradient_checkpointing | --gradient_checkpointing false
--report_to none | --report_to tensorboard | --logging_steps 1
"""
OF_PAIRS = ("--loss_type", "--beta", "--precompute_ref_log_probs", "--disable_dropout")  # refused by recipes for SFT
# Flags, and their message; a recipe that accepts them has another reason not to refuse
REFUSED = {
    "--fp16": "this run is on the CPU, which has no fp16 training",
    "--load_in_4bit": "a quantised model cannot be trained as a whole",
    "--loss_weights 1 2 3": r"loss_weights has 3 numbers \(1 2 3\), and loss_type names \d",
    "--warmup_ratio 0.1": "today's name is warmup_steps",
    "--dataset_streaming": r"do this: +--max_(steps|eval_samples) 1000",
    "--label_smoothing 0.1": "has no effect with loss_type",
    "--load_best_model_at_end --eval_strategy no": "but eval_strategy is no: no evaluation shows which checkpoint",
    "--load_best_model_at_end --eval_strategy epoch --save_strategy steps": "do this: +--save_strategy epoch, or",
}
EXCEPTIONS = {
    ("dpo_qlora", "--load_in_4bit"): None,
    ("sft_gpt2", "--loss_weights 1 2 3"): r"a setting of the recipes dpo_\*",
    ("sft_gpt2", "--label_smoothing 0.1"): r"a setting of the recipes dpo_\*",
}


def load(recipe: str, flags: str) -> None:
    argv = [*flags.split(), "--use_cpu"]
    check_values(load_settings(recipe, defaults_of(ROOT / "recipes" / f"{recipe}.py"), argv))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_likely_flag_needs_no_other_flag(recipe):
    refused = {}
    for flags in re.split(r" \| |\n", ACCEPTED.strip()):
        try:
            load(recipe, flags)
        except DpokitError as error:
            refused[flags] = str(error)
    expected = {flags for flags in refused if recipe.startswith("sft") and flags.startswith(OF_PAIRS)}
    assert refused.keys() == expected, refused
    assert all("invalid choice" in text or "of the recipes dpo_*" in text for text in refused.values()), refused


@pytest.mark.parametrize("flags", REFUSED)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flag_that_needs_another_one_says_so(recipe, flags):
    message = EXCEPTIONS.get((recipe, flags), REFUSED[flags])
    if message is None:
        return load(recipe, flags)
    with pytest.raises(DpokitError, match=message) as error:
        load(recipe, flags)
    assert len(str(error.value).splitlines()) == 3
    assert show_choices(str(error.value)) == str(error.value)
    return None


CHOICES = {
    "found IntervalStrategy.NO and SaveStrategy.STEPS": "found no and steps",
    "<SchedulerType.COSINE_WITH_MIN_LR: 'cosine_with_min_lr'> is": "cosine_with_min_lr is",
    "OptimizerNames.ADAMW_8BIT": "adamw_8bit",
    "torch.Type and Path.HOME, Strategy.x": "torch.Type and Path.HOME, Strategy.x",
}


@pytest.mark.parametrize("text", CHOICES)
def test_a_choice_of_a_library_is_shown_as_it_is_typed(text):
    assert show_choices(text) == CHOICES[text]


def test_a_librarys_own_message_shows_choices_as_typed():
    flags = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    flags |= {"eval_steps": 3, "save_steps": 4, "output_dir": "x", "use_cpu": True, "report_to": "none"}
    with pytest.raises(SettingsError, match="round multiple") as error:
        load_settings("dpo_test", {}, flags)
    assert "Strategy." not in str(error.value)
