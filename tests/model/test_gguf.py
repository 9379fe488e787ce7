"""GGUF files as models: converted exactly, with the right tokenizer, once; and each bad file is one message."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, build_tokenizer, write_pairs
from gguf_files import write_gguf
from peft import LoraConfig
from peft.utils import save_and_load
from run_to_merge import build_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import hub

import dpokit
from dpokit.card.origin import find_lineage
from dpokit.errors import DpokitError, ModelError
from dpokit.evaluate.inputs import load_subject
from dpokit.model.check import is_gguf
from dpokit.model.gguf import find_model_folder
from dpokit.model.reference import hash_weights
from dpokit.report.read import load_run
from dpokit.serve.models import LocalModels

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TEXTS = [*SENTENCES, "Steps:\n\n1. Mix  2 cups\n\n2. In 2023, pay 40.50\n   10 kg", "a\t b \n\n c"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DPOKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def build_model(tokenizer, kind: str = "llama", **changes):
    """A random model of 2 layers in float32, in which each head and each weight matters."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    sizes |= {"head_dim": 16} if kind != "qwen2" else {}
    sizes |= {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, initializer_range=0.2, **sizes | changes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases begin as ones and zeros, which would hide a mistake
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


@pytest.fixture
def tiny_gguf(chat_tokenizer, tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", build_model(chat_tokenizer), chat_tokenizer)


def find_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 123)[None]).logits[0]


# -- weights -----------------------------------------------------------------------------------------------------------

MODELS = {
    "llama, Q4_1": ("llama", "Q4_1", {}),
    "llama, Q4_0": ("llama", "Q4_0", {}),
    "llama, Q5_1": ("llama", "Q5_1", {}),
    "llama, Q8_0, tied": ("llama", "Q8_0", {"tie_word_embeddings": True}),
    "llama, F16": ("llama", "F16", {}),
    "llama, F32": ("llama", "F32", {}),
    "llama 3 frequencies": ("llama", "Q8_0", {"rope_parameters": LLAMA3, "max_position_embeddings": 65_536}),
    "qwen2, Q8_0": ("qwen2", "Q8_0", {}),
    "qwen3, Q4_1, wide heads": ("qwen3", "Q4_1", {"head_dim": 32}),
}


def compute_factors(size: int) -> np.ndarray:
    """How many times longer Llama 3.1 makes each wave: 1 for short ones, 8 for long ones, in between by degrees."""
    factors = []
    for number in range(0, size, 2):
        length = 2 * math.pi * LLAMA3["rope_theta"] ** (number / size)
        share = (8192 / length - 1) / (4 - 1)
        factors.append(1 / ((1 - share) / 8 + share) if 0 < share < 1 else 8.0 if share <= 0 else 1.0)
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("case", MODELS)
def test_the_copy_computes_what_the_file_holds(case, chat_tokenizer, tmp_path):
    kind, tensor_type, changes = MODELS[case]
    model = build_model(chat_tokenizer, kind, **changes)
    tensors = {"rope_freqs.weight": compute_factors(16)} if "rope_parameters" in changes else None
    file = write_gguf(tmp_path / "m.gguf", model, chat_tokenizer, tensor_type=tensor_type, tensors=tensors)
    copy, info = AutoModelForCausalLM.from_pretrained(find_model_folder(str(file)), output_loading_info=True)
    assert not any(info.values())
    assert copy.dtype == torch.float32
    assert torch.equal(find_logits(copy), find_logits(model))
    assert copy.config.eos_token_id == chat_tokenizer.eos_token_id


def test_a_file_of_bfloat16_values_is_kept_in_bfloat16(chat_tokenizer, tmp_path):
    model = build_model(chat_tokenizer).bfloat16().float()
    file = write_gguf(tmp_path / "m.gguf", model, chat_tokenizer, tensor_type="BF16")
    copy = AutoModelForCausalLM.from_pretrained(find_model_folder(str(file)), dtype="auto")
    assert copy.dtype == torch.bfloat16
    assert all(torch.equal(copy.state_dict()[name].float(), weight) for name, weight in model.state_dict().items())


