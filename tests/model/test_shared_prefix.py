"""Packed rows against TRL's padded ones: log-probs, metrics and gradients, over families of models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head
from waits import attend_plainly

from dpokit.model import shared_prefix
from dpokit.model.packed_rows import pack_pairs
from dpokit.model.score import Proof, find_obstacle, prove, score_batch, share_prefix
from dpokit.model.shared_prefix import HAS_FLASH, attend

VOCABULARY = 120
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "max_position_embeddings": 128}
GROUPED = SIZE | {"num_key_value_heads": 2}
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED, sliding_window=64),
    "gemma": GemmaConfig(**GROUPED, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**SIZE),
}
# Tokens of prompt, chosen and rejected answer: with prompts and answers of one token, and either answer the longest.
LENGTHS = [(9, 5, 8), (1, 1, 3), (20, 12, 1), (1, 1, 1)]
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def build(config: PreTrainedConfig, lora: bool = False, checkpointing: bool | None = None):
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=OUTPUTS)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    return model.train()


def make_batch(lengths=LENGTHS, same_prefix: int = 0) -> dict[str, torch.Tensor]:
    """TRL's batch: the chosen rows, then the rejected, padded on the right."""
    torch.manual_seed(1)
    width = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)
    rows = {name: torch.zeros(2 * len(lengths), width, dtype=torch.long) for name in ("ids", "mask", "answer")}
    for pair, (prompt, *answers) in enumerate(lengths):
        before, begin = torch.randint(1, VOCABULARY, (prompt,)), torch.randint(1, VOCABULARY, (same_prefix,))
        for row, tokens in zip((pair, pair + len(lengths)), answers, strict=True):
            answer = torch.cat([begin, torch.randint(1, VOCABULARY, (tokens,))])[: max(tokens, 1)]
            rows["ids"][row, : prompt + tokens] = torch.cat([before, answer])
            rows["mask"][row, : prompt + tokens] = 1
            rows["answer"][row, prompt : prompt + tokens] = 1
    return {"input_ids": rows["ids"], "attention_mask": rows["mask"], "completion_mask": rows["answer"]}


def run(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns summed log-probs, and the gradients of a weighted sum of them."""
    model.zero_grad()
    scores = score_batch(model, batch)
    (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    return scores.detach(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


def check_equal(model, batch) -> None:
    padded, expected = run(model, batch)
    shared = share_prefix(model)
    packed, gradients = run(model, batch)
    assert shared.attended == 2
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-5, msg=name)
    with shared.switched_off():
        torch.testing.assert_close(run(model, batch)[0], padded, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_equal_those_of_padded_rows(family, lora, checkpointing):
    check_equal(build(FAMILIES[family], lora, checkpointing), make_batch())


def test_answers_with_an_equal_beginning_are_scored_separately():
    check_equal(build(FAMILIES["llama"]), make_batch([(7, 6, 9), (3, 5, 5)], same_prefix=4))


def test_a_pair_holds_its_prompt_once_and_no_padding():
    batch = make_batch([(9, 5, 8), (20, 12, 1)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    packed = pack_pairs(batch["input_ids"], labels)
    assert packed.groups == [(8, (5, 8)), (19, (12, 1))]
    assert packed.input_ids.shape == (1, 8 + 5 + 8 + 19 + 12 + 1)
    assert (packed.labels != -100).sum() == 5 + 8 + 12 + 1


# 1 where a token is scored, 0 where it is of a user's or a tool's turn.
MASKS = {
    "a user's turn between two answers": ([1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 1]),
    "a user's turn first": ([0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 1]),
    "one answer without unscored tokens": ([0, 1, 1], [1, 1, 1, 1]),
    "cut in a user's turn": ([1, 1, 0, 0], [1, 0, 1, 0, 0]),
    "one scored token": ([0, 0, 0, 1], [1]),
}


def make_masked_batch(same_prefix: int = 0) -> dict[str, torch.Tensor]:
    lengths = [(prompt, *map(len, masks)) for prompt, masks in zip((1, 9, 4, 12, 2), MASKS.values(), strict=True)]
    batch = make_batch(lengths, same_prefix)
    for pair, (prompt, *_) in enumerate(lengths):
        for row, mask in zip((pair, pair + len(lengths)), list(MASKS.values())[pair], strict=True):
            batch["completion_mask"][row, prompt : prompt + len(mask)] = torch.tensor(mask)
    return batch


@pytest.mark.parametrize("make", [make_batch, make_masked_batch])
def test_every_output_field_equals_trls(make):
    model, batch = build(FAMILIES["gpt2"]), make()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    padded = model(**inputs, fused_lm_head=True)
    share_prefix(model)
    packed = model(**inputs, fused_lm_head=True)
    for name in (*OUTPUTS, "label_mask"):
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("same_prefix", [0, 3], ids=["", "equal first tokens"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_unscored_turns_equal_padded_ones(family, lora, same_prefix):
    check_equal(build(FAMILIES[family], lora), make_masked_batch(same_prefix))


def test_rows_of_a_pair_share_the_tokens_that_are_equal():
    batch = make_batch([(9, 5, 8)])
    batch["input_ids"][1, 3] = batch["input_ids"][0, 3] % (VOCABULARY - 1) + 1
    check_equal(build(FAMILIES["llama"]), batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    assert pack_pairs(batch["input_ids"], labels).groups == [(2, (5 + 6, 8 + 6))]


@pytest.mark.parametrize("change", ["another first token", "no scored token"])
def test_a_pair_without_a_layout_is_refused(change):
    batch = make_batch([(9, 5, 8)])
    if change == "another first token":
        batch["input_ids"][1, 0] = batch["input_ids"][0, 0] % (VOCABULARY - 1) + 1
    else:
        batch["completion_mask"][0] = 0
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with pytest.raises(ValueError, match="begin differently, or one has no scored token"):
        pack_pairs(batch["input_ids"], labels)


def test_offsets_for_flash_attention_give_each_branch_its_prompt():
    packed = pack_pairs(
        *(lambda b: (b["input_ids"], b["input_ids"].masked_fill(b["completion_mask"] == 0, -100)))(
            make_batch([(3, 2, 1), (2, 1, 2)])
        )
    )
    assert packed.queries_at.tolist() == [0, 4, 5, 7, 9]
    assert packed.keys_at.tolist() == [0, 4, 7, 9, 12]
    assert packed.order.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8]


def draw_states(packed, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Query of four heads, key and value of two, each `(1, heads, tokens, 16)`."""
    torch.manual_seed(2)
    tokens = packed.input_ids.shape[1]
    return [torch.randn(1, heads, tokens, 16).to(device, dtype) for heads in (4, 2, 2)]


def pack(batch) -> shared_prefix.Packed:
    return pack_pairs(batch["input_ids"], batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100))


