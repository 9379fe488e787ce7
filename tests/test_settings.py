"""Layers, origins, and every way to get a setting wrong."""

import json

import pytest

from dpokit.errors import MachineError, SettingsError
from dpokit.settings import RETIRED, load_settings

RECIPE = {"output_dir": "runs/x", "learning_rate": 1e-5, "loss_type": ["sigmoid", "sft"], "max_length": None}


def load(*argv: str, **recipe):
    return load_settings("recipes/dpo_x.py", {**RECIPE, **recipe}, argv)


def yaml_file(tmp_path, text: str) -> str:
    (tmp_path / "settings.yaml").write_text(text)
    return str(tmp_path / "settings.yaml")


def test_each_layer_overrides_the_one_before_and_is_remembered(tmp_path):
    config = yaml_file(tmp_path, "beta: 0.3\nlearning_rate: 5e-5\nlora_target_modules: [q_proj, v_proj]\n")
    settings = load("--config", config, "--beta", "0.5", "--no_disable_dropout")
    record = settings.record()
    assert settings.recipe == "dpo_x"
    assert record["beta"] == {"value": 0.5, "origin": "command line"}
    assert record["learning_rate"] == {"value": 5e-5, "origin": "settings.yaml"}  # YAML reads 5e-5 as a string
    assert record["loss_type"] == {"value": ["sigmoid", "sft"], "origin": "recipe dpo_x"}
    assert record["max_length"] == {"value": None, "origin": "recipe dpo_x"}
    assert record["disable_dropout"]["value"] is False
    assert record["lora_target_modules"]["value"] == ["q_proj", "v_proj"]
    assert record["use_cpu"]["origin"] == "this machine"
    assert record["weight_decay"] == {"value": 0.0, "origin": "default"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("bta", "beta"), ("learning_rat", "learning_rate"), ("lr", "lr_scheduler"), ("eval_strat", "eval_str")],
)
def test_a_misspelt_or_abbreviated_name_is_an_error_in_every_layer(name, hint, tmp_path):
    config = yaml_file(tmp_path, f"{name}: 1\n")
    for words, recipe in (([f"--{name}", "1"], {}), ([f"--{name}=1"], {}), ([], {name: 1}), (["--config", config], {})):
        with pytest.raises(SettingsError, match=f"no setting '{name}'") as error:
            load(*words, **recipe)
        assert hint in error.value.do


@pytest.mark.parametrize("name", RETIRED)
def test_a_retired_name_is_answered_with_todays(name):
    with pytest.raises(SettingsError) as error:
        load(f"--{name}", "1")
    assert RETIRED[name] in error.value.do


@pytest.mark.parametrize(
    ("name", "value"), [("beta", "abc"), ("max_steps", "2.5"), ("bf16", "perhaps"), ("dtype", "float8")]
)
def test_a_value_of_the_wrong_type_is_an_error_in_every_layer(name, value, tmp_path):
    config = yaml_file(tmp_path, f"{name}: {value}\n")
    for words, recipe in (([f"--{name}", value], {}), ([], {name: value}), (["--config", config], {})):
        with pytest.raises(SettingsError, match=name):
            load(*words, **recipe)


@pytest.mark.parametrize("text", ["", "- beta\n", "beta: [\n"])
def test_a_yaml_file_without_settings_is_refused(text, tmp_path):
    with pytest.raises(SettingsError, match=r"settings\.yaml"):
        load("--config", yaml_file(tmp_path, text))


def test_a_missing_yaml_file_is_named():
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        load("--config", "none.yaml")


def test_fp16_on_a_cpu_names_the_flag_to_change():
    with pytest.raises(MachineError) as error:
        load("--fp16", "--use_cpu")
    assert "--fp16 false" in error.value.do


def test_bf16_on_a_processor_without_it_names_the_flag_to_change(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    with pytest.raises(MachineError) as error:
        load("--bf16", "--use_cpu")
    assert "--bf16 false" in error.value.do


def test_without_a_gpu_and_a_wish_training_is_in_fp32_on_the_cpu():
    settings = load("--use_cpu")
    assert not settings.training.bf16
    assert not settings.training.fp16


@pytest.mark.parametrize(
    "words",
    [
        ["--padding_free"],
        ["--push_to_hub"],
        ["--max_length", "1"],
        ["--max_train_samples", "0"],
        ["--eval_fraction", "1.5"],
        ["--dataset_streaming"],
        ["--dataset_streaming", "--max_steps", "5", "--eval_fraction", "0.1"],
        ["--dataset_streaming", "--max_steps", "5", "--eval_strategy", "steps"],
        ["--load_in_4bit", "--load_in_8bit"],
        ["--loss_weights", "1.0"],
        ["--eval_strategy", "epoch", "--load_best_model_at_end"],
        ["stray"],
    ],
    ids=" ".join,
)
def test_what_is_not_honoured_or_cannot_be_is_refused(words):
    with pytest.raises(SettingsError):
        load(*words)


def test_a_record_is_json_and_holds_no_secret():
    record = load("--hub_token", "hf_secret").record()
    assert "hf_secret" not in json.dumps(record)
    assert record["hub_token"]["value"] == "***"
