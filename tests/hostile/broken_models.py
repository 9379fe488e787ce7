"""Hostile or damaged models and adapters: each case changes a valid one and has a part of the expected message."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from payloads import touch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], object]
TORN = "take another copy"


def edit(file: str, **changes: object) -> Change:
    """Sets keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def remove(file: str, *keys: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))

    return change


def write(file: str, content: bytes | str) -> Change:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def retensor(file: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Changes the tensors of a safetensors file."""

    def apply(folder: Path) -> None:
        tensors = change(load_file(folder / file))
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"}
        )

    return apply


def pickled(file: str, name: str, marker: str = "it-ran") -> Change:
    """Replaces the weights by a pickle that runs a program."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / name).write_bytes(pickle.dumps(touch(folder.parent / marker)))

    return change


def cut(file: str) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


CONFIG, WEIGHTS = "config.json", "model.safetensors"

# Changes of a GPT-2 model, and a part of the message for each.
MODELS: dict[str, tuple[Change, str]] = {
    "weights as a pickle": (pickled(WEIGHTS, "pytorch_model.bin"), "no weights as safetensors"),
    "weights as a renamed pickle": (
        lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps(touch(folder.parent / "it-ran"))),
        "could be loaded",
    ),
    "an index that names a pickle": (
        lambda folder: (
            (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
            (folder / f"{WEIGHTS}.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model.bin"}})
            ),
        ),
        "could be loaded",
    ),
    "an index that names a file elsewhere": (
        lambda folder: (
            (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors"),
            (folder / f"{WEIGHTS}.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "../../nowhere.safetensors"}})
            ),
        ),
        "could be loaded",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights as safetensors"),
    "torn weights": (cut(WEIGHTS), "could be loaded"),
    "empty weights": (write(WEIGHTS, b""), "could be loaded"),
    "a header of gigabytes": (write(WEIGHTS, (2**40).to_bytes(8, "little") + b"{}"), "could be loaded"),
    "a tensor is missing": (
        retensor(WEIGHTS, lambda t: {k: v for k, v in t.items() if "h.1.mlp.c_fc.weight" not in k}),
        "lacks tensors of the model, which would be random: transformer.h.1.mlp.c_fc.weight",
    ),
    "a block is missing": (
        retensor(WEIGHTS, lambda t: {k: v for k, v in t.items() if ".h.1." not in k}),
        "lacks tensors of the model, which would be random: transformer.h.1.attn.c_attn.bias and 11 more",
    ),
    "the embedding is missing": (
        retensor(WEIGHTS, lambda t: {k: v for k, v in t.items() if "wte" not in k}),
        "lacks tensors",
    ),
    "a tensor too many": (
        retensor(WEIGHTS, lambda t: t | {"transformer.h.7.ln_1.bias": torch.ones(32)}),
        "holds tensors that the model has no place for: transformer.h.7.ln_1.bias",
    ),
    "a value head": (
        retensor(WEIGHTS, lambda t: t | {"v_head.summary.weight": torch.ones(1, 32)}),
        "no place for: v_head",
    ),
    "a tensor of another shape": (
        retensor(WEIGHTS, lambda t: {k: v[:, :7] if "c_fc.weight" in k else v for k, v in t.items()}),
        "c_fc.weight",
    ),
    "all names wrong": (retensor(WEIGHTS, lambda t: {f"x.{k}": v for k, v in t.items()}), "lacks tensors"),
    "no tensor at all": (retensor(WEIGHTS, lambda _: {}), "lacks tensors"),
    "a weight that is NaN": (
        retensor(WEIGHTS, lambda t: {k: v * float("nan") if "h.0.ln_1.weight" in k else v for k, v in t.items()}),
        "transformer.h.0.ln_1.weight holds values that are not finite",
    ),
    "a weight that is infinite": (
        retensor(WEIGHTS, lambda t: {k: v.fill_(float("-inf")) if "wpe" in k else v for k, v in t.items()}),
        "wpe.weight holds values that are not finite",
    ),
    "a config of 100 TB": (edit(CONFIG, n_embd=2**19, n_layer=100, n_head=2**10), "parameters, but its files have"),
    "a config of a huge vocabulary": (edit(CONFIG, vocab_size=2**27), "parameters, but its files have"),
    "a config of many positions": (edit(CONFIG, n_positions=2**30), "parameters, but its files have"),
    "a vocabulary beyond bounds": (edit(CONFIG, vocab_size=10**12), "vocab_size is 1000000000000"),
    "layers without end": (edit(CONFIG, n_layer=10**9), "n_layer is 1000000000"),
    "no layers": (edit(CONFIG, n_layer=0), "n_layer is 0"),
    "negative layers": (edit(CONFIG, n_layer=-3), "n_layer is -3"),
    "half a layer": (edit(CONFIG, n_layer=1.5), "n_layer is 1.5"),
    "layers as text": (edit(CONFIG, n_layer="two"), "n_layer is two"),
    "layers as a list": (edit(CONFIG, n_layer=[2]), "n_layer is [2]"),
    "layers that are true": (edit(CONFIG, n_layer=True), "n_layer is True"),
    "a negative size": (edit(CONFIG, n_embd=-32), "n_embd is -32"),
    "no heads": (edit(CONFIG, n_head=0), "n_head is 0"),
    "heads that do not divide": (edit(CONFIG, n_head=3), "describes no model"),
    "an activation that is none": (edit(CONFIG, activation_function="own"), "describes no model"),
    "an activation of a wrong type": (edit(CONFIG, activation_function=3), "activation_function"),
    "a dropout of a wrong type": (edit(CONFIG, resid_pdrop="x"), ""),
    "a dropout above 1": (edit(CONFIG, resid_pdrop=7.0), "describes no model"),
    "a type that is none": (edit(CONFIG, model_type="own"), "could be loaded"),
    "a type of a wrong type": (edit(CONFIG, model_type=["gpt2"]), "could be loaded"),
    "no type": (remove(CONFIG, "model_type"), ""),
    "a model that writes nothing": (edit(CONFIG, model_type="vit"), "could be loaded"),
    "a dtype that is none": (edit(CONFIG, dtype="float3"), ""),
    "code of its own": (edit(CONFIG, model_type="own", auto_map={"AutoConfig": "own.C"}), "code of its own"),
    "a config that is a list": (write(CONFIG, "[]"), "a list, not a mapping"),
    "a config that is a word": (write(CONFIG, '"gpt2"'), "a str, not a mapping"),
    "a config that is no JSON": (write(CONFIG, "{"), "could be loaded"),
    "a config that is empty": (write(CONFIG, ""), "could be loaded"),
    "a config that is no text": (write(CONFIG, b"\xff\xfe\x00"), "could be loaded"),
    "a config nested without end": (write(CONFIG, "[" * 100_000), "could be loaded"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "could be loaded"),
    "no tokenizer": (
        lambda folder: [(folder / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "has no vocabulary",
    ),
    "a tokenizer that is no JSON": (write("tokenizer.json", "{"), "no tokenizer could be loaded"),
    "a tokenizer that is empty": (write("tokenizer.json", "{}"), "no tokenizer could be loaded"),
    "a tokenizer of a wrong type": (write("tokenizer.json", "[1]"), "no tokenizer could be loaded"),
    "a tokenizer with code": (
        edit("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.T", None]}),
        "",
    ),
    "a quantisation that is none": (edit(CONFIG, quantization_config={"quant_method": "own"}), "could be loaded"),
    "a quantisation of a wrong type": (edit(CONFIG, quantization_config=3), "could be loaded"),
}

ADAPTER, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def rename(name: str) -> Change:
    return edit(ADAPTER, base_model_name_or_path=name)


# Changes of a LoRA adapter for that GPT-2, and a part of the message for each.
ADAPTERS: dict[str, tuple[Change, str]] = {
    "weights as a pickle": (pickled(TENSORS, "adapter_model.bin"), "no weights as safetensors"),
    "no weights": (lambda folder: (folder / TENSORS).unlink(), "no weights as safetensors"),
    "torn weights": (cut(TENSORS), "cannot be read"),
    "a tensor is missing": (
        retensor(TENSORS, lambda t: dict(list(t.items())[1:])),
        "lacks tensors of the adapter: ",
    ),
    "a tensor too many": (
        retensor(TENSORS, lambda t: t | {"base_model.model.x.lora_A.weight": torch.ones(2)}),
        "no layer for",
    ),
    "tensors of another rank": (
        retensor(TENSORS, lambda t: {k: torch.cat([v, v], dim=0 if "lora_A" in k else 1) for k, v in t.items()}),
        "does not fit its base",
    ),
    "a tensor that is NaN": (retensor(TENSORS, lambda t: {k: v * float("nan") for k, v in t.items()}), "not finite"),
    "no tensor at all": (retensor(TENSORS, lambda _: {}), "lacks tensors"),
    **{
        f"another method: {kind}": (edit(ADAPTER, peft_type=kind), f"peft_type is {kind!r}")
        for kind in ("IA3", "PREFIX_TUNING", "PROMPT_TUNING", "LOHA", "ADALORA", "OFT", "own", None, 3, ["LORA"])
    },
    "no method": (remove(ADAPTER, "peft_type"), "peft_type is None"),
    **{f"rank {rank!r}": (edit(ADAPTER, r=rank), "r is ") for rank in (0, -1, 10**9, 1.5, "8", None, [8], True, {})},
    "a rank of its own, huge": (edit(ADAPTER, rank_pattern={"c_attn": 10**9}), "c_attn is 1000000000"),
    "a rank of its own, negative": (edit(ADAPTER, rank_pattern={"c_attn": -1}), "c_attn is -1"),
    **{
        f"alpha {alpha!r}": (edit(ADAPTER, lora_alpha=alpha), "lora_alpha is ")
        for alpha in (None, "8", [8], float("nan"), float("inf"))
    },
    **{
        f"dropout {dropout!r}": (edit(ADAPTER, lora_dropout=dropout), "lora_dropout is ")
        for dropout in (-0.1, 1, 7, "x", None, float("nan"))
    },
    "target modules that match nothing": (edit(ADAPTER, target_modules=["q_proj"]), "does not fit its base"),
    "a pattern that matches nothing": (edit(ADAPTER, target_modules="q_.*"), "does not fit its base"),
    "a pattern that is none": (edit(ADAPTER, target_modules="(c_attn"), "target_modules is no regular expression"),
    "a pattern of a star": (edit(ADAPTER, target_modules="*"), "target_modules is no regular expression"),
    "a pattern without end": (edit(ADAPTER, target_modules="(a+)+$"), "may never finish"),
    "a long pattern": (edit(ADAPTER, target_modules="a" * 20_000), "may never finish"),
    "target modules of numbers": (edit(ADAPTER, target_modules=[1, 2]), "target_modules is [1, 2]"),
    "target modules as a number": (edit(ADAPTER, target_modules=3), "target_modules is 3"),
    "no target modules": (edit(ADAPTER, target_modules=[]), "does not fit its base"),
    "modules to save that are a number": (edit(ADAPTER, modules_to_save=3), "modules_to_save is 3"),
    "Megatron": (edit(ADAPTER, megatron_config={"x": 1}, megatron_core="antigravity"), "it is for Megatron"),
    "layers repeated without end": (edit(ADAPTER, layer_replication=[[0, 10**9]]), "layer_replication is"),
    "layers repeated by words": (edit(ADAPTER, layer_replication=[["a", "b"]]), "layer_replication is"),
    "layers repeated by a number": (edit(ADAPTER, layer_replication=3), "layer_replication is"),
    "a base that is nothing": (rename(""), "base_model_name_or_path is ''"),
    "a base that is null": (edit(ADAPTER, base_model_name_or_path=None), "base_model_name_or_path is None"),
    "a base that is a number": (edit(ADAPTER, base_model_name_or_path=3), "base_model_name_or_path is 3"),
    "a base that is a URL": (rename("https://host/model"), "neither a folder nor a Hub id"),
    "a base that is a URL of files": (rename("file:///etc"), "neither a folder nor a Hub id"),
    "a base that is a pickle": (rename("model.bin"), "neither a folder nor a Hub id"),
    "a base that is a file": (rename("/etc/passwd"), "neither a folder nor a Hub id"),
    "a base that is a folder without a model": (rename("/etc"), ""),
    "a base that is nowhere": (rename("/nowhere/model"), ""),
    "a base that is above": (rename(".."), ""),
    "a base that is itself": (
        lambda folder: rename(str(folder))(folder),
        "names the adapter itself",
    ),
    "a base that is an adapter": (
        lambda folder: (shutil.copytree(folder, folder.parent / "other"), rename(str(folder.parent / "other"))(folder)),
        "another adapter",
    ),
    "a config that is a list": (write(ADAPTER, "[]"), "a list, not a mapping"),
    "a config that is no JSON": (write(ADAPTER, "{"), "cannot be read"),
    "a config that is empty": (write(ADAPTER, ""), "cannot be read"),
    "a config nested without end": (write(ADAPTER, "[" * 100_000), "cannot be read"),
    "a key that PEFT does not know": (edit(ADAPTER, own_key=1), ""),
    "a start by an attack": (edit(ADAPTER, init_lora_weights="own"), "does not fit its base"),
    "a bias that is none": (edit(ADAPTER, bias="own"), "bias: own"),
}
# PEFT and transformers ignore these unknown values, which change no result.
HARMLESS = {"a key that PEFT does not know", "a tokenizer with code", "a quantisation that is none"}
