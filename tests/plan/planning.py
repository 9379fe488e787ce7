"""Helpers of the plan's tests: the request of a recipe, and a model of 8B parameters without weights."""

from pathlib import Path

from conftest import ROOT


def build_request(folder: Path, recipe: str, gpus: str | None, *flags: str):
    """Returns the plan's request for a recipe's name, flags and GPUs, with an output folder of the test."""
    from dpokit.plan.request import load_request

    return load_request(str(ROOT / "recipes" / f"{recipe}.py"), [*flags, "--output_dir", str(folder / "run")], gpus)


def write_llama_8b(folder: Path, tokenizer) -> Path:
    """Writes the config of Llama-3.1-8B and a small tokenizer, without weights."""
    from transformers import LlamaConfig

    size = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    LlamaConfig(**size, **heads, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
