"""Layers and origins of settings, and every kind of wrong setting."""

import dataclasses
import json

import pytest
from trl import DPOConfig

from dpokit.errors import MachineError, SettingsError
from dpokit.settings.flag_facts import REFUSED
from dpokit.settings.flags import RETIRED, DataArguments
from dpokit.settings.load import find_machine_settings, load_settings

RECIPE = {"output_dir": "runs/x", "learning_rate": 1e-5, "loss_type": ["sigmoid", "sft"], "max_length": None}


def load(*argv: str, **recipe):
    return load_settings("recipes/dpo_x.py", {**RECIPE, **recipe}, argv)


def yaml_file(tmp_path, text: str) -> str:
    (tmp_path / "settings.yaml").write_text(text)
    return str(tmp_path / "settings.yaml")


def test_each_layer_overrides_the_one_before_and_is_remembered(tmp_path):
    config = yaml_file(
        tmp_path, "beta: 0.3\nlearning_rate: 5e-5\nuse_peft: true\nlora_target_modules: [q_proj, v_proj]\n"
    )
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
    [("bta", "beta"), ("learning_rat", "learning_rate"), ("lr", "learning_rate"), ("eval_strat", "eval_str")],
)
def test_a_misspelt_or_short_name_is_an_error_in_every_layer(name, hint, tmp_path):
    config = yaml_file(tmp_path, f"{name}: 1\n")
    for argv, recipe in (([f"--{name}", "1"], {}), ([f"--{name}=1"], {}), ([], {name: 1}), (["--config", config], {})):
        with pytest.raises(SettingsError, match=f"no setting '{name}'") as error:
            load(*argv, **recipe)
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
    for argv, recipe in (([f"--{name}", value], {}), ([], {name: value}), (["--config", config], {})):
        with pytest.raises(SettingsError, match=name):
            load(*argv, **recipe)


@pytest.mark.parametrize("text", ["", "- beta\n", "beta: [\n"])
def test_a_yaml_file_without_settings_is_refused(text, tmp_path):
    with pytest.raises(SettingsError, match=r"settings\.yaml"):
        load("--config", yaml_file(tmp_path, text))


def test_a_name_set_twice_in_yaml_is_an_error_with_its_line(tmp_path):
    with pytest.raises(SettingsError, match=r"beta is set twice in .*line 3"):
        load("--config", yaml_file(tmp_path, "beta: 0.1\nseed: 1\nbeta: 0.2\n"))


def test_a_missing_yaml_file_is_named():
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        load("--config", "none.yaml")


def test_fp16_on_a_cpu_names_the_flag_to_change():
    with pytest.raises(MachineError) as error:
        load("--fp16", "--use_cpu")
    assert "--fp16 false" in error.value.do


def test_bf16_on_a_processor_without_it_names_the_flag_to_change(monkeypatch):
    monkeypatch.setattr("dpokit.settings.load.has_bf16_processor", lambda: False)
    with pytest.raises(MachineError) as error:
        load("--bf16", "--use_cpu")
    assert "--bf16 false" in error.value.do


def test_a_cpu_run_is_in_fp32_by_default():
    settings = load("--use_cpu")
    assert not settings.training.bf16
    assert not settings.training.fp16


