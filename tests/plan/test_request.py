"""Recipe, flags and devices together: the plan is for its target, not for the machine that makes it."""

from functools import partial

import pytest
import torch
from conftest import ROOT
from planning import ask

from dpokit.errors import SettingsError
from dpokit.plan.request import load_asked
from dpokit.settings.layers import find_recipe, read_defaults


@pytest.fixture
def asked(tmp_path):
    return partial(ask, tmp_path)


def test_for_gpus_bf16_is_on_as_gpus_of_today_have_it(asked):
    made = asked("dpo_gpt2", "8x80")
    assert made.autocast is torch.bfloat16
    assert made.settings.training.bf16
    assert not made.settings.training.use_cpu


@pytest.mark.parametrize(
    ("flags", "dtype"), [(["--bf16", "false"], None), (["--fp16"], torch.float16), (["--bf16"], torch.bfloat16)]
)
def test_a_precision_that_was_asked_for_is_planned_with(asked, flags, dtype):
    assert asked("dpo_gpt2", "24", *flags).autocast is dtype


def test_a_precision_in_a_yaml_file_counts_too(asked, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("bf16: false\n")
    assert asked("dpo_gpt2", "24", "--config", str(file)).autocast is None
    assert asked("dpo_gpt2", "24", "--config", str(file), "--bf16").autocast is torch.bfloat16


def test_flags_keep_their_place_over_the_recipe(asked):
    made = asked("dpo_qlora", "24", "--lora_r", "32")
    assert made.settings.model.lora_r == 32
    assert str(made.settings.training.optim.value) == "paged_adamw_8bit"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--use_cpu"], "use_cpu is set"),
        (["--fp16", "--bf16"], "fp16 and bf16 are both true"),
        (["--lora_rr", "3"], "no setting 'lora_rr'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_is_refused(asked, flags, says):
    with pytest.raises(SettingsError, match=says):
        asked("dpo_gpt2", "24", *flags)


def test_a_recipe_is_found_by_its_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert find_recipe("dpo_gpt2") == find_recipe("recipes/dpo_gpt2.py")


@pytest.mark.parametrize("name", ["dpo_gpt3", "recipes", "--lora_r", "", "README.md"])
def test_what_is_no_recipe_is_refused_and_the_recipes_are_named(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SettingsError, match="there is no recipe") as caught:
        load_asked(name, [], None)
    assert "dpo_qlora" in caught.value.expected


@pytest.mark.parametrize("text", ["x = 1", "DEFAULTS = 3", "raise ValueError('no')", "def ("])
def test_a_script_without_defaults_is_no_recipe(text, tmp_path):
    path = tmp_path / "r.py"
    path.write_text(text)
    with pytest.raises(SettingsError, match="is no recipe"):
        read_defaults(path)


def test_a_recipe_is_read_and_not_run(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("DEFAULTS = {'a': 1}\nif __name__ == '__main__':\n    raise RuntimeError\n")
    assert read_defaults(path) == {"a": 1}