# -- tokenizer ---------------------------------------------------------------------------------------------------------


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_splits_texts_by_the_files_rule(split, tmp_path):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<\uff5cuser\u2581turn\uff5c>"]  # the last as DeepSeek's
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = SPLITS["smollm"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    learner.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=330, **options))
    learner.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learner, **names)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model, metadata = build_model(tokenizer), {"tokenizer.ggml.pre": split, "tokenizer.ggml.eot_token_id": 0}
    file = write_gguf(tmp_path / "m.gguf", model, tokenizer, metadata=metadata)
    by_rule = []
    for rule in SPLITS.values():
        tokenizer.backend_tokenizer.pre_tokenizer = rule
        by_rule.append(tokenizer(TEXTS)["input_ids"])
    assert by_rule[0] != by_rule[1], "the texts tell the two rules apart"
    tokenizer.backend_tokenizer.pre_tokenizer = SPLITS[split]
    copy = AutoTokenizer.from_pretrained(find_model_folder(str(file)))
    assert copy(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert copy.decode(copy(TEXTS[-1])["input_ids"]) == TEXTS[-1]
    for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(copy, name) == getattr(tokenizer, name)
    assert copy.get_vocab() == tokenizer.get_vocab()
    assert copy.model_max_length == 256
    assert all(copy(text)["input_ids"] == [number] for number, text in enumerate(special))
    assert GenerationConfig.from_pretrained(find_model_folder(str(file))).eos_token_id == [2, 0]


@pytest.mark.parametrize("says", [None, True, False])
def test_a_llama_3_text_begins_with_bos_unless_denied(says, tmp_path):
    tokenizer = build_tokenizer(["<|begin|>", "<|end|>"], bos_token="<|begin|>", eos_token="<|end|>")
    metadata = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": says}
    file = write_gguf(tmp_path / "m.gguf", build_model(tokenizer), tokenizer, metadata=metadata)
    copy = AutoTokenizer.from_pretrained(find_model_folder(str(file)))
    assert (copy("bread")["input_ids"][0] == copy.bos_token_id) is (says is not False)
    assert copy.backend_tokenizer.model.ignore_merges is True


# -- one copy ----------------------------------------------------------------------------------------------------------


def test_a_file_is_converted_once_and_said_once(tiny_gguf, tmp_path, capsys):
    folder = find_model_folder(str(tiny_gguf))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tiny_gguf}: " in said
    assert "(Q8_0, F32) are converted once, to float32" in said
    moved = tiny_gguf.rename(tmp_path / "other name.gguf")
    assert find_model_folder(str(moved)) == folder
    assert capsys.readouterr().err == ""
    assert find_model_folder("openai-community/gpt2") == "openai-community/gpt2"


def test_a_file_that_moves_during_a_run_keeps_its_copy(tiny_gguf, tmp_path):
    folder = find_model_folder(str(tiny_gguf))
    tiny_gguf.rename(tmp_path / "other.gguf")
    assert find_model_folder(str(tiny_gguf)) == folder


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "/dev/null"])
def test_a_name_that_no_file_has_is_no_gguf_file(name):
    assert not is_gguf(name)


def test_a_damaged_copy_is_made_again(tiny_gguf):
    folder = Path(find_model_folder(str(tiny_gguf)))
    before = hash_weights(str(tiny_gguf), None)
    for file in ("model.safetensors", "tokenizer.json", "gguf.json"):
        (folder / file).write_bytes((folder / file).read_bytes()[:-5])
        assert find_model_folder(str(tiny_gguf)) == str(folder)
        assert hash_weights(str(tiny_gguf), None) == before
        AutoTokenizer.from_pretrained(folder)


