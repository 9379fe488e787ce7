"""Reads a model from a GGUF file: converted once into a folder of the cache, with tokenizer and generation config.

Training needs floating-point weights, so the quantised ones are decoded. The copy is in float32, which holds every
value that a quantised type decodes to: a 16-bit scale times a whole number has more significant bits than bfloat16's 8.
It is in bfloat16 only if that changes no value, as for a file of a model that was published in bfloat16.

What a file says and dpokit does not know is an error: a key of the architecture, a tensor, a rule of splitting texts.
transformers itself passes over them (5.23), so that such a model computes something else without a word.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer, read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpokit.atomic_files import new_folder, read_record, sync_folder, write_json
from dpokit.caches import find_caches
from dpokit.console import say
from dpokit.errors import DpokitError, MachineError, ModelError, find_disk_trouble
from dpokit.file_hashes import hash_file
from dpokit.model.check import check_config, is_gguf

RECORD_FILE = "gguf.json"
FORMAT = 1  # part of a copy's name: another way of converting makes another copy
PACKAGES = ("dpokit", "gguf", "transformers")

# `general.architecture` of the models whose conversion tests/model/test_gguf.py proves.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Keys of an architecture that `_build_config` compares with others.
REPEATED_KEYS = {"attention.key_length", "attention.value_length"}
# `tokenizer.ggml.pre`: how a text is split before merges are applied. transformers knows the names of its own table,
# and splits as GPT-2 for all others, although some split digits first.
GPT2_SPLITS = {"gpt-2", "mpt", "olmo", "jais", "trillion"}
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# A piece that is a token is not merged from its letters, and a text begins with BOS unless the file denies it.
LLAMA3_SPLITS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"}
_COPIES: dict[str, str] = {}  # the copies that this process has used, by the file's name
CONTROL, USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type` of tokens that no text is split into
ROPE_FACTORS = "rope_freqs.weight"
# The values of all Llama 3 models; a file has only the factors that follow from them.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def find_model_folder(name: str) -> str:
    """Returns the folder of a model's files: of a GGUF file its converted copy, made if missing; else the name itself.

    Any process may call it: one at a time converts, and the others use its copy.

    Raises:
        ModelError: a file that is damaged, or of a kind that is not supported.
        MachineError: the cache's file system has no locks.
        RunFolderError: the copy cannot be written.
    """
    if not is_gguf(name):
        return name
    file = Path(name)
    with _file_errors(name):
        if not file.is_file() and name in _COPIES:  # it was moved while this process runs
            return _COPIES[name]
        if not file.is_file():
            _refuse(name, "there is no such file", do="correct the path; from the Hub: hf download ID FILE.gguf")
        sha256 = hash_file(file)
    folder = find_caches() / "gguf" / f"{sha256[:32]}-{FORMAT}"
    if not _is_whole(folder):
        with _disk_errors(), _lock(folder):
            if not _is_whole(folder):
                with new_folder(folder) as part:
                    _convert(file, part, sha256)
                made = read_record(folder / RECORD_FILE)
                chat = "" if made["has_chat_template"] else "; it has no chat template"
                say(
                    f"{name}: {made['weights']:,} weights ({', '.join(made['tensor_types'])}) are converted once, to "
                    f"{made['dtype']} in {folder}{chat}"
                )
    _COPIES[name] = str(folder)
    return _COPIES[name]


def describe_gguf(name: str) -> dict[str, Any] | None:
    """Returns what run.json records of a GGUF file: its name, sha256 and types, and the copy's dtype; else None."""
    if not is_gguf(name):
        return None
    made: dict[str, Any] = read_record(Path(find_model_folder(name)) / RECORD_FILE)
    return {"file": name} | {key: value for key, value in made.items() if key not in ("format", "files")}


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds a copy with all its files, by their sizes."""
    try:
        files = read_record(folder / RECORD_FILE)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return False


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time make this folder, on all machines that share the cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise MachineError(
                f"the file system of {folder.parent} has no locks: {error.strerror}",
                expected="a cache in which two processes cannot write the same files",
                do="set DPOKIT_CACHE to a folder on another disk",
            ) from error
        yield


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except DpokitError:
        raise
    except Exception as error:  # of any library: safetensors and tokenizers raise their own
        trouble = find_disk_trouble(error)
        if trouble is None:
            raise
        raise type(trouble)(
            f"{trouble.seen}; the converted model was not kept",
            expected="space for the model's weights in float32",
            do="free some space, or set DPOKIT_CACHE to a folder on another disk",
        ) from error


@contextmanager
def _file_errors(name: str) -> Iterator[None]:
    """Turns an error of reading the file, of any library, into a ModelError. Errors of writing stay as they are."""
    try:
        yield
    except (DpokitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if find_disk_trouble(error) is not None and not isinstance(error, PermissionError):
            raise
        _refuse(name, f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})", error)


def _refuse(
    name: str | Path,
    problem: str,
    error: Exception | None = None,
    *,
    expected: str = "a whole GGUF file of a language model",
    do: str = "take another copy of the file, or name a folder with the model's safetensors",
) -> NoReturn:
    raise ModelError(f"--model_name_or_path {name}: {problem}", expected=expected, do=do) from error


# -- the conversion ----------------------------------------------------------------------------------------------------


def _convert(file: Path, part: Path, sha256: str) -> None:
    """Fills a folder with the model of a GGUF file, and flushes it to disk. Raises: ModelError, OSError."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"--model_name_or_path {file}: reading a GGUF file needs the package gguf",
            expected="the package gguf",
            do="pip install 'dpokit[gguf]'",
        ) from error
    with _file_errors(str(file)):
        metadata = _read_metadata(file)
        reader = gguf.GGUFReader(file)
        config = _build_config(file, metadata, reader)
        config.save_pretrained(part)
        try:
            check_config(str(part), None)
        except ModelError as error:
            _refuse(file, f"its metadata {error.seen.partition('config.json ')[2]}", error)
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        weights = _read_weights(file, reader, model)
        tokenizer = _build_tokenizer(file, metadata)
        tokenizer.save_pretrained(part)
        _check_tokenizer(file, AutoTokenizer.from_pretrained(part), metadata)
    dtype = torch.bfloat16 if all(torch.equal(w, w.bfloat16().float()) for w in weights.values()) else torch.float32
    save_torch_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, part)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(part)
    _build_generation_config(metadata).save_pretrained(part)
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    record = {
        "format": FORMAT,
        "sha256": sha256,
        "architecture": metadata["general.architecture"],
        "weights": sum(weight.numel() for weight in weights.values()),
        "tensor_types": dict(types.most_common()),
        "dtype": str(dtype).removeprefix("torch."),
        "has_chat_template": tokenizer.chat_template is not None,
        "versions": {name: version(name) for name in PACKAGES},
        "files": {path.name: path.stat().st_size for path in part.iterdir()},
    }
    for path in part.iterdir():
        with path.open("rb") as written:
            os.fsync(written.fileno())
    write_json(part / RECORD_FILE, record)
    sync_folder(part)


