"""The request of a plan: recipe, flags and devices; the plan is for its devices, not for this machine."""

from functools import partial

import pytest
import torch
from conftest import ROOT
from planning import build_request

from dpokit.errors import SettingsError
from dpokit.plan.request import load_request
from dpokit.settings.layers import find_recipe, read_defaults


@pytest.fixture
def make_request(tmp_path):
    return partial(build_request, tmp_path)


def test_a_plan_for_gpus_has_bf16(make_request):
    request = make_request("dpo_gpt2", "8x80")
    assert request.autocast is torch.bfloat16
    assert request.settings.training.bf16
    assert not request.settings.training.use_cpu


@pytest.mark.parametrize(
    ("flags", "dtype"), [(["--bf16", "false"], None), (["--fp16"], torch.float16), (["--bf16"], torch.bfloat16)]
)
def test_a_precision_flag_is_used_by_the_plan(make_request, flags, dtype):
    assert make_request("dpo_gpt2", "24", *flags).autocast is dtype


def test_a_precision_in_a_yaml_file_is_used_by_the_plan(make_request, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("bf16: false\n")
    assert make_request("dpo_gpt2", "24", "--config", str(file)).autocast is None
    assert make_request("dpo_gpt2", "24", "--config", str(file), "--bf16").autocast is torch.bfloat16


def test_flags_override_the_recipe(make_request):
    request = make_request("dpo_qlora", "24", "--lora_r", "32")
    assert request.settings.model.lora_r == 32
    assert str(request.settings.training.optim.value) == "paged_adamw_8bit"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_cpu"], "use_cpu is set"),
        (["--fp16", "--bf16"], "fp16 and bf16 are both true"),
        (["--lora_rr", "3"], "no setting 'lora_rr'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_impossible_flags_are_refused(make_request, flags, message):
    with pytest.raises(SettingsError, match=message):
        make_request("dpo_gpt2", "24", *flags)


def test_a_recipe_is_found_by_its_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert find_recipe("dpo_gpt2") == find_recipe("recipes/dpo_gpt2.py")


@pytest.mark.parametrize("name", ["dpo_gpt3", "recipes", "--lora_r", "", "README.md"])
def test_an_unknown_recipe_is_refused_with_the_known_names(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SettingsError, match="there is no recipe") as caught:
        load_request(name, [], None)
    assert "dpo_qlora" in caught.value.expected


@pytest.mark.parametrize("text", ["x = 1", "DEFAULTS = 3", "raise ValueError('no')", "def ("])
def test_a_script_without_defaults_is_not_a_recipe(text, tmp_path):
    path = tmp_path / "r.py"
    path.write_text(text)
    with pytest.raises(SettingsError, match="is no recipe"):
        read_defaults(path)


def test_reading_a_recipe_does_not_run_it(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("DEFAULTS = {'a': 1}\nif __name__ == '__main__':\n    raise RuntimeError\n")
    assert read_defaults(path) == {"a": 1}
