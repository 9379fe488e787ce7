"""What a tuned and a merged folder have of their base, and where turns end in sampling and in their files."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from conftest import CHATML, build_tokenizer
from peft import get_peft_model
from safetensors import safe_open
from served import make_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dpokit.errors import SettingsError
from dpokit.evaluate.answers import Sampling
from dpokit.evaluate.command import run_evaluation
from dpokit.merge.merge import MergeOptions, merge_run
from dpokit.model.generate import generate_answers
from dpokit.model.load import build_peft_config, load_policy, load_tokenizer
from dpokit.model.tuned_folder import find_final_dtype, round_weights, warn_of_rounding
from dpokit.rundir import RunDir
from dpokit.serve.models import LocalModels
from dpokit.serve.request_limits import SamplingSettings
from dpokit.settings.load import load_settings

TEMPLATES = Path(trl.__file__).with_name("chat_templates")
PROCESSORS = {
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "size": 224},
    "processor_config.json": {"processor_class": "LlavaProcessor"},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
    "chat_template.json": {"chat_template": "{{ messages }}"},
}
# A family of models: its EOS, the token that ends a turn, other special tokens, and the chat template.
FAMILIES = {
    "ChatML": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], CHATML),
    "Gemma": ("<eos>", "<end_of_turn>", ["<bos>", "<start_of_turn>"], "gemma.jinja"),
    "Llama 3": (
        "<|end_of_text|>",
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        "llama3.jinja",
    ),
}
POSITIONS = 256


@dataclass
class Base:
    """A base model on disk.

    Attributes:
        family: a key of FAMILIES.
        dtype: of its weights.
        keys: further keys of its config.json; None removes a key.
    """

    folder: Path
    family: str = "ChatML"
    dtype: str = "bfloat16"
    keys: dict[str, Any] = field(default_factory=dict)

    def build(self) -> "Base":
        """A model whose every answer ends at once by the token that ends a turn; it has processors and a limit."""
        eos, end, others, template = FAMILIES[self.family]
        bos = {"bos_token": others[0]} if others[0].startswith(("<b", "<|b")) else {}
        tokenizer = build_tokenizer([eos, end, *others], eos_token=eos, pad_token=eos, **bos, model_max_length=200)
        tokenizer.chat_template = template if "{" in template else (TEMPLATES / template).read_text()
        self.end = tokenizer.convert_tokens_to_ids(end)
        self.eos = tokenizer.eos_token_id
        size = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": POSITIONS, "vocab_size": len(tokenizer)}
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=None, eos_token_id=self.eos, tie_word_embeddings=False))
        with torch.no_grad():  # the last norm gives a constant, which the head turns into the end token
            model.transformer.ln_f.bias[0] = 4.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[self.end, 0] = 3.0
        model.to(getattr(torch, self.dtype)).save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        for name, content in PROCESSORS.items():
            (self.folder / name).write_text(json.dumps(content))
        config = json.loads((self.folder / "config.json").read_text()) | self.keys
        (self.folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return self

    def check_folder(self, folder: Path, dtype: str) -> None:
        """Compares a whole model's folder with the base."""
        config, of_base = (json.loads((path / "config.json").read_text()) for path in (folder, self.folder))
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            stored = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        assert stored == {getattr(torch, dtype)}
        assert config["dtype"] == dtype
        assert config.get("use_cache", "absent") == of_base.get("use_cache", "absent")
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [self.eos, self.end]
        self.check_other_files(folder)

    def check_other_files(self, folder: Path) -> None:
        assert AutoTokenizer.from_pretrained(folder).model_max_length == 200
        assert {name: json.loads((folder / name).read_text()) for name in PROCESSORS} == PROCESSORS


