"""The quickstart's base model, after a moment of warming up."""

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.data.toy import write_corpus
from dpokit.train.warmup import build_base


def test_a_short_warm_up_lowers_the_loss_and_leaves_an_ordinary_model_folder(tmp_path):
    write_corpus(tmp_path / "corpus", train_pairs=64, eval_pairs=4, seed=0)
    state = torch.get_rng_state()
    loss = build_base(
        tmp_path / "base", corpus=tmp_path / "corpus" / "train.jsonl", seed=0, epochs=8, show_progress=False
    )
    assert torch.equal(torch.get_rng_state(), state)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert loss < 0.7 * math.log(len(tokenizer))
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert {path.suffix for path in (tmp_path / "base").iterdir()} == {".safetensors", ".json"}