def _read_metadata(file: Path) -> dict[str, Any]:
    """Returns the file's metadata. Raises: ModelError: it is no GGUF file, or not of a supported model."""
    with file.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        _refuse(file, f"it is no GGUF file: it begins with {magic!r}, not with {b'GGUF'!r}")
    metadata: dict[str, Any]
    metadata, _ = read_gguf_metadata(str(file), ("tokenizer.ggml.tokens",))
    kind, parts = metadata.get("general.type", "model"), metadata.get("split.count", 1)
    if kind != "model":
        _refuse(file, f"it holds a part of a model (general.type is {kind!r})")
    if parts > 1:
        _refuse(
            file,
            f"it is one of {parts} files of a model",
            do="join them: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        _refuse(
            file,
            f"its architecture {architecture!r} is not supported",
            expected=f"one of: {', '.join(ARCHITECTURES)}",
            do="name a folder with the model's safetensors, or its Hub id",
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        _refuse(file, "it has no tokenizer (tokenizer.ggml.tokens)")
    for key, number in metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and not 0 <= number < len(tokens):
            _refuse(file, f"{key} is {number}, and it has {len(tokens):,} tokens")
    _check_splits(file, metadata)
    return metadata


def _check_splits(file: Path, metadata: Mapping[str, Any]) -> None:
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
    _refuse(
        file,
        f"{problem}: its token ids would be wrong",
        expected=f"a SentencePiece tokenizer, or a byte-level one with one of the rules {', '.join(sorted(rules))}",
        do="name a folder with the model's safetensors and its tokenizer.json",
    )


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
        _refuse_model(file, f"{architecture}.{unknown[0]} is {str(described[unknown[0]])[:60]}, which is not supported")
    values = {names[key]: value for key, value in described.items() if names.get(key) is not None}
    size = described.get("attention.key_length") or described["embedding_length"] // described["attention.head_count"]
    if {described.get("rope.dimension_count", size), described.get("attention.value_length", size)} != {size}:
        _refuse_model(file, "its heads have keys, values and rotary positions of different sizes")
    if architecture != "qwen2":
        values["head_dim"] = size
    elif size * described["attention.head_count"] != described["embedding_length"]:
        _refuse_model(file, f"its heads have {size} dimensions")
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
        _refuse_model(file, f"it scales its rotary frequencies ({ROPE_FACTORS}) otherwise than Llama 3")


def _refuse_model(file: Path, problem: str) -> NoReturn:
    _refuse(
        file,
        problem,
        expected=f"a plain model of one of the architectures {', '.join(ARCHITECTURES)}",
        do="name a folder with the model's safetensors, or its Hub id",
    )


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
            _refuse_model(file, f"its tensor {tensor.name} has no place in the model that its metadata describes")
        try:
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        except NotImplementedError as error:
            _refuse(
                file,
                f"its tensor {tensor.name} has the type {tensor.tensor_type.name}, which gguf {version('gguf')} cannot "
                "decode",
                error,
                expected="F32, F16, BF16, Q4_0 to Q8_0, or a K-quant such as Q4_K",
                do="take a file with another quantisation, or name a folder with the model's safetensors",
            )
        if values.shape != shapes[name]:
            _refuse(
                file,
                f"its tensor {tensor.name} has the shape {tuple(values.shape)}, and its metadata describes "
                f"{tuple(shapes[name])}",
            )
        if config.model_type == "llama" and tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            # llama.cpp rotates neighbouring rows of a head, transformers its first half with its second.
            values = values.view(-1, config.head_dim // 2, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        weights[name] = values
    if missing := sorted(shapes.keys() - weights.keys()):
        _refuse(file, f"it lacks {len(missing):,} of the model's {len(shapes):,} weights, such as {missing[0]}")
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


def _build_tokenizer(file: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
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


def _check_tokenizer(file: Path, tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any]) -> None:
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
        _refuse(
            file,
            f"the tokenizer that transformers makes of it {problem}",
            expected="the token ids that the model was trained with",
            do="name a folder with the model's safetensors and its tokenizer.json",
        )
