"""Writes a model of transformers as a GGUF file, as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Parts of a tensor's name in transformers, and in a GGUF file.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL = 1, 3


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tensor_type: str = "Q8_0",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """Writes the model, and sets its weights to the values that the file holds.

    Args:
        model: its matrices are quantised; vectors stay in float32.
        tensor_type: of the matrices, such as `Q4_1`.
        metadata: keys to add or, with the value None, to leave out.
        tensors: tensors to add in float32 or, with the value None, to leave out.
    """
    config, kind = model.config, GGMLQuantizationType[tensor_type]
    described = _describe_model(config) | _describe_tokenizer(tokenizer) | (metadata or {})
    writer = GGUFWriter(path, described.pop("general.architecture"))
    for key, value in described.items():
        if value is not None:
            _add(writer, key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    changes = dict(tensors or {})
    for name, weight in model.named_parameters():
        gguf_name = name
        for part, other in NAMES.items():
            gguf_name = gguf_name.replace(f"{part}", other) if part.endswith(".") else _rename(gguf_name, part, other)
        if gguf_name in changes and changes.pop(gguf_name) is None:
            continue
        values = weight.detach().float().numpy()
        stored = values if values.ndim == 1 else quantize(values, kind)
        if values.ndim == 2:
            weight.data = torch.tensor(dequantize(stored, kind))
        projection = name.split(".")[-2]
        if config.model_type == "llama" and projection in heads:
            stored = _interleave(stored, heads[projection])
        writer.add_tensor(gguf_name, stored, raw_dtype=None if values.ndim == 1 else kind)
    for name, values in changes.items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rename(name: str, part: str, other: str) -> str:
    """Replaces whole parts of a dotted name."""
    return f".{name}.".replace(f".{part}.", f".{other}.").strip(".")


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of each head's two halves in turns: llama.cpp rotates neighbours, transformers halves."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _describe_model(config: Any) -> dict[str, Any]:
    kind = config.model_type
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"general.architecture": kind, "general.name": "Tiny"} | {
        f"{kind}.{key}": value
        for key, value in {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": size,
            "attention.value_length": size,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "rope.dimension_count": size,
        }.items()
    }


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = tokenizer.get_added_vocab()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)
