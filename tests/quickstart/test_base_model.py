"""The quickstart's base model: training lowers its loss, and its folder is an ordinary model folder."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.quickstart.base_model import build_base
from dpokit.quickstart.grammar import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, train_pairs=64, eval_pairs=1, seed=0)
    return folder / "train.jsonl"


def test_more_epochs_lower_the_loss(corpus: Path, tmp_path: Path) -> None:
    first, later = (
        build_base(tmp_path / str(n), corpus=corpus, seed=0, epochs=n, show_progress=False) for n in (1, 12)
    )
    assert later < 0.7 * first


def test_the_folder_reloads_as_model_and_tokenizer_with_an_eos(corpus: Path, tmp_path: Path) -> None:
    build_base(tmp_path / "base", corpus=corpus, seed=0, epochs=1, show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert (tmp_path / "base" / "model.safetensors").is_file()


def test_the_tokenizer_keeps_every_character_and_adds_no_token(corpus: Path, tmp_path: Path) -> None:
    build_base(tmp_path / "base", corpus=corpus, seed=0, epochs=1, show_progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    for text in ("\n\nHuman: How?\n\nAssistant:", " Of course! Ask again.", "never seen: {}~"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids


def test_a_seed_repeats_the_weights_and_keeps_the_global_rng(corpus: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_base(tmp_path / name, corpus=corpus, seed=seed, epochs=1, show_progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name).transformer.wte.weight for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
