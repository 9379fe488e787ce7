"""What several tests of the plan build: a recipe's settings, and a model of 8B parameters that is only a config."""

from pathlib import Path

from conftest import ROOT


def ask(folder: Path, recipe: str, gpus: str | None, *flags: str):
    """What `load_asked` makes of a recipe's name, flags and GPUs, with an output folder of the test's own."""
    from dpokit.plan.request import load_asked

    return load_asked(str(ROOT / "recipes" / f"{recipe}.py"), [*flags, "--output_dir", str(folder / "run")], gpus)


def write_llama_8b(folder: Path, tokenizer) -> Path:
    """Llama-3.1-8B's own numbers and a small tokenizer; no weights."""
    from transformers import LlamaConfig

    size = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    LlamaConfig(**size, **heads, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
