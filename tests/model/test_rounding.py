"""Correct packed rows pass in every precision, although they round, and each planted fault is found."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from planted_faults import FAULTS, FAULTS_OF_GROUPS, change_rope, planted, scale_weights
from test_answer_groups import make_batch as make_groups
from test_shared_prefix import make_batch
from transformers import GPT2Config, LlamaConfig
from transformers.models.auto import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from dpokit.model.rounding import computes_in_fp32, find_fp32_obstacle, is_refusal
from dpokit.model.score import (
    LARGEST_IN_FP32,
    ROUNDING_16_BIT,
    PairScorer,
    Proof,
    find_distance,
    prove,
    score_in_fp32,
    score_tokens,
    share_prefix,
)

LONG = [(9, 15, 18), (14, 12, 9), (3, 20, 4)]
# Weights large enough that a pretrained model's log-probs are imitated: they depend on every token.
SIZE = {"vocab_size": 120, "initializer_range": 0.2}
CONFIGS = {
    "llama": LlamaConfig(
        **SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": GPT2Config(**SIZE, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(family: str, dtype: str, *, lora: bool):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).to(DTYPES[dtype])
    add_fused_lm_head(model)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_correct_packed_rows_pass_in_every_precision(family, lora, dtype):
    model = build(family, dtype, lora=lora)
    shared = share_prefix(model)
    for seed in range(5):
        batch = make_batch(LONG, same_prefix=seed)
        proof = prove(model, shared, batch)
        assert proof.mismatch is None
        assert (proof.rounding < LARGEST_IN_FP32) == (dtype == "fp32")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_each_planted_fault_is_found_in_every_precision(family, fault, dtype):
    if family == "gpt2" and "rotary" in fault:
        pytest.skip("GPT-2 has learned positions")
    model = build(family, dtype, lora=fault == "another adapter")
    shared = share_prefix(model)
    with planted(fault, model):
        assert "both in fp32" in prove(model, shared, make_batch(LONG)).mismatch
    assert prove(model, shared, make_batch(LONG)).mismatch is None


@pytest.mark.parametrize("fault", FAULTS_OF_GROUPS)
@pytest.mark.parametrize("family", CONFIGS)
def test_each_fault_of_a_group_is_found_in_every_precision(family, fault, dtype):
    model, batch = build(family, dtype, lora=False), make_groups(["P adh bcg", "P dhi ceg", "Q a b"])
    shared = share_prefix(model)
    with planted(fault, model):
        assert "both in fp32" in prove(model, shared, batch).mismatch
    assert prove(model, shared, batch).mismatch is None


def test_an_evaluation_in_fp32_is_proved_without_more_passes(dtype):
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]}]
    model = build("llama", dtype, lora=True)
    scorer, passes = PairScorer(model, pad_id=0, longest=64), []
    model.get_base_model().base_model.register_forward_hook(lambda *_: passes.append(1))
    scorer(rows)
    assert len(passes) == (3 if dtype == "fp32" else 5)  # the last one scores


def test_lower_products_are_not_fp32():
    model, cpu = build("llama", "fp32", lora=False), torch.device("cpu")
    assert computes_in_fp32(model, cpu)
    assert not computes_in_fp32(model, torch.device("cuda"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not computes_in_fp32(model, cpu)
    products = torch.backends.mkldnn.matmul
    earlier = products.fp32_precision
    try:
        products.fp32_precision = "bf16"
        assert not computes_in_fp32(model, cpu)
    finally:
        products.fp32_precision = earlier


def test_half_precision_alone_would_not_find_a_small_fault():
    model, batch = build("llama", "bf16", lora=False), make_batch(LONG)
    scored = batch["completion_mask"][:, 1:]
    exact, rounded = score_in_fp32(model, batch), score_tokens(model, batch)
    scale_weights(model, share=0.001)
    changed = score_in_fp32(model, batch)
    assert LARGEST_IN_FP32 < find_distance(changed, exact, scored) < find_distance(rounded, exact, scored)


@pytest.mark.parametrize("kind", ["weights in bf16", "autocast"])
def test_fp32_equals_a_model_in_fp32(kind):
    batch = make_batch(LONG)
    model = build("llama", "fp32", lora=False)
    wide = score_tokens(model, batch)
    if kind == "autocast":
        forward = model.forward

        def with_autocast(*arguments, **named):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*arguments, **named)

        model.forward = with_autocast
    else:
        model = model.to(torch.bfloat16)
        wide = score_tokens(build("llama", "bf16", lora=False).float(), batch)
    with torch.no_grad():
        assert (score_tokens(model, batch) - wide).abs().max() > 1e-3
    torch.testing.assert_close(score_in_fp32(model, batch), wide, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tf32", ["legacy", "for all"])
def test_fp32_leaves_weights_and_settings_as_they_were(tf32):
    model = build("llama", "bf16", lora=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    product = torch.backends.cuda.matmul
    earlier = torch.backends.fp32_precision, product.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        if tf32 == "legacy":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.fp32_precision = "tf32"  # as transformers sets it for --tf32
        set_to = product.fp32_precision
        assert score_in_fp32(model, make_batch(LONG)) is not None
        assert product.fp32_precision == set_to
    finally:
        torch.backends.fp32_precision, product.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = earlier
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_that_refuses_fp32_is_compared_in_16_bits():
    model = build("llama", "bf16", lora=False)
    shared, batch = share_prefix(model), make_batch(LONG)

    def refuse(_, inputs):
        if inputs[0].dtype == torch.float32:
            raise RuntimeError("expected 16 bits")

    model.model.layers[0].mlp.register_forward_pre_hook(refuse)
    proof = prove(model, shared, batch)
    assert proof == Proof(None, ROUNDING_16_BIT)
    with planted("labels shifted by one", model):
        assert prove(model, shared, batch).mismatch.endswith("nats a token from those of padded rows")


@pytest.mark.parametrize(
    ("error", "refuses"),
    [
        (RuntimeError("expected scalar type Half"), True),
        (AssertionError(), True),
        (torch.OutOfMemoryError(), False),
        (torch.distributed.DistBackendError(), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), False),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_memory_and_communication_errors_are_no_refusals(error, refuses):
    assert is_refusal(error) == refuses


def test_a_compiled_model_runs_eagerly_in_fp32():
    model, batch = build("llama", "bf16", lora=False), make_batch(LONG)
    expected = score_in_fp32(model, batch)
    torch.testing.assert_close(score_in_fp32(torch.compile(model), batch), expected, rtol=0, atol=0)


def test_a_changed_rope_is_restored():
    model, batch = build("llama", "fp32", lora=False), make_batch(LONG)
    before = score_tokens(model, batch)
    change_rope(model)()
    assert torch.equal(score_tokens(model, batch), before)


class Linear8bitLt(torch.nn.Linear):
    """Has the name of bitsandbytes' layer."""


class Linear4bit(torch.nn.Linear):
    """Has the name of bitsandbytes' layer."""


def shard(model: torch.nn.Module) -> torch.nn.Module:
    model.weight.ds_id = 0  # as DeepSpeed marks a parameter of ZeRO-3
    return model


@pytest.mark.parametrize(
    ("model", "obstacle"),
    [
        (torch.nn.Linear(2, 2), None),
        (torch.nn.Linear(2, 2, dtype=torch.bfloat16), None),
        (Linear8bitLt(2, 2), "8-bit layers"),
        (Linear4bit(2, 2), None),
        (Linear4bit(2, 2, dtype=torch.bfloat16), "stored as 16-bit numbers"),
        (shard(torch.nn.Linear(2, 2)), None),
        (shard(torch.nn.Linear(2, 2, dtype=torch.bfloat16)), "sharded weights"),
    ],
)
def test_kernels_and_shards_of_16_bits_are_an_obstacle(model, obstacle):
    reason = find_fp32_obstacle(torch.nn.Sequential(model))
    assert (reason is None) == (obstacle is None)
    assert obstacle is None or obstacle in reason
