"""The merged model equals the trained one: logits, log-probs, ties, and its record."""

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from run_to_merge import ATTENTION, build_base, build_run, find_logits, load_adapted, load_merged
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import dpokit
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.errors import ModelError
from dpokit.evaluate.command import run_evaluation
from dpokit.merge.merge import MergeOptions, merge_run
from dpokit.model.load import load_tokenizer
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings

METHODS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}
# Bounds for logits of a few nats: rounding in fp32; in bf16 (8 bits) the rounding of each merged weight and product.
APART = {"float32": 1e-4, "bfloat16": 0.2}


OWN_CODE = """from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig
"""


def lora(kind: str, **changes) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=ATTENTION[kind], **changes)


@pytest.mark.parametrize("dtype", APART)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ATTENTION)
def test_the_merged_model_equals_base_and_adapter(kind, method, dtype, plain_tokenizer, tmp_path):
    base = build_base(tmp_path / "base", kind, plain_tokenizer)
    run = build_run(tmp_path, base, lora(kind, **METHODS[method]), dtype=dtype)
    made = merge_run(run)
    merged, adapted = load_merged(run), load_adapted(run, dtype=dtype)
    assert merged.dtype == getattr(torch, dtype)
    expected = find_logits(adapted)
    with adapted.disable_adapter():
        assert (find_logits(adapted) - expected).abs().max() > 5 * APART[dtype], "the adapter must change the model"
    assert (find_logits(merged) - expected).abs().max() < APART[dtype]
    assert made["method"] == method
    assert made["largest_drift"] < (1e-4 if dtype == "float32" else 0.3)
    assert 0 <= made["mean_drift"] <= made["largest_drift"]
    assert made == json.loads(run.merge_json.read_text())


def test_a_bf16_merge_rounds_less_than_pefts_safe_merge(plain_tokenizer, tmp_path):
    base = build_base(tmp_path / "base", "llama", plain_tokenizer)
    run = build_run(tmp_path, base, lora("llama"), dtype="bfloat16")
    merge_run(run, MergeOptions(proof=False))
    exact = load_adapted(run, dtype=torch.bfloat16).float().merge_and_unload().state_dict()
    by_peft = load_adapted(run, dtype=torch.bfloat16).merge_and_unload(safe_merge=True).state_dict()
    merged = load_merged(run).state_dict()
    for name in (name for name in exact if "q_proj" in name or "down_proj" in name):
        lost, lost_by_peft = ((state[name].double() - exact[name].double()).abs() for state in (merged, by_peft))
        assert (lost <= exact[name].abs() * 2**-8).all()
        assert lost.mean() < lost_by_peft.mean()


def test_a_pattern_gives_each_layer_its_own_rank_and_scale(plain_tokenizer, tmp_path):
    base = build_base(tmp_path / "base", "llama", plain_tokenizer)
    run = build_run(tmp_path, base, lora("llama", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}))
    assert merge_run(run)["largest_drift"] < 1e-4
    assert (find_logits(load_merged(run)) - find_logits(load_adapted(run))).abs().max() < 1e-4


TIED = {
    "an adapter on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "the head saved whole": {"modules_to_save": ["lm_head"]},
    "the embedding saved whole": {"modules_to_save": ["embed_tokens"]},
    "both saved as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "an adapter on both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "neither": {},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tie_word_embeddings", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("case", TIED)
def test_training_one_of_two_tied_weights_keeps_the_other(case, tie_word_embeddings, plain_tokenizer, tmp_path):
    base = build_base(tmp_path / "base", "qwen2", plain_tokenizer, tie_word_embeddings=tie_word_embeddings)
    adapter = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **TIED[case]})
    run = build_run(tmp_path, base, adapter)
    # TRL's loss reads the head's own weight without its adapter, so this case is compared with PEFT's forward only.
    merge_run(run, MergeOptions(proof=case != "an adapter on both"))
    merged = load_merged(run)
    assert (find_logits(merged) - find_logits(load_adapted(run))).abs().max() < 1e-4
    same = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    stays_tied = tie_word_embeddings and case in ("neither", "both saved as one", "an adapter on both")
    assert same == merged.config.tie_word_embeddings == stays_tied


