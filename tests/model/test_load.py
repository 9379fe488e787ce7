"""Loading policies and adapters from tiny models on disk, and the errors of broken ones."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpokit.errors import ModelError, SettingsError
from dpokit.model.load import build_peft_config, load_policy, load_tokenizer
from dpokit.run import train
from dpokit.rundir import read_metrics
from dpokit.settings.load import load_settings


@pytest.fixture
def read_settings(tiny_qwen2, tmp_path):
    defaults = {"model_name_or_path": str(tiny_qwen2), "output_dir": str(tmp_path / "run")}
    return lambda *flags: load_settings("dpo_test", defaults, list(flags))


@pytest.fixture
def sft_adapter(tiny_qwen2, tmp_path) -> Path:
    """An adapter that changes its base, without tokenizer files, like the result of supervised training."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_qwen2), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def build(settings):
    policy = load_policy(settings, load_tokenizer(settings.model))
    return policy, build_peft_config(settings, policy)


@pytest.mark.parametrize("named", [["q_proj"], ["q_proj", "down_proj"], ["all-linear"]], ids=" ".join)
def test_named_target_modules_are_trained(named, read_settings):
    policy, config = build(read_settings("--use_peft", "--lora_target_modules", *named))
    trained = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]
        for name, weight in get_peft_model(policy, config).named_parameters()
        if weight.requires_grad and "lora_A" in name
    }
    all_linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert trained == (all_linear if named == ["all-linear"] else set(named))


@pytest.mark.parametrize("named", [["c_attn"], ["q_proj", "c_attn"]], ids=" ".join)
def test_an_unknown_target_module_is_refused_with_the_known_ones(named, read_settings):
    with pytest.raises(SettingsError, match="lora_target_modules names c_attn") as error:
        build(read_settings("--use_peft", "--lora_target_modules", *named))
    assert "q_proj" in error.value.expected


def test_an_adapter_without_use_peft_is_refused(sft_adapter, read_settings):
    with pytest.raises(SettingsError, match=r"is an adapter .* use_peft is not set"):
        build(read_settings("--model_name_or_path", str(sft_adapter)))


def test_a_folder_without_a_model_is_named(tmp_path, read_settings):
    with pytest.raises(ModelError, match=f"--model_name_or_path {tmp_path}"):
        build(read_settings("--model_name_or_path", str(tmp_path)))


def test_an_adapter_is_loaded_trainable_with_its_bases_tokenizer(sft_adapter, read_settings):
    policy, config = build(read_settings("--model_name_or_path", str(sft_adapter), "--use_peft"))
    assert isinstance(policy, PeftModel)
    assert config is None, "no second adapter on top"
    assert {name.split(".")[-3] for name, weight in policy.named_parameters() if weight.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_an_sft_adapter_is_its_own_reference_and_saved_trained(sft_adapter, tiny_qwen2, pairs_file, tmp_path):
    flags = ["--use_peft", "--model_name_or_path", str(sft_adapter), "--dataset_name", str(pairs_file)]
    flags += [
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "3",
        "--learning_rate",
        "1e-2",
        "--max_length",
        "96",
    ]
    flags += ["--logging_steps", "1", "--warmup_steps", "0", "--eval_strategy", "steps", "--eval_steps", "1"]
    flags += ["--eval_fraction", "0.2", "--save_steps", "1", "--load_best_model_at_end"]
    run = train("dpo_test", {}, flags)
    first, *_, last = read_metrics(run.metrics_jsonl)
    assert first["rewards/chosen"] == 0
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert last["loss"] < first["loss"]
    assert sorted(path.name for path in run.adapter.rglob("*.safetensors")) == ["adapter_model.safetensors"]
    before = load_file(sft_adapter / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    after = get_peft_model_state_dict(PeftModel.from_pretrained(base, run.adapter))
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_on_the_lm_head_is_refused(read_settings):
    with pytest.raises(SettingsError, match="lora_target_modules names lm_head") as error:
        build(read_settings("--use_peft", "--lora_target_modules", "q_proj", "lm_head"))
    assert "--lora_modules_to_save" in error.value.do


def test_a_broken_tokenizer_of_an_adapter_is_an_error(sft_adapter, read_settings):
    (sft_adapter / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        build(read_settings("--model_name_or_path", str(sft_adapter), "--use_peft"))


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_atention"])
def test_a_missing_attention_kernel_is_an_error_that_names_sdpa(name, read_settings):
    with pytest.raises(ModelError, match=f"--attn_implementation {name}") as error:
        build(read_settings("--attn_implementation", name))
    assert "sdpa" in error.value.expected