# Case -> (family; the base's dtype and keys of its config; settings of the run; dtype of model/ and merged/)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "a bf16 base, trained in fp32": ("ChatML", "bfloat16", {"use_cache": None}, {}, "bfloat16"),
    "a fp16 base with an adapter": ("Gemma", "float16", {"use_cache": True}, {"use_peft": True}, "float16"),
    "a bf16 base, and --dtype float32": ("Llama 3", "bfloat16", {"use_cache": False}, {"dtype": "float32"}, "float32"),
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory) -> tuple[Base, RunDir, str]:
    family, dtype, keys, settings, written = CASES[request.param]
    folder = tmp_path_factory.mktemp("tuned")
    base = Base(folder / "base", family, dtype, keys).build()
    evaluations = {"eval_strategy": "steps", "eval_steps": 1, "eval_answers": 3, "save_strategy": "steps"}
    steps = {"max_steps": 1, "save_steps": 1, "learning_rate": 1e-5, "max_length": POSITIONS - 8}
    run = make_run(folder, base.folder, **evaluations, **steps, **settings)
    merge_run(run, MergeOptions(limit=4))
    return base, run, written


def test_the_tuned_folder_has_what_its_base_has(trained):
    base, run, dtype = trained
    if run.adapter.exists():
        base.check_other_files(run.adapter)
    else:
        base.check_folder(run.model, dtype)


def test_the_merged_folder_has_what_its_base_has(trained):
    base, run, dtype = trained
    base.check_folder(run.merged, dtype)
    assert json.loads(run.merge_json.read_text())["dtype"] == dtype


def test_a_checkpoint_keeps_the_dtype_of_training(trained):
    _, run, _ = trained
    (file,) = run.checkpoints()[-1].glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}  # noqa: SIM118


def test_the_end_of_a_turn_ends_all_sampling(trained):
    base, run, _ = trained
    assert json.loads(run.run_json.read_text())["answers_of_base"]["ended"] == 1.0
    described = {"base": None, "data": None, "split": None, "limit": 4, "argv": []}
    run_evaluation(str(run.path), **described, answers=2, sampling=Sampling(max_new_tokens=5))
    answers = json.loads(run.evaluations()[-1].answers_json.read_text())
    assert (answers["base"]["ended"], answers["tuned"]["ended"]) == (1.0, 1.0)
    models = LocalModels(str(run.path), None, ["--use_cpu", "true"])
    models.load()
    sampling = SamplingSettings(max_new_tokens=5)
    question = [{"role": "user", "content": "Why?"}]
    reply = models.answer("tuned", question, sampling, on_text=lambda _: None, is_stopped=lambda: False)
    assert (reply.ended, reply.tokens) == (True, 0)
    # Without these ends, the model of this test repeats the token: neither its own files nor its tokenizer name it.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base.folder), AutoTokenizer.from_pretrained(base.folder)
    [endless] = generate_answers(model, tokenizer, ["Why?"], max_new_tokens=5)
    assert (endless.ended, endless.ids) == (False, (base.end,) * 5)


# Case -> (changes of config.json, flags, the dtype to write)
DTYPES = {
    "the config's dtype": ({}, [], "bfloat16"),
    "the config's dtype under its old name": ({"dtype": None, "torch_dtype": "float16"}, [], "float16"),
    "the dtype of the text part": ({"dtype": None, "text_config": {"dtype": "float16"}}, [], "float16"),
    "no dtype in the config": ({"dtype": None}, [], "bfloat16"),
    "a dtype that dpokit does not write": ({"dtype": "float8_e4m3fn"}, [], None),
    "a flag": ({}, ["--dtype", "float16"], "float16"),
    "a flag that names the base's": ({}, ["--dtype", "auto"], "bfloat16"),
}


@pytest.mark.parametrize("case", DTYPES)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_the_dtype_to_write_is_the_flags_or_the_bases(case, size, tmp_path):
    keys, flags, dtype = DTYPES[case]
    base = Base(tmp_path / "base").build()
    AutoModelForCausalLM.from_pretrained(base.folder).save_pretrained(tmp_path / "split", max_shard_size=size)
    config = json.loads((base.folder / "config.json").read_text()) | keys
    (tmp_path / "split" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    described = {"model_name_or_path": str(tmp_path / "split"), "output_dir": str(tmp_path / "run")}
    assert find_final_dtype(load_settings("dpo_test", described, flags)) == dtype


def test_rounded_weights_stay_tied_and_a_line_says_so(tiny_gpt2, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    weights, dtype = round_weights(model, model.state_dict(), "bfloat16")
    assert dtype == "bfloat16"
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert model.dtype == torch.float32, "the model itself stays"
    assert "written in bfloat16, the dtype of the base; --dtype float32" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "is_said"), [(1e-5, True), (1.0, False)])