@pytest.mark.parametrize(
    "argv",
    [
        ["--padding_free"],
        ["--hub_strategy", "checkpoint"],
        ["--max_length", "1"],
        ["--loss_type", "nope", "sft"],
        ["--beta", "-1"],
        ["--learning_rate", "nan"],
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
def test_an_unsupported_or_impossible_value_is_refused(argv):
    with pytest.raises(SettingsError):
        load(*argv)


def test_a_record_is_json_and_holds_no_secret():
    record = load("--push_to_hub", "--hub_token", "hf_secret").record()
    assert "hf_secret" not in json.dumps(record)
    assert record["hub_token"]["value"] == "***"


def every_layer(tmp_path, name: str, value: str) -> list[tuple[list[str], dict]]:
    """The same setting on the command line, in a recipe and in a YAML file."""
    config = yaml_file(tmp_path, f"{name}: {value}\n")
    return [([f"--{name}", value], {}), ([], {name: value}), (["--config", config], {})]


@pytest.mark.parametrize("name", RETIRED)
def test_a_retired_name_is_answered_in_every_layer(name, tmp_path):
    for argv, recipe in every_layer(tmp_path, name, "1"):
        with pytest.raises(SettingsError, match=f"no setting '{name}'") as error:
            load(*argv, **recipe)
        assert RETIRED[name] in error.value.do


@pytest.mark.parametrize("name", ["bta", "warmup_ratio"])
def test_an_error_names_the_layer_that_holds_the_key(name, tmp_path):
    layers = ("the command line", "recipe dpo_x", "settings.yaml")
    for (argv, recipe), layer in zip(every_layer(tmp_path, name, "1"), layers, strict=True):
        with pytest.raises(SettingsError) as error:
            load(*argv, **recipe)
        assert layer in error.value.seen


def test_a_key_is_named_as_it_was_written(tmp_path):
    with pytest.raises(SettingsError, match="'learning-rate'") as error:
        load("--config", yaml_file(tmp_path, "learning-rate: 1e-5\n"))
    assert "learning_rate" in error.value.do


@pytest.mark.parametrize("name", ["config", "help"])
def test_a_file_cannot_name_another_file(name, tmp_path):
    with pytest.raises(SettingsError, match=f"no setting '{name}'"):
        load("--config", yaml_file(tmp_path, f"{name}: other.yaml\n"))


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_flag_is_refused_in_every_layer(name, tmp_path):
    value = {
        "truncation_mode": "keep_start",
        "pad_token": "x",
        "hub_strategy": "checkpoint",
        "train_sampling_strategy": "random",
        "model_init_kwargs": '{"dtype": "float32"}',
        "packing_strategy": "bfd",
        "eval_accumulation_steps": "3",
        "local_rank": "1",
        "debug": "underflow_overflow",
        "dataset_kwargs": '{"skip_prepare_dataset": true}',
    }.get(name, "true")
    of_pairs = name in {field.name for kind in (DPOConfig, DataArguments) for field in dataclasses.fields(kind)}
    kind = {} if of_pairs else {"kind": "sft", "loss_type": "nll"}
    for argv, recipe in every_layer(tmp_path, name, value):
        with pytest.raises(SettingsError, match=f"sets {name}") as error:
            load(*argv, **kind, **recipe)
        assert REFUSED[name] in error.value.do


@pytest.mark.parametrize(
    ("argv", "seen", "do"),
    [
        (["--max_train_samples", "0"], "max_train_samples is 0", "--max_train_samples"),
        (["--eval_answers", "-1"], "eval_answers is -1", "--eval_answers"),
        (["--max_eval_samples", "0"], "max_eval_samples is 0", "--max_eval_samples"),
        (["--max_prompt_length", "0"], "max_prompt_length is 0", "--max_prompt_length"),
        (["--max_completion_length", "-1"], "max_completion_length is -1", "--max_completion_length"),
        (["--max_length", "1"], "max_length is 1", "--max_length"),
        (["--eval_fraction", "0"], "eval_fraction is 0", "--eval_fraction"),
        (["--eval_fraction", "1"], "eval_fraction is 1", "--eval_fraction"),
        (["--eval_fraction", "nan"], "eval_fraction is nan", "--eval_fraction"),
        (["--dataset_streaming"], "no known length", "--max_steps"),
        (
            ["--dataset_streaming", "--max_steps", "5", "--eval_fraction", "0.1"],
            "eval_fraction",
            "--dataset_test_split",
        ),
        (["--dataset_streaming", "--max_steps", "5", "--eval_strategy", "epoch"], "no known end", "--max_eval_samples"),
        (["--dataset_streaming", "--max_steps", "5", "--precompute_ref_log_probs"], "ahead of the run", "drop either"),
        (
            ["--dataset_streaming", "--max_steps", "5", "--dataloader_num_workers", "2"],
            "one worker",
            "--dataloader_num_workers 0",
        ),
        (["--fp16", "--bf16"], "fp16 and bf16", "--fp16 false"),
        (["--use_peft", "--load_in_4bit", "--load_in_8bit"], "8 bit and 4 bit", "change one of"),
        (["--load_in_4bit"], "quantised model cannot be trained as a whole", "add --use_peft"),
        (["--lora_r", "8"], "lora_r 8, which has no effect with use_peft false", "add --use_peft"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_conflict_names_the_flag_to_change(argv, seen, do):
    with pytest.raises(SettingsError, match=seen) as error:
        load(*argv)
    assert do in error.value.do


@pytest.mark.parametrize(
    "argv",
    [
        ["--max_length", "2"],
        ["--max_train_samples", "1", "--max_prompt_length", "1", "--max_completion_length", "1"],
        ["--dataset_streaming", "--max_steps", "5"],
        ["--dataset_streaming", "--max_steps", "5", "--eval_strategy", "epoch", "--max_eval_samples", "9"],
        ["--eval_fraction", "0.5"],
    ],
    ids=" ".join,
)
def test_values_without_a_conflict_are_accepted(argv):
    load(*argv)


def on_gpu(monkeypatch, *, has_bf16: bool) -> None:
    """Makes the machine look like one with a GPU, with or without bf16."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: has_bf16)


@pytest.mark.parametrize(
    ("settings", "has_bf16", "decided"),
    [
        ({}, True, {"bf16": True}),
        ({}, False, {"bf16": False}),
        ({"fp16": True}, True, {"bf16": False}),
        ({"bf16": False}, True, {}),
        ({"bf16": True}, True, {}),
        ({"bf16": None}, True, {"bf16": True}),
        ({"fp16": True}, False, {"bf16": False}),
    ],
)
def test_the_gpu_decides_a_precision_that_is_not_set(settings, has_bf16, decided, monkeypatch):
    on_gpu(monkeypatch, has_bf16=has_bf16)
    assert find_machine_settings(settings) == decided


def test_bf16_on_an_old_gpu_names_both_ways_out(monkeypatch):
    on_gpu(monkeypatch, has_bf16=False)
    with pytest.raises(MachineError, match="this GPU has no bf16") as error:
        find_machine_settings({"bf16": True})
    assert "--bf16 false" in error.value.do
    assert "--fp16 true" in error.value.do


@pytest.mark.parametrize("settings", [{}, {"use_cpu": False}, {"use_cpu": None}])
def test_a_machine_without_a_gpu_always_trains_on_the_cpu(settings, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert find_machine_settings(settings) == {"use_cpu": True, "bf16": False}


def test_a_cpu_run_on_a_gpu_machine_is_not_in_bf16(monkeypatch):
    on_gpu(monkeypatch, has_bf16=True)
    monkeypatch.setattr("dpokit.settings.load.has_bf16_processor", lambda: False)
    assert find_machine_settings({"use_cpu": True}) == {"bf16": False}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 5e-5", "learning_rate", 5e-5),
        ("learning_rate: 5E-05", "learning_rate", 5e-5),
        ("beta: 1", "beta", 1.0),
        ("max_steps: -1", "max_steps", -1),
        ("max_length: null", "max_length", None),
        ("max_length: ~", "max_length", None),
        ("bf16: null", "bf16", False),
        ("gradient_checkpointing: off", "gradient_checkpointing", False),
        ("gradient_checkpointing: no", "gradient_checkpointing", False),
        ("use_peft: Yes", "use_peft", True),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("loss_type: sigmoid", "loss_type", ["sigmoid"]),
        ("loss_weights: [1, 5e-1]", "loss_weights", [1.0, 0.5]),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ('run_name: "-baseline"', "run_name", "-baseline"),
        ("f_alpha_divergence_coef: -1.0e-05", "f_alpha_divergence_coef", -1e-5),
    ],
)
def test_a_value_in_yaml_has_its_type(text, name, value, tmp_path):
    extra = {
        "loss_weights": "\nloss_type: [sigmoid, sft]",
        "lr_scheduler_kwargs": "\nlr_scheduler_type: cosine_with_min_lr",
        "f_alpha_divergence_coef": "\nf_divergence_type: alpha_divergence",
    }.get(name, "")
    settings = load("--use_cpu", "--config", yaml_file(tmp_path, f"{text}{extra}\n"))
    recorded = settings.record()[name]["value"]
    assert recorded == value
    assert type(recorded) is type(value)


@pytest.mark.parametrize("name", ["beta", "learning_rate", "logging_steps"])
def test_null_for_a_required_value_is_an_error_with_its_name(name, tmp_path):
    config = yaml_file(tmp_path, f"{name}: null\n")
    for argv, recipe in ((["--config", config], {}), ([], {name: None})):
        with pytest.raises(SettingsError, match=name):
            load(*argv, **recipe)


@pytest.mark.parametrize("name", ["learning_rate", "beta", "max_steps"])
def test_a_list_for_a_single_value_is_an_error_with_its_name(name, tmp_path):
    for value in ([1], [1, 2]):
        config = yaml_file(tmp_path, f"{name}: {value}\n")
        for argv, recipe in ((["--config", config], {}), ([], {name: value})):
            with pytest.raises(SettingsError, match=name):
                load(*argv, **recipe)


def test_a_missing_file_of_a_setting_is_a_settings_error(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.json"):
        load("--accelerator_config", str(tmp_path / "none.json"))


def test_a_mapping_that_is_no_json_is_an_error():
    with pytest.raises(SettingsError):
        load("--lr_scheduler_kwargs", "{min_lr")


@pytest.mark.parametrize("flag", ["--bf16", "--gradient_checkpointing", "--use_peft", "--dataset_streaming"])
def test_a_switch_without_a_value_means_true(flag, monkeypatch):
    on_gpu(monkeypatch, has_bf16=True)
    monkeypatch.setattr("dpokit.settings.load.has_bf16_processor", lambda: True)
    record = load("--use_cpu", flag, "--max_steps", "3").record()
    assert record[flag[2:]] == {"value": True, "origin": "command line"}
    assert record["max_steps"]["value"] == 3


def test_the_last_of_two_flags_wins():
    assert load("--beta", "0.2", "--beta", "0.4").training.beta == 0.4


def test_no_secret_is_in_what_settings_print():
    settings = load("--push_to_hub", "--hub_token", "hf_secret")
    assert settings.training.hub_token == "hf_secret"
    assert "hf_secret" not in repr(settings)
    assert "hf_secret" not in str(settings)


def test_no_secret_is_in_an_error():
    for argv in (["--hub_tokn", "hf_secret"], ["--hub_tokn=hf_secret"], ["--hub_token", "hf_secret", "--beta", "x"]):
        with pytest.raises(SettingsError) as error:
            load(*argv)
        assert "hf_secret" not in str(error.value)


def test_a_record_holds_every_setting_once_as_strict_json():
    record = load("--use_cpu").record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert {"beta", "dataset_name", "model_name_or_path", "eval_fraction"} <= set(record)
    assert all(set(entry) == {"value", "origin"} for entry in record.values())
