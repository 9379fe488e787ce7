"""Builds the tokenizer that a GGUF file describes, and checks it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from dpokit.model.gguf_metadata import refuse_file

# `tokenizer.ggml.pre`: how a text is split before merges are applied. transformers knows the names of its own table,
# and splits as GPT-2 for all others, although some split digits first.
GPT2_SPLITS = {"gpt-2", "mpt", "olmo", "jais", "trillion"}
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# A piece that is a token is not merged from its letters, and a text begins with BOS unless the file denies it.
LLAMA3_SPLITS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"}
CONTROL, USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type` of tokens that no text is split into


def check_splits(file: Path, metadata: Mapping[str, Any]) -> None:
    """Raises ModelError for a tokenizer that transformers does not build as the file describes it."""
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    rules = {*GPT2_SPLITS, *DIGIT_SPLITS, *GGUF_PRE_TOKENIZER_SPLITS}
    if kind == "gpt2" and split not in rules:
        problem = f"its tokenizer splits texts by the rule {split!r} (tokenizer.ggml.pre), which is not known"
    elif kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        problem = "its SentencePiece tokenizer adds no space before a text (tokenizer.ggml.add_space_prefix)"
    elif kind not in ("gpt2", "llama"):
        problem = f"its tokenizer is of the kind {kind!r} (tokenizer.ggml.model)"
    else:
        return
    refuse_file(
        file,
        f"{problem}: its token ids would be wrong",
        expected=f"a SentencePiece tokenizer, or a byte-level one with one of the rules {', '.join(sorted(rules))}",
        do="name a folder with the model's safetensors and its tokenizer.json",
    )


def build_tokenizer(file: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Returns transformers' tokenizer of a GGUF file, corrected: special tokens, splitting of texts, BOS and context.

    transformers adds a token of its own if the file has no `<|endoftext|>`, and leaves out special tokens that are not
    spelled in the byte alphabet.
    """
    architecture, vocabulary, _ = get_gguf_tokenizer(str(file))
    backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
    described = json.loads(backend.to_str())
    tokens, split = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.pre")
    special = _list_special(metadata)
    if isinstance(described["model"]["vocab"], dict):
        spelling = {number: token for token, number in described["model"]["vocab"].items()}
        spelling |= {number: tokens[number] for number in special}
        described["model"]["vocab"] = {token: number for number, token in spelling.items()}
    described["added_tokens"] = [
        {"id": number, "content": tokens[number], "special": kind == CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, kind in special.items()
    ]
    if split in LLAMA3_SPLITS:
        described["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(described))
    if split in DIGIT_SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    numbers = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get(f"{architecture}.context_length", int(1e30)),
        add_bos_token=_adds_bos(metadata),
        add_eos_token=_adds_eos(metadata),
        **{name: tokens[number] for name, number in numbers.items() if number is not None},
    )


def _list_special(metadata: Mapping[str, Any]) -> dict[int, int]:
    """Returns `{id: kind}` of the tokens that no text is split into, in the order of their ids."""
    kinds = metadata.get("tokenizer.ggml.token_type") or ()
    return {number: kind for number, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text begins with BOS: as the file says, or else by the default of its kind of tokenizer."""
    by_default = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3_SPLITS
    return bool(metadata.get("tokenizer.ggml.add_bos_token", by_default))


def _adds_eos(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("tokenizer.ggml.add_eos_token", False))


def check_tokenizer(file: Path, tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any]) -> None:
    """Raises ModelError unless the tokenizer has the file's tokens, keeps special ones whole, and adds its BOS."""
    tokens = metadata["tokenizer.ggml.tokens"]
    whole = _list_special(metadata)
    problem = ""
    if len(tokenizer) != len(tokens):
        problem = f"has {len(tokenizer):,} tokens, and the file lists {len(tokens):,}"
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and getattr(tokenizer, f"{name}_token_id") != number:
            problem = f"takes another token as its {name.upper()} than the file ({tokens[number]!r})"
    texts = [tokens[number] for number in whole]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for number, ids in zip(whole, encoded, strict=True):
        if ids != [number] and not problem:
            problem = f"splits the special token {tokens[number]!r}"
    bos = [tokenizer.bos_token_id] if _adds_bos(metadata) else []
    eos = [tokenizer.eos_token_id] if _adds_eos(metadata) else []
    described = bos + tokenizer("a", add_special_tokens=False)["input_ids"] + eos
    if tokenizer("a")["input_ids"] != described and not problem:
        problem = f"makes {tokenizer('a')['input_ids']} of the text 'a', and the file describes {described}"
    if problem:
        refuse_file(
            file,
            f"the tokenizer that transformers makes of it {problem}",
            expected="the token ids that the model was trained with",
            do="name a folder with the model's safetensors and its tokenizer.json",
        )