def test_tied_weights_of_gpt2_are_written_once(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    merge_run(run, MergeOptions(proof=False))
    with safe_open(run.merged / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())


def test_a_module_saved_whole_replaces_the_bases_module(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2", modules_to_save=["ln_f"]))
    assert merge_run(run)["largest_drift"] < 1e-4
    merged, base = load_merged(run), AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    assert not torch.equal(merged.transformer.ln_f.weight, base.transformer.ln_f.weight)
    assert (find_logits(merged) - find_logits(load_adapted(run))).abs().max() < 1e-4


def test_an_adapter_with_new_tokens_merges_its_embedding(plain_tokenizer, tmp_path):
    base = build_base(tmp_path / "base", "llama", plain_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>", "</think>"])
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(len(tokenizer))
    larger.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    adapter = lora("llama", modules_to_save=["embed_tokens", "lm_head"])
    run = build_run(tmp_path, tmp_path / "larger", adapter)
    # For a model resized in memory PEFT records the base on the disk.
    config = run.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "larger"), str(base)))
    expected = find_logits(load_adapted(run))
    assert merge_run(run)["largest_drift"] < 1e-4
    merged = load_merged(run)
    assert merged.get_input_embeddings().num_embeddings == len(tokenizer) == merged.config.vocab_size
    assert AutoTokenizer.from_pretrained(run.merged).convert_tokens_to_ids("<think>") == len(tokenizer) - 2
    assert (find_logits(merged) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dequantised", [False, True], ids=["16-bit base", "dequantised base"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_qlora_is_merged_into_the_base_or_the_dequantised_base(kind, dequantised, plain_tokenizer, tmp_path):
    base = build_base(tmp_path / "base", kind, plain_tokenizer)
    quantised = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    run = build_run(tmp_path, base, lora(kind), dtype="bfloat16", **quantised)
    made = merge_run(run, MergeOptions(dequantized_base=dequantised, accept_drift=True))
    assert made["method"] == "QLoRA"
    assert made["merged_into"] == ("dequantised base" if dequantised else "base")
    if dequantised:
        assert made["mean_drift"] < 0.05
        assert not made["drift_accepted"]
    expected = find_logits(load_adapted(run, dtype=torch.bfloat16))
    apart = (find_logits(load_merged(run)) - expected).abs().max()
    assert (apart > 0.3) if dequantised else (apart < 0.2), "4 bits change the base"
    assert "quantization_config" not in json.loads((run.merged / "config.json").read_text())


def test_a_model_with_custom_code_is_merged_if_it_is_trusted(plain_tokenizer, tmp_path):
    base = build_base(tmp_path / "base", "llama", plain_tokenizer)
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnLlama"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": auto_map}))
    (base / "own_llama.py").write_text(OWN_CODE)
    run = build_run(tmp_path, base, None, trust_remote_code=True)
    with pytest.raises(ModelError, match="code of its own, which is not run"):
        merge_run(run)
    assert merge_run(run, argv=["--trust_remote_code", "true"])["largest_drift"] < 1e-4
    assert (run.merged / "own_llama.py").read_text() == OWN_CODE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_written_and_recorded(dtype, tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    made = merge_run(run, MergeOptions(dtype=dtype))
    assert made["dtype"] == dtype
    assert load_merged(run).dtype == getattr(torch, dtype)
    assert (made["largest_drift"] < 1e-4) == (dtype == "float32")


def test_weights_are_split_into_files_of_the_requested_size(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    merge_run(run, MergeOptions(max_shard_size="50KB"))
    index = json.loads((run.merged / "model.safetensors.index.json").read_text())
    files = sorted(run.merged.glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert len(files) > 2
    assert (find_logits(load_merged(run)) - find_logits(load_adapted(run))).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "links"), [({}, True), ({"max_shard_size": "50KB"}, False), ({"dtype": "bfloat16"}, False)]
)
def test_a_whole_model_is_linked_unless_it_changes(changes, links, tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, None)
    made = merge_run(run, MergeOptions(**changes))
    assert made["method"] == "full"
    assert made["merged_into"] is None
    file = run.merged / "model.safetensors"
    assert (file.exists() and file.samefile(run.model / "model.safetensors")) == links
    assert (made["largest_drift"] == 0) == ("dtype" not in changes)
    assert made["accuracy_before"] == pytest.approx(made["accuracy_after"], abs=0.2)
    trained = AutoModelForCausalLM.from_pretrained(run.model)
    assert (find_logits(load_merged(run)) - find_logits(trained)).abs().max() < (0.1 if "dtype" in changes else 1e-6)


def test_a_merged_folder_has_all_files_and_no_local_path(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    merge_run(run)
    names = {path.name for path in run.merged.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "merge.json"),
        *("chat_template_hh.jinja", "chat_template_hh.json"),
    }
    for path in run.merged.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
        assert str(tiny_gpt2) not in path.read_text(), path.name
    merged, base = (AutoTokenizer.from_pretrained(folder) for folder in (run.merged, tiny_gpt2))
    assert merged.get_vocab() == base.get_vocab()


def test_the_record_has_hashes_of_adapter_and_files(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    made = merge_run(run, MergeOptions(limit=3))
    content = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert made["adapter_sha256"] == hashlib.sha256(content).hexdigest()
    assert made["base"] == {"name": tiny_gpt2.name, "revision": None}
    assert made["pairs"] == 3
    for name, file in made["files"].items():
        content = (run.merged / name).read_bytes()
        assert file == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {"torch", "transformers", "peft"} <= made["versions"].keys()


def test_without_a_drift_check_nothing_is_scored(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"), dataset_name=str(tmp_path / "gone.jsonl"))
    made = merge_run(run, MergeOptions(proof=False))
    assert made["pairs"] is made["mean_drift"] is made["accuracy_before"] is None
    assert load_merged(run).dtype == torch.float32


def test_the_recorded_accuracy_is_that_of_an_evaluation(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    evaluation = run_evaluation(str(run.path), base=None, data=None, split=None, limit=None, argv=[])
    made = merge_run(run)
    assert made["accuracy_before"] == made["accuracy_after"] == evaluation["tuned"]["accuracy"]["value"]
    assert made["data"]["fingerprint"] == evaluation["data"]["fingerprint"]


def test_a_merge_that_rounds_the_training_away_warns(tiny_gpt2, tmp_path, capsys):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    file = run.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e-2 for name, tensor in load_file(file).items()}, file)
    made = merge_run(run)
    assert made["mean_drift"] < made["mean_shift"] / 2
    assert "rounds the training away" not in capsys.readouterr().err
    run.merged.rename(run.path / "fp32")
    made = merge_run(run, MergeOptions(dtype="bfloat16"))
    assert made["mean_drift"] > made["mean_shift"] / 2
    assert "bfloat16 rounds the training away" in capsys.readouterr().err


def test_a_further_trained_adapter_is_compared_with_its_start(tiny_gpt2, tmp_path):
    first = build_run(tmp_path / "first", tiny_gpt2, lora("gpt2"))
    run = build_run(tmp_path / "second", tiny_gpt2, lora("gpt2"))
    record = json.loads(run.run_json.read_text())
    record["settings"]["model_name_or_path"]["value"] = str(first.adapter)
    record.pop("model_fingerprint")
    run.run_json.write_text(json.dumps(record))
    made = merge_run(run)
    assert made["accuracy_before"] == 0, "the adapter equals its start, so no reward is above 0"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gpt2), run.adapter)
    assert (find_logits(load_merged(run)) - find_logits(adapted)).abs().max() < 1e-4


def test_the_command_prints_two_lines_or_the_record(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    done = dpokit("merge", str(run.path), "--limit", "4", "--json", "--max-shard-size", "50KB")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(run.merge_json.read_text())
    assert str(run.merged) in done.stderr
    assert "shared prefix: off" not in done.stderr
    again = build_run(tmp_path / "again", tiny_gpt2, lora("gpt2"))
    done = dpokit("merge", str(again.path), "--limit", "4")
    assert "adapter (LoRA) of tiny_gpt20, float32" in done.stdout
    assert "4 held-out pairs" in done.stdout


def test_tokens_of_the_tokenizer_stay_as_training_used_them(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    merge_run(run, MergeOptions(proof=False))
    settings = load_settings("x", {"model_name_or_path": str(run.merged), "output_dir": "unused"}, [])
    assert load_tokenizer(settings.model).pad_token == AutoTokenizer.from_pretrained(run.adapter).pad_token


def test_a_run_folder_lists_merged_among_its_files(tiny_gpt2, tmp_path):
    run = build_run(tmp_path, tiny_gpt2, lora("gpt2"))
    merge_run(run, MergeOptions(proof=False))
    assert run.merged in RunDir(run.path).own_files()
    run.clear()
    assert list(run.path.iterdir()) == []
