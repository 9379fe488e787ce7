"""Converts a GGUF file into a folder with config, weights, tokenizer and generation config.

Training needs floating-point weights, so the quantised ones are decoded. The copy is in float32, which holds every
value that a quantised type decodes to: a 16-bit scale times a whole number has more significant bits than bfloat16's 8.
It is in bfloat16 only if that changes no value, as for a file of a model that was published in bfloat16.

What a file says and dpokit does not know is an error: a key of the architecture, a tensor, a rule of splitting texts.
transformers itself passes over them (5.23), so that such a model computes something else without a word.
"""

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpokit.errors import ModelError
from dpokit.model.check import check_config
from dpokit.model.gguf_metadata import file_errors, read_metadata, refuse_file, refuse_model
from dpokit.model.gguf_tokenizer import build_tokenizer, check_splits, check_tokenizer

# Keys of an architecture that `_build_config` compares with others.
REPEATED_KEYS = {"attention.key_length", "attention.value_length"}
ROPE_FACTORS = "rope_freqs.weight"
# The values of all Llama 3 models; a file has only the factors that follow from them.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def convert_gguf(file: Path, folder: Path) -> dict[str, Any]:
    """Fills a folder with the model of a GGUF file; returns its architecture, number of weights, types and dtype.

    Raises: ModelError, OSError.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"--model_name_or_path {file}: reading a GGUF file needs the package gguf",
            expected="the package gguf",
            do="pip install 'dpokit[gguf]'",
        ) from error
    with file_errors(str(file)):
        metadata = read_metadata(file)
        check_splits(file, metadata)
        reader = gguf.GGUFReader(file)
        config = _build_config(file, metadata, reader)
        config.save_pretrained(folder)
        try:
            check_config(str(folder), None)
        except ModelError as error:
            refuse_file(file, f"its metadata {error.seen.partition('config.json ')[2]}", error)
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        weights = _read_weights(file, reader, model)
        tokenizer = build_tokenizer(file, metadata)
        tokenizer.save_pretrained(folder)
        check_tokenizer(file, AutoTokenizer.from_pretrained(folder), metadata)
    dtype = torch.bfloat16 if all(torch.equal(w, w.bfloat16().float()) for w in weights.values()) else torch.float32
    save_torch_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, folder)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    _build_generation_config(metadata).save_pretrained(folder)
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return {
        "architecture": metadata["general.architecture"],
        "weights": sum(weight.numel() for weight in weights.values()),
        "tensor_types": dict(types.most_common()),
        "dtype": str(dtype).removeprefix("torch."),
        "has_chat_template": tokenizer.chat_template is not None,
    }


def _build_config(file: Path, metadata: Mapping[str, Any], reader: Any) -> Any:
    """Returns the model's config. Raises: ModelError for a key of the architecture that transformers does not know."""
    architecture = metadata["general.architecture"]
    described = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    if described.get("rope.scaling.type") == "none":
        del described["rope.scaling.type"]
    names = GGUF_CONFIG_MAPPING[architecture]
    if unknown := sorted(described.keys() - names.keys() - REPEATED_KEYS):
        refuse_model(file, f"{architecture}.{unknown[0]} is {str(described[unknown[0]])[:60]}, which is not supported")
    values = {names[key]: value for key, value in described.items() if names.get(key) is not None}
    size = described.get("attention.key_length") or described["embedding_length"] // described["attention.head_count"]
    if {described.get("rope.dimension_count", size), described.get("attention.value_length", size)} != {size}:
        refuse_model(file, "its heads have keys, values and rotary positions of different sizes")
    if architecture != "qwen2":
        values["head_dim"] = size
    elif size * described["attention.head_count"] != described["embedding_length"]:
        refuse_model(file, f"its heads have {size} dimensions")
    config = AutoConfig.for_model(
        architecture,
        **{"vocab_size": len(metadata["tokenizer.ggml.tokens"])} | values,
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    _set_rope(file, reader, config)
    return config


def _set_rope(file: Path, reader: Any, config: Any) -> None:
    """Sets Llama 3's scaling of the rotary frequencies, which a file describes by the factors alone.

    Raises: ModelError for the factors of another scaling.
    """
    stored = next((tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    if stored is None:
        return
    factors, size = torch.tensor(stored, dtype=torch.float32), config.head_dim
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    config.rope_parameters |= {"rope_type": "llama3", "factor": float(factors.max())} | LLAMA3_ROPE
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    if factors.shape != plain.shape or not torch.allclose(plain / scaled, factors, rtol=1e-4):
        refuse_model(file, f"it scales its rotary frequencies ({ROPE_FACTORS}) otherwise than Llama 3")


def _read_weights(file: Path, reader: Any, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns every weight of the model, float32, by its name in transformers.

    Args:
        model: on the meta device.

    Raises: ModelError for a type that cannot be decoded, and unless tensors and weights correspond one to one.
    """
    import gguf

    config = model.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}  # tied weights once
    by_tensor = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in shapes}
    weights = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        name = by_tensor.get(tensor.name)
        if name is None:
            refuse_model(file, f"its tensor {tensor.name} has no place in the model that its metadata describes")
        try:
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        except NotImplementedError as error:
            refuse_file(
                file,
                f"its tensor {tensor.name} has the type {tensor.tensor_type.name}, which gguf {version('gguf')} cannot "
                "decode",
                error,
                expected="F32, F16, BF16, Q4_0 to Q8_0, or a K-quant such as Q4_K",
                do="take a file with another quantisation, or name a folder with the model's safetensors",
            )
        if values.shape != shapes[name]:
            refuse_file(
                file,
                f"its tensor {tensor.name} has the shape {tuple(values.shape)}, and its metadata describes "
                f"{tuple(shapes[name])}",
            )
        if config.model_type == "llama" and tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            # llama.cpp rotates neighbouring rows of a head, transformers its first half with its second.
            values = values.view(-1, config.head_dim // 2, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        weights[name] = values
    if missing := sorted(shapes.keys() - weights.keys()):
        refuse_file(file, f"it lacks {len(missing):,} of the model's {len(shapes):,} weights, such as {missing[0]}")
    return weights


def _build_generation_config(metadata: Mapping[str, Any]) -> GenerationConfig:
    """Returns the tokens that begin, pad and end a text; of a chat model also the one that ends a turn."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None))
    return GenerationConfig(
        bos_token_id=ids["bos"],
        pad_token_id=ids["padding"],
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
    )