def test_a_rounding_that_takes_the_training_away_is_said(change, is_said, tmp_path, tiny_gpt2, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    settings = load_settings("dpo_test", {"model_name_or_path": str(tmp_path / "base"), "output_dir": "run"}, [])
    trained = model.float()
    with torch.no_grad():
        for weight in trained.parameters():
            weight += change * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weights, _ = round_weights(trained, trained.state_dict(), "bfloat16")
    capsys.readouterr()
    warn_of_rounding(trained, settings, trained.state_dict(), weights)
    said = capsys.readouterr().err
    assert ("warning: rounding takes away" in said) == is_said, said


def test_layers_that_must_stay_in_fp32_do(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(GPT2LMHeadModel, "_keep_in_fp32_modules_strict", ["ln_f"])
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    weights, _ = round_weights(model, model.state_dict(), "float16")
    kept = {name for name, value in weights.items() if value.dtype == torch.float32}
    assert kept == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_weights_beyond_the_bases_range_stay_in_fp32(tiny_gpt2, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model.transformer.ln_f.weight.data[3] = 1e5
    weights, dtype = round_weights(model, model.state_dict(), "float16")
    assert dtype == "float32"
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "transformer.ln_f.weight exceeds the range of float16" in capsys.readouterr().err


def test_a_merge_of_a_checkpoint_rounds_it_and_measures_that(tmp_path):
    base = Base(tmp_path / "base").build()
    run = make_run(tmp_path, base.folder, save_strategy="steps", save_steps=1, max_steps=1, max_length=200)
    made = merge_run(run, MergeOptions(checkpoint=1, limit=4))
    base.check_folder(run.merged, "bfloat16")
    assert 0 < made["largest_drift"] < 1
    shutil.rmtree(run.merged)
    assert merge_run(run, MergeOptions(limit=4))["largest_drift"] == 0, "model/ has the dtype already"
    shutil.rmtree(run.merged)
    assert merge_run(run, MergeOptions(checkpoint=1, limit=4, dtype="float32"))["largest_drift"] == 0
    base.check_folder(run.merged, "float32")
    base.check_folder(run.model, "bfloat16")  # its files are not changed through links


@pytest.mark.parametrize("kind", ["olmo2", "granite", "phi3"])
def test_a_model_without_default_layers_needs_a_flag(kind, plain_tokenizer, tmp_path):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **size, vocab_size=len(plain_tokenizer), pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    plain_tokenizer.save_pretrained(tmp_path / "base")
    flags = ["--model_name_or_path", str(tmp_path / "base"), "--output_dir", str(tmp_path / "run"), "--use_peft"]
    settings = load_settings("dpo_test", {}, flags)
    policy = load_policy(settings, load_tokenizer(settings.model))
    with pytest.raises(SettingsError, match=f"no default layers for a model of type {kind}") as error:
        build_peft_config(settings, policy)
    assert error.value.do == "--lora_target_modules all-linear"
    settings = load_settings("dpo_test", {}, [*flags, *error.value.do.split()])
    assert get_peft_model(policy, build_peft_config(settings, policy)).get_nb_trainable_parameters()[0] > 0


def test_a_long_text_gives_no_warning_of_the_tokenizer(tmp_path, caplog):
    base = Base(tmp_path / "base").build()
    settings = load_settings("dpo_test", {"model_name_or_path": str(base.folder), "output_dir": "run"}, [])
    tokenizer = load_tokenizer(settings.model)
    assert len(tokenizer("bread " * 500)["input_ids"]) > tokenizer.model_max_length == 200
    assert "sequence length" not in caplog.text