def test_processes_at_once_make_one_copy(tiny_gguf, cache):
    code = "import sys; from dpokit.model.gguf import find_model_folder; find_model_folder(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tiny_gguf)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    shown = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0, 0], shown
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert [path.name for path in cache.iterdir() if not path.is_dir()] == [folder.name + ".lock"]
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_files_neighbours_are_not_read(tiny_gguf):
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tiny_gguf.parent / name).write_text("{ no JSON")
    assert AutoTokenizer.from_pretrained(find_model_folder(str(tiny_gguf))).chat_template.startswith("{% for")


def test_a_file_without_a_chat_template_is_a_base_model(plain_tokenizer, tmp_path, capsys):
    file = write_gguf(tmp_path / "m.gguf", build_model(plain_tokenizer), plain_tokenizer)
    assert AutoTokenizer.from_pretrained(find_model_folder(str(file))).chat_template is None
    assert capsys.readouterr().err.endswith("; it has no chat template\n")


# -- bad files ---------------------------------------------------------------------------------------------------------

BAD_METADATA = {
    "an adapter": ({"general.type": "adapter"}, "part of a model"),
    "one of several files": ({"split.count": 3}, "one of 3 files"),
    "an unknown architecture": ({"general.architecture": "falcon"}, "architecture 'falcon' is not supported"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
    "an unknown kind of tokenizer": ({"tokenizer.ggml.model": "rwkv"}, "of the kind 'rwkv'"),
    "an unknown split": ({"tokenizer.ggml.pre": "default"}, "rule 'default'"),
    "no split": ({"tokenizer.ggml.pre": None}, "rule None"),
    "no space before a text": (
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False},
        "adds no space",
    ),
    "a key that transformers ignores": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is yarn"),
    "experts": ({"llama.expert_count": 4}, "llama.expert_count"),
    "another size of heads": ({"llama.attention.key_length": 24}, "of different sizes"),
    "more layers than tensors": ({"llama.block_count": 3}, "lacks 9 of"),
    "fewer layers than tensors": ({"llama.block_count": 1}, "its tensor blk.1."),
    "wider layers than tensors": ({"llama.feed_forward_length": 128}, "has the shape"),
    "an absurd number of layers": ({"llama.block_count": 2**31}, "num_hidden_layers is 2147483648"),
    "an absurd width": ({"llama.embedding_length": 2**30}, "hidden_size is 1073741824"),
    "an EOS beyond the vocabulary": ({"tokenizer.ggml.eos_token_id": 99_999}, "eos_token_id is 99999"),
    "a special token twice": ({"tokenizer.ggml.tokens": "twice"}, "as its EOS"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_a_file_that_would_be_misread_is_refused(case, chat_tokenizer, cache, tmp_path):
    changes, message = BAD_METADATA[case]
    if case == "a special token twice":
        tokens = chat_tokenizer.convert_ids_to_tokens(list(range(len(chat_tokenizer))))
        changes = {"tokenizer.ggml.tokens": ["<|im_end|>", *tokens[1:]]}
    file = write_gguf(tmp_path / "m.gguf", build_model(chat_tokenizer), chat_tokenizer, metadata=changes)
    check_refused(file, message, cache)


def check_refused(file: Path, message: str, cache: Path) -> None:
    with pytest.raises(ModelError) as error:
        find_model_folder(str(file))
    seen, expected, do = str(error.value).split("\n")
    assert seen.startswith(f"--model_name_or_path {file}: ")
    assert message in seen
    assert expected.strip().startswith("expected:")
    assert do.strip().startswith("do this:")
    assert not cache.exists() or [path.suffix for path in cache.iterdir()] == [".lock"], "no half-made copy is left"


BAD_FILES = {
    "no GGUF file": (lambda content: b"PK\x03\x04" + content[4:], "begins with b'PK"),
    "an empty file": (lambda _: b"", "begins with b''"),
    "a later version": (lambda content: content[:4] + b"\x09" + content[5:], "GGUF v9"),
    "cut off in the header": (lambda content: content[:900], "cannot be read"),
    "cut off in the tensors": (lambda content: content[:-4000], "cannot be read"),
    "a count beyond the file": (lambda content: content[:8] + b"\xff" * 7 + b"\x00" + content[16:], "cannot be read"),
    "an unknown tensor type": (
        lambda content: content.replace(b"blk.0.attn_q.weight\x02\x00\x00\x00", b"blk.0.attn_q.weight\x02\x00\x00\x01"),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_file_is_one_message(case, tiny_gguf, cache):
    change, message = BAD_FILES[case]
    content = tiny_gguf.read_bytes()
    assert change(content) != content
    tiny_gguf.write_bytes(change(content))
    check_refused(tiny_gguf, message, cache)


def test_a_type_that_cannot_be_decoded_is_named(chat_tokenizer, cache, tmp_path):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    file = write_gguf(tmp_path / "m.gguf", build_model(chat_tokenizer), chat_tokenizer, tensor_type="F32")
    reader = GGUFReader(file)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    place = b"".join(bytes(part) for part in tensor.field.parts[:4])  # its name and shape; its type follows
    del reader
    number = GGMLQuantizationType.Q8_K  # only of intermediate results; 256 numbers a block, as each row of 64 is not
    assert number in GGML_QUANT_SIZES
    content = file.read_bytes()
    assert content.count(place) == 1
    file.write_bytes(content.replace(place + b"\x00\x00\x00\x00", place + int(number).to_bytes(4, "little")))
    check_refused(file, "Q8_K", cache)


MISSING = {
    "no tensor": (
        {"blk.1.attn_k.weight": None},
        "lacks 1 of the model's 21 weights, such as model.layers.1.self_attn.k_proj.weight",
    ),
    "a tensor too many": ({"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, "blk.0.attn_sinks.weight has no place"),
    "other frequencies": ({"rope_freqs.weight": np.full(8, 2.0, np.float32)}, "rotary frequencies"),
}


@pytest.mark.parametrize("case", MISSING)
def test_each_tensor_has_its_place(case, chat_tokenizer, cache, tmp_path):
    tensors, message = MISSING[case]
    file = write_gguf(tmp_path / "m.gguf", build_model(chat_tokenizer), chat_tokenizer, tensors=tensors)
    check_refused(file, message, cache)


def test_a_missing_file_is_named_and_no_hub_is_asked(tmp_path, cache):
    check_refused(tmp_path / "none.gguf", "there is no such file", cache)


def test_a_missing_package_is_named(tiny_gguf, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    check_refused(tiny_gguf, "needs the package gguf", cache)


def test_a_cache_that_cannot_be_written_is_named(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("DPOKIT_CACHE", str(tmp_path / "a file"))
    with pytest.raises(DpokitError, match="the converted model was not kept") as error:
        find_model_folder(str(tiny_gguf))
    assert "DPOKIT_CACHE" in error.value.do


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_lookup(monkeypatch) -> None:
    """Fails the test if a library takes the file's name for a folder or a Hub id."""

    def refuse(look_up, *args, **options):
        looked_up = [value for value in (*args, *options.values()) if str(value).endswith(".gguf")]
        assert not looked_up, (args, options)
        return look_up(*args, **options)

    for module, name in ((hub, "cached_files"), (save_and_load, "check_file_exists_on_hf_hub")):
        monkeypatch.setattr(module, name, partial(refuse, getattr(module, name)))


@pytest.mark.usefixtures("no_lookup")
def test_a_run_on_a_gguf_file_passes_every_verb(tiny_gguf, cache, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    settings = {"model_name_or_path": str(tiny_gguf), "dataset_name": str(pairs), "output_dir": str(tmp_path / "run")}
    settings |= {"eval_fraction": 0.3, "max_steps": 2, "per_device_train_batch_size": 2, "max_length": 64}
    settings |= {"use_cpu": True, "report_to": "none", "use_peft": True, "save_steps": 1, "logging_steps": 1}
    settings |= {"learning_rate": 1e-2}
    run = dpokit.train_model(settings)
    record = run.read_run()
    assert record["settings"]["model_name_or_path"]["value"] == str(tiny_gguf)
    assert "model_name_or_path" in record["local"]
    assert record["gguf"]["file"] == str(tiny_gguf)
    assert record["gguf"]["tensor_types"] == {"Q8_0": 16, "F32": 5}
    base_name = json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base_name == str(tiny_gguf)
    shutil.rmtree(cache)  # as a user may do at any time

    # A resume finds the same model under the same name.
    longer = {"max_steps": 3, "resume_from_checkpoint": "auto", "accept_changes": ["max_steps"]}
    run = dpokit.train_model(settings | longer)
    assert [step["step"] for step in dpokit.read_metrics(run.metrics_jsonl) if "loss" in step][-1] == 3

    made = dpokit.merge_model(run)
    assert made["base"] == {"name": "tiny.gguf", "revision": None}
    assert made["mean_drift"] < 1e-5
    subject = load_subject(str(run.path), base=None, data=None, split=None, argv=[])
    assert subject.base is None, "the base is the tuned model without its adapter"
    with subject.as_base() as base:
        file_alone = AutoModelForCausalLM.from_pretrained(find_model_folder(str(tiny_gguf)))
        assert torch.equal(find_logits(base), find_logits(file_alone))
    merged = AutoModelForCausalLM.from_pretrained(run.merged)
    assert not torch.allclose(find_logits(merged), find_logits(file_alone), atol=1e-3)

    lineage = find_lineage(run, load_run(run.path, name="run"), weights=None, base_model=None)
    assert (lineage.base.name, lineage.base.on_hub) == ("tiny.gguf", False)

    # The adapter, and the file itself, in place of a model.
    adapter = load_subject(str(run.adapter), base=None, data=str(pairs), split=None, argv=["--max_length", "64"])
    assert torch.equal(find_logits(adapter.tuned), find_logits(subject.tuned))
    alone = load_subject(str(tiny_gguf), base=None, data=str(pairs), split=None, argv=["--max_length", "64"])
    assert torch.equal(find_logits(alone.tuned), find_logits(file_alone))
    models = LocalModels(str(run.merged), str(tiny_gguf))
    models.check_files()
    models.load()
    assert models.names == {"base": str(tiny_gguf), "tuned": str(run.merged)}
    # In fp64, so that only the rounding of the merged weights is left.
    assert torch.allclose(find_logits(merged.double()), find_logits(subject.tuned.double()), atol=1e-5)


def test_an_adapter_of_a_missing_file_is_named(tiny_gguf, tmp_path):
    run = build_run(tmp_path, Path(find_model_folder(str(tiny_gguf))), LoraConfig(r=2, target_modules=["q_proj"]))
    config = run.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "gone.gguf"}))
    with pytest.raises(ModelError, match=r"--model_name_or_path gone\.gguf: there is no such file"):
        load_subject(str(run.adapter), base=None, data=str(tmp_path / "pairs.jsonl"), split=None, argv=[])


def test_plan_and_prepare_take_a_gguf_file(tiny_gguf, tmp_path):
    recipe = tmp_path / "mine.py"
    settings = {"model_name_or_path": str(tiny_gguf), "dataset_name": str(write_pairs(tmp_path / "p.jsonl", 8))}
    settings |= {"eval_fraction": 0.5, "max_length": 64, "precompute_ref_log_probs": True, "use_cpu": True}
    recipe.write_text(f"DEFAULTS = {settings!r}\n")
    for verb in (["plan", str(recipe), "--json"], ["prepare", str(recipe)]):
        done = subprocess.run([sys.executable, "-m", "dpokit.cli", *verb], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if verb[0] == "plan":
            assert json.loads(done.stdout)["model"] == str(tiny_gguf)
