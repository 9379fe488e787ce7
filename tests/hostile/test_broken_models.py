"""A hostile or damaged model or adapter ends in one message within seconds, and none of its code runs."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from broken_models import ADAPTERS, HARMLESS, MODELS, edit, retensor
from peft import LoraConfig, get_peft_model
from test_cli import dpokit
from transformers import AutoModelForCausalLM

from dpokit.errors import ModelError
from dpokit.model.check import check_config
from dpokit.model.load import load_policy, load_tokenizer
from dpokit.settings.load import load_settings

MOST_SECONDS = 20.0  # on two busy cores; on an idle machine each case takes less than a second


@pytest.fixture
def model(tiny_gpt2, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_gpt2, tmp_path / "model"))


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder: Path, **more: object) -> None:
    """Loads settings, tokenizer and model like every verb and recipe."""
    defaults = {"model_name_or_path": str(folder), "use_peft": True, "use_cpu": True, "output_dir": str(folder / "run")}
    settings = load_settings("test", defaults | more, [])
    load_policy(settings, load_tokenizer(settings.model))


def check_refused(folder: Path, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(ModelError) as refusal:
        load(folder)
    assert message in str(refusal.value)
    assert time.monotonic() - began < MOST_SECONDS
    assert not (folder.parent / "it-ran").exists()


def test_an_unchanged_model_and_adapter_load(model, adapter):
    load(model)
    load(adapter)


def as_first_published(tensors: dict) -> dict:
    """GPT-2's weights in the form of the Hub: names without `transformer.`, and with the masks of attention."""
    published = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for block in (0, 1):
        published[f"h.{block}.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
        published[f"h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    return published


def test_weights_as_they_were_first_published_load(model, tiny_qwen2, tmp_path):
    retensor("model.safetensors", as_first_published)(model)
    load(model)
    other = Path(shutil.copytree(tiny_qwen2, tmp_path / "qwen2"))
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    retensor("model.safetensors", lambda tensors: tensors | frequencies)(other)
    load(other)


@pytest.mark.parametrize(
    "changes", [{"num_experts": 0}, {"intermediate_size": [64, 64]}, {"num_key_value_heads": None}], ids=str
)
def test_numbers_that_real_configs_hold_are_within_bounds(changes, model):
    edit("config.json", **changes)(model)
    check_config(str(model), None)


def test_mismatched_tensors_are_ignored_with_gates_warn(model, capfd):
    MODELS["a value head"][0](model)
    load(model, gates="warn")
    assert "no place for: v_head.summary.weight" in capfd.readouterr().err


@pytest.mark.parametrize("case", [case for case in MODELS if case not in HARMLESS])
def test_a_damaged_model_is_refused(case, model):
    change, message = MODELS[case]
    change(model)
    check_refused(model, message)


@pytest.mark.parametrize("case", [case for case in ADAPTERS if case not in HARMLESS])
def test_a_damaged_adapter_is_refused(case, adapter):
    change, message = ADAPTERS[case]
    change(adapter)
    check_refused(adapter, message)


@pytest.mark.parametrize("case", sorted(HARMLESS))
def test_a_harmless_unknown_value_is_ignored(case, model, adapter):
    folder, (change, _) = (model, MODELS[case]) if case in MODELS else (adapter, ADAPTERS[case])
    change(folder)
    load(folder)


@pytest.mark.parametrize("case", ["weights as a pickle", "a config of 100 TB", "a tensor is missing"])
@pytest.mark.parametrize("verb", ["evaluate", "chat", "plan", "train"])
def test_every_verb_ends_in_one_message(verb, case, model, pairs_file):
    MODELS[case][0](model)
    recipe = ["recipes/dpo_gpt2.py", "--model_name_or_path", str(model), "--dataset_name", str(pairs_file)]
    argv = {
        "evaluate": ["evaluate", str(model), "--data", str(pairs_file)],
        "chat": ["chat", str(model), "--prompt", "Hello"],
        "plan": ["plan", *recipe, "--use_cpu"],
        "train": ["prepare", *recipe, "--use_cpu", "--max_length", "64", "--precompute_ref_log_probs"],
    }[verb]
    done = dpokit(*argv)
    assert "Traceback" not in done.stderr
    if verb != "plan":  # plan reads only the config
        assert done.returncode == 2, done.stderr
        assert MODELS[case][1] in done.stderr