@pytest.mark.parametrize("make", [make_batch, make_masked_batch])
def test_offsets_give_flash_attention_what_each_pair_attends_to(make, monkeypatch):
    packed = pack(make())
    states = draw_states(packed, torch.float32, "cpu")
    pair_by_pair, _ = attend(torch.nn.Module(), *states, None, packed=packed)
    monkeypatch.setattr(shared_prefix, "_find_flash_dtype", lambda query: query.dtype)
    monkeypatch.setattr(shared_prefix, "varlen_attn", attend_plainly)
    at_once, _ = attend(torch.nn.Module(), *states, None, packed=packed)
    torch.testing.assert_close(at_once, pair_by_pair, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLASH, reason="this torch has no flash attention for rows of several pairs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention_ends_its_causal_mask_at_the_last_key(dtype, monkeypatch):
    packed = pack(make_batch()).map(lambda tensor: tensor.cuda())
    states = draw_states(packed, dtype, "cuda")
    states = [tensor.requires_grad_() for tensor in states]
    results = []
    for kernel in (shared_prefix.varlen_attn, attend_plainly):
        monkeypatch.setattr(shared_prefix, "varlen_attn", kernel)
        result, _ = attend(torch.nn.Module(), *states, None, packed=packed)
        results.append((result, *torch.autograd.grad(result.float().square().sum(), states)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLASH, reason="this torch has no flash attention for rows of several pairs")
@pytest.mark.parametrize("make", [make_batch, make_masked_batch])
def test_under_autocast_flash_attention_equals_sdpa_in_fp32(make, monkeypatch):
    packed = pack(make()).map(lambda tensor: tensor.cuda())
    states = [tensor.requires_grad_() for tensor in draw_states(packed, torch.float32, "cuda")]
    calls = []
    kernel = shared_prefix.varlen_attn
    monkeypatch.setattr(shared_prefix, "varlen_attn", lambda *a, **n: calls.append(a[0].dtype) or kernel(*a, **n))
    results = []
    for autocast in (True, False):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            result, _ = attend(torch.nn.Module(), *states, None, packed=packed)
        results.append((result.float(), *torch.autograd.grad(result.float().square().sum(), states)))
    assert calls == [torch.bfloat16], "autocast alone uses flash attention"
    for fast, exact in zip(*results, strict=True):
        assert (fast - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.pinned("torch")
def test_the_pinned_torch_has_flash_attention_for_all_pairs():
    assert HAS_FLASH


def test_a_model_cannot_pack_its_batches_twice():
    model = build(FAMILIES["llama"])
    share_prefix(model)
    with pytest.raises(ValueError, match="packs batches already"):
        share_prefix(model)


def test_generation_does_not_change():
    model = build(FAMILIES["llama"]).eval()
    prompt = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **settings)
    share_prefix(model)
    assert torch.equal(model.generate(prompt, **settings), before)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**GROUPED, sliding_window=16), "sliding window of 16 tokens"),
        (GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4), "dropout is on"),
        (LlamaConfig(**GROUPED, attn_implementation="eager"), "attn_implementation is eager"),
    ],
)
def test_models_that_cannot_be_packed_are_recognised(config, reason):
    assert reason in find_obstacle(AutoModelForCausalLM.from_config(config), longest=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tested_families_have_no_obstacle(family):
    assert find_obstacle(build(FAMILIES[family]), longest=64) is None


def test_attention_that_ignores_the_layout_is_a_mismatch(monkeypatch):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from dpokit.model import shared_prefix

    model, batch = build(FAMILIES["llama"]), make_batch()
    shared = share_prefix(model)
    assert prove(model, shared, batch) == Proof(None, 0.0)

    def plain(module, query, key, value, _, packed=None, **kwargs):
        if packed is not None:
            packed.attended.layers.add(id(module))
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(shared_prefix.AttentionInterface._global_mapping, shared_prefix.NAME, plain)
    assert prove(model, shared, batch).mismatch.endswith("nats a token from those of padded rows, both in fp32")


def test_a_kernel_error_is_a_mismatch_unless_memory_ran_out(monkeypatch):
    from dpokit.model import shared_prefix

    model, batch = build(FAMILIES["llama"]), make_batch()
    shared = share_prefix(model)
    kernel = shared_prefix.AttentionInterface._global_mapping[shared_prefix.NAME]

    def refuse(*arguments, packed=None, **named):
        if packed is not None:
            raise error
        return kernel(*arguments, packed=packed, **named)

    monkeypatch.setitem(shared_prefix.AttentionInterface._global_mapping, shared_prefix.NAME, refuse)
    error = RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    assert prove(model, shared, batch).mismatch == f"its forward does not accept a packed batch ({error})"
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        prove(model, shared, batch)
