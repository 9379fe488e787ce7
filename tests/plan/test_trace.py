"""The ledger counts tensors of known size; a traced step has the weights, gradients and states of the model."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from planning import build_request, write_llama_8b

from dpokit.plan.blueprint import (
    build_blueprint,
    fill_with_fakes,
    list_tensors,
    load_config,
    one_block_of_each_kind,
)
from dpokit.plan.memory_ledger import Ledger
from dpokit.plan.trace import Shape, trace_step


@pytest.fixture
def make_request(tmp_path):
    return partial(build_request, tmp_path)


@pytest.fixture
def llama_8b(tmp_path, plain_tokenizer):
    return write_llama_8b(tmp_path / "llama_8b", plain_tokenizer)


def test_the_ledger_counts_the_live_tensors():
    ledger = Ledger()
    with ledger:
        a = torch.ones(1000)
        b = a * 2
        del a
        c = b.view(10, 100)  # the same storage
        del b
        d = c.to(torch.float64)
    assert ledger.peak_bytes == 4000 + 8000
    assert sum(ledger.by_kind.values()) == 12000
    del c, d
    assert sum(ledger.by_kind.values()) == 0


def test_the_ledger_separates_kinds():
    ledger = Ledger()
    weight = torch.ones(10)
    ledger.hold(weight, "weights")
    with ledger:
        ledger.kind = "logits"
        tensor = weight + 1
    ledger.relabel(tensor, "gradients")
    assert {kind: size for kind, size in ledger.by_kind.items() if size} == {"weights": 40, "gradients": 40}


@pytest.mark.parametrize("flags", [[], ["--use_peft"], ["--gradient_checkpointing"], ["--precompute_ref_log_probs"]])
def test_weights_gradients_and_states_are_those_of_the_model(flags, make_request, tiny_gpt2):
    settings = make_request("dpo_gpt2", None, "--model_name_or_path", str(tiny_gpt2), "--use_cpu", *flags).settings
    blueprint = build_blueprint(settings, load_config(settings))
    shape = Shape(2, 64, 200)
    traced = trace_step(blueprint, settings, train=shape, evaluation=None, autocast=None, on_gpu=False)
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    numbers = sum(p.numel() for p in real.parameters())
    adapter = blueprint.adapter_parameters
    buffers = sum(b.numel() * b.element_size() for b in real.buffers())
    assert blueprint.parameters == numbers
    assert traced.weights == 4 * (numbers + adapter) + buffers
    assert traced.trained == 4 * (adapter or numbers)
    assert traced.states == 2 * traced.trained
    assert traced.reference == (0 if flags in (["--use_peft"], ["--precompute_ref_log_probs"]) else traced.weights)


def test_gradient_checkpointing_and_fewer_pairs_lower_the_peak(make_request, tiny_gpt2):
    def peak(pairs: int, *flags: str) -> int:
        settings = make_request("dpo_gpt2", None, "--model_name_or_path", str(tiny_gpt2), "--use_cpu", *flags).settings
        blueprint = build_blueprint(settings, load_config(settings))
        shape = Shape(pairs, 200, 300)
        return trace_step(blueprint, settings, train=shape, evaluation=None, autocast=None, on_gpu=False).peak

    assert peak(1) < peak(4)
    settings = make_request("dpo_gpt2", "24", "--model_name_or_path", str(tiny_gpt2), "--bf16", "false").settings
    kept, recomputed = (
        trace_step(
            build_blueprint(variant, load_config(variant)),
            variant,
            train=Shape(4, 200, 1600),
            evaluation=None,
            autocast=None,
            on_gpu=True,
        )
        for variant in (settings, replace(settings, training=_with_checkpointing(settings.training)))
    )
    recomputed, kept = (max(activations for activations, _ in traced.moments.values()) for traced in (recomputed, kept))
    assert recomputed < 0.8 * kept


def _with_checkpointing(training):
    import copy

    training = copy.copy(training)
    training.gradient_checkpointing = True
    return training


def test_fewer_answer_tokens_make_a_smaller_head_on_a_gpu(make_request, tiny_gpt2):
    settings = make_request("dpo_gpt2", "24", "--model_name_or_path", str(tiny_gpt2)).settings

    def logits(answer_tokens: int) -> int:
        blueprint = build_blueprint(settings, load_config(settings))
        shape = Shape(4, 200, answer_tokens)
        traced = trace_step(blueprint, settings, train=shape, evaluation=None, autocast=torch.bfloat16, on_gpu=True)
        return traced.at_peak["logits"]

    assert logits(1000) - logits(500) >= 500 * 32768 * 2  # a row of a tile has 32,768 numbers in bf16


def test_4_bit_weights_of_8b_take_the_bytes_of_the_paper(make_request, llama_8b):
    pytest.importorskip("bitsandbytes")
    from torch._subclasses.fake_tensor import FakeTensorMode

    settings = make_request("dpo_qlora", "24", "--model_name_or_path", str(llama_8b)).settings
    blueprint = build_blueprint(settings, load_config(settings))
    assert blueprint.parameters == 8_030_261_248
    assert blueprint.adapter_parameters == 41_943_040
    with FakeTensorMode():
        fill_with_fakes(blueprint.policy, settings)
        held = sum(t.numel() * t.element_size() for t in list_tensors(blueprint.policy))
    head_and_embedding, norms = 2 * 128256 * 4096, 65 * 4096
    linear = blueprint.parameters - head_and_embedding - norms
    # arXiv 2305.14314: 4 bits per number and 0.127 for the scales; the adapter in 16 bit.
    expected = linear * (4 + 0.127) / 8 + 2 * (head_and_embedding + norms + blueprint.adapter_parameters)
    assert held == pytest.approx(expected, rel=1e-3)


def test_an_8b_model_is_built_without_its_weights(make_request, llama_8b):
    import psutil

    settings = make_request("dpo_8b", "8x80", "--model_name_or_path", str(llama_8b)).settings
    before = psutil.Process().memory_info().rss
    blueprint = build_blueprint(settings, load_config(settings))
    assert all(p.is_meta for p in blueprint.policy.parameters())
    assert blueprint.head_parameters == 128256 * 4096
    assert blueprint.block_parameters == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert psutil.Process().memory_info().rss - before < 2**29


@pytest.fixture
def settings_of_four_layers(tmp_path, plain_tokenizer, make_request):
    """Settings of a GPU plan for a model whose third layer has another attention than the others."""
    from transformers import Qwen2Config

    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    Qwen2Config(**size, vocab_size=200, num_hidden_layers=4, layer_types=kinds).save_pretrained(tmp_path / "model")
    plain_tokenizer.save_pretrained(tmp_path / "model")
    return make_request("dpo_gpt2", "24", "--model_name_or_path", str(tmp_path / "model")).settings


def test_a_pass_without_gradients_has_one_block_of_each_kind(settings_of_four_layers):
    policy = build_blueprint(settings_of_four_layers, load_config(settings_of_four_layers)).policy
    layers = list(policy.model.layers)
    with one_block_of_each_kind(policy):
        assert list(policy.model.layers) == layers[:3]  # down to the first with sliding attention
    assert list(policy.model.layers) == layers


@pytest.mark.parametrize(("autocast", "evaluated"), [(None, 3), (torch.bfloat16, 4)])
def test_a_trace_runs_each_block_with_gradients_once(autocast, evaluated, settings_of_four_layers):
    blueprint = build_blueprint(settings_of_four_layers, load_config(settings_of_four_layers))
    passes = {}
    for name in ("policy", "reference"):
        passes[name] = counts = []
        for layer in getattr(blueprint, name).model.layers:
            layer.register_forward_hook(lambda *_, counts=counts: counts.append(torch.is_grad_enabled()))
    shape = Shape(1, 64, 20, ((30, 20, 10),))
    trace_step(blueprint, settings_of_four_layers, train=shape, evaluation=shape, autocast=autocast, on_gpu=True)
    assert passes["policy"] == [True] * 4 + [False] * evaluated
    assert passes["reference"] == [False] * 2 * 3  # beside the step and the evaluation
