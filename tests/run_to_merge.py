"""Run folders with an adapter of any kind, made without training; and models to compare."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import write_pairs
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.model.reference import hash_weights
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings

ATTENTION = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
}


def build_base(folder: Path, kind: str, tokenizer, **changes: Any) -> Path:
    """A random model of 2 layers, with weights so large that log-probs differ from token to token."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.1, **end}
    config = {
        "gpt2": lambda **all_: GPT2Config(**{"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256} | all_),
        "llama": lambda **all_: LlamaConfig(**sizes, **heads, **all_),
        "qwen2": lambda **all_: Qwen2Config(**sizes, **heads, **all_),
    }[kind](**common | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_run(folder: Path, base: Path, adapter: LoraConfig | None, **settings: Any) -> RunDir:
    """A finished run whose adapter (or, without one, whose whole model) is random and far from its initial weights."""
    folder.mkdir(exist_ok=True)
    run = RunDir(folder / "run")
    run.make()
    made = load_settings(
        "dpo_test",
        {
            "model_name_or_path": str(base),
            "dataset_name": str(write_pairs(folder / "pairs.jsonl", 20)),
            "eval_fraction": 0.5,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "max_length": 96,
            "use_peft": adapter is not None,
            "output_dir": str(run.path),
            "report_to": "none",
            "use_cpu": True,
            "load_best_model_at_end": False,
        }
        | settings,
        [],
    )
    run.write_run(state="finished", settings=made.record(), model_fingerprint=hash_weights(str(base), None))
    trust = made.training.trust_remote_code
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=made.model.dtype, trust_remote_code=trust)
    torch.manual_seed(1)
    if adapter is not None:
        policy = get_peft_model(policy, adapter)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    policy.save_pretrained(run.model if adapter is None else run.adapter)
    AutoTokenizer.from_pretrained(base).save_pretrained(run.model if adapter is None else run.adapter)
    return run


def find_logits(model: Any) -> torch.Tensor:
    """The logits of a fixed row of tokens: `(20, vocabulary)`, fp32."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits[0].float()


def load_adapted(run: RunDir, **options: Any) -> PeftModel:
    """Base and adapter, loaded with PEFT."""
    base = json.loads(run.run_json.read_text())["settings"]["model_name_or_path"]["value"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), run.adapter)


def load_merged(run: RunDir) -> Any:
    """The merged model, loaded with transformers."""
    return AutoModelForCausalLM.from_pretrained(run.merged)
