"""The stage `equality`: packed and padded rows of each model family give the same log-probs and gradients."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from day_context import Cases, Context, Values

# Tokens of prompt, chosen and rejected answer.
PAIR_LENGTHS = [(300, 40, 60), (500, 120, 1), (1, 1, 3), (64, 200, 128)]
SHORT_LENGTHS = [(30, 4, 6), (1, 1, 3), (9, 12, 8)]
LARGEST_IN_FP32 = 1e-4  # nats a token; a wrong mask moves these models by tenths
LARGEST_GRADIENT_IN_FP32 = 1e-3  # of the gradient's length


def list_families() -> dict[str, Any]:
    """Two layers of each family, with the head sizes of real models, so that kernels are those of real models."""
    from transformers import (
        GemmaConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    size = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 1024}
    grouped = size | {"num_key_value_heads": 2}
    return {
        "gpt2": GPT2Config(vocab_size=512, n_embd=256, n_layer=2, n_head=4, n_positions=1024),
        "llama": LlamaConfig(**grouped),
        "qwen2": Qwen2Config(**grouped),
        "qwen3": Qwen3Config(**grouped, head_dim=128),
        "mistral": MistralConfig(**grouped, sliding_window=1024),
        "gemma": GemmaConfig(**grouped, head_dim=256),
        "gpt_neox": GPTNeoXConfig(**size),
    }


def run_equality(context: Context) -> Cases:
    return {family: partial(compare_rows, context, config) for family, config in list_families().items()}


def compare_rows(context: Context, config: Any) -> Values:
    """Distances of packed and padded rows from padded fp32: log-probs in nats a token, gradients as a share.

    `wrong mask` is the distance if the rejected answer sees the chosen one: the equal ones must be far below it.
    """
    from planted_faults import planted
    from test_shared_prefix import build, make_batch

    from dpokit.model import shared_prefix
    from dpokit.model.score import score_tokens, share_prefix

    model = build(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)  # so that attention matters as much as in a trained model
    model.to(context.device)
    batch = make_batch(SHORT_LENGTHS if context.dry_run else PAIR_LENGTHS)
    batch = {name: tensor.to(context.device) for name, tensor in batch.items()}
    shared = share_prefix(model)
    autocast = partial(torch.autocast, context.device.type, torch.bfloat16)

    def score(*, packed: bool, rounded: bool = False) -> Any:
        with nullcontext() if packed else shared.switched_off():
            return score_with_gradient(model, batch, autocast(enabled=rounded))

    exact = score(packed=False)
    values: Values = {"fp32": find_distances(score(packed=True), exact, batch)}
    with torch.no_grad(), planted("the rejected answer sees the chosen one", model):
        values["wrong mask"] = find_distances((score_tokens(model, batch), {}), exact, batch)[0]
    for name in ("autocast", "bf16"):
        if name == "bf16":
            for weight in model.parameters():  # rotary embeddings stay in fp32, as in a model that is loaded in bf16
                weight.data = weight.data.bfloat16()
        rounded = name == "autocast"
        values[f"{name}, padded"] = find_distances(score(packed=False, rounded=rounded), exact, batch)
        with count_flash(shared_prefix) as calls:
            values[f"{name}, packed"] = find_distances(score(packed=True, rounded=rounded), exact, batch)
        values[f"{name}, flash calls"] = len(calls)
    return values | find_error(values, uses_flash=shared_prefix.HAS_FLASH and not context.dry_run)


@contextmanager
def count_flash(module: Any) -> Iterator[list[str]]:
    """Gives a list that grows with each call of the flash kernel of `shared_prefix`."""
    kernel, calls = module.varlen_attn, list[str]()

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append("flash")
        return kernel(*arguments, **named)

    module.varlen_attn = call
    try:
        yield calls
    finally:
        module.varlen_attn = kernel


def score_with_gradient(
    model: Any, batch: dict[str, torch.Tensor], precision: AbstractContextManager[Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and the gradients of a weighted sum of the answers' log-probs."""
    from dpokit.model.score import score_tokens

    model.zero_grad()
    with precision:
        scores = score_tokens(model, batch)
    weights = torch.linspace(-1, 1, len(scores), device=scores.device)
    (scores.sum(dim=1) * weights).sum().backward()
    gradients = {name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None}
    return scores.detach(), gradients


def find_distances(result: Any, exact: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """Mean distance of log-probs in nats a token; distance of the gradients as a share of the exact one."""
    scored = batch["completion_mask"][:, 1:]
    tokens = float(((result[0] - exact[0]).abs() * scored).sum() / scored.sum())
    if not result[1]:
        return [tokens]
    square = sum(float((result[1][name] - gradient).square().sum()) for name, gradient in exact[1].items())
    whole = sum(float(gradient.square().sum()) for gradient in exact[1].values())
    return [tokens, (square / whole) ** 0.5]


def find_error(values: Values, *, uses_flash: bool) -> Values:
    """What is wrong with the distances of a family; empty if nothing is."""
    tokens, gradient = values["fp32"]
    if not (tokens <= LARGEST_IN_FP32 and gradient <= LARGEST_GRADIENT_IN_FP32 and 10 * tokens < values["wrong mask"]):
        return {"error": f"in fp32 packed rows differ by {tokens:.1e} nats a token, gradients by {gradient:.1e}"}
    for name in ("autocast", "bf16"):
        padded, packed = values[f"{name}, padded"], values[f"{name}, packed"]
        if not all(here <= 2 * there + 1e-3 for here, there in zip(packed, padded, strict=True)):
            return {"error": f"{name}: packed rows are {packed} from fp32, padded ones {padded}"}
        if uses_flash and not values[f"{name}, flash calls"]:
            return {"error": f"{name}: flash attention was not used"}
    return {}
