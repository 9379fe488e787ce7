"""The share of each device, computed by hand for 8B parameters on 8 devices."""

from dataclasses import replace
from functools import partial

import pytest
from planning import build_request

from dpokit.plan.blueprint import Blueprint
from dpokit.plan.devices import GIB, Devices
from dpokit.plan.placements import CONTEXT_GIB, FSDP2, NCCL_GIB, Model, list_estimates
from dpokit.plan.trace import StepMemory

P = 8_000_000_000
STEP = (3_000_000_000, 1_000_000_000)


@pytest.fixture
def make_request(tmp_path):
    return partial(build_request, tmp_path)


def traced(size: int, *, states: int) -> StepMemory:
    parts = {"weights": size * P, "reference": size * P, "trained": size * P, "states": states * P}
    return StepMemory(**parts, peak=0, at_peak={}, moments={0: STEP, 2 * P: (10**9, 0)})


@pytest.fixture
def model() -> Model:
    """8B trained parameters in bf16, with a reference in memory."""
    blueprint = Blueprint(
        policy=None,
        reference=None,
        parameters=P,
        adapter_parameters=0,
        trained_parameters=P,
        block_parameters=200_000_000,
        head_parameters=500_000_000,
    )
    both = traced(2, states=4)
    return Model(blueprint, both, both, quantised=False, compute_bytes=2, optim="adamw_torch_fused")


@pytest.fixture
def estimates(model, make_request):
    settings = make_request("dpo_8b", "8x80", "--precompute_ref_log_probs", "false").settings
    return lambda devices: {estimate.placement: estimate for estimate in list_estimates(model, settings, devices)}


def test_zero_and_fsdp_shard_as_in_their_papers(estimates):
    by_name = estimates(Devices("GPU", 8, 80.0, None, "test"))
    assert list(by_name) == ["one device", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "ZeRO-3 + CPU offload"]
    zero2, zero3, fsdp2 = (by_name[name].parts for name in ("ZeRO-2", "ZeRO-3", "FSDP2"))
    # arXiv 1910.02054: 2P whole; gradients and states (fp32 weight, two moments) sharded over all devices.
    assert zero2["weights"] == 2 * P
    assert zero2["gradients"] == zero3["gradients"] == 6 * P // 8
    assert zero2["optimizer"] == zero3["optimizer"] == 12 * P // 8
    assert zero2["reference"] == 2 * P
    assert zero3["weights"] == zero3["reference"] == 2 * P // 8
    # fp32 weight, gradient and moments are all sharded.
    assert (fsdp2["weights"], fsdp2["gradients"], fsdp2["optimizer"]) == (4 * P // 8, 4 * P // 8, 8 * P // 8)
    for parts in (zero2, zero3, fsdp2):
        assert (parts["activations"], parts["logits"]) == STEP


def test_unsharded_the_peak_is_the_worst_moment_of_the_step(estimates):
    by_name = estimates(Devices("GPU", 8, 80.0, None, "test"))
    one, ddp = by_name["one device"].parts, by_name["DDP"].parts
    assert (one["weights"], one["optimizer"], one["reference"]) == (2 * P, 4 * P, 2 * P)
    assert (one["gradients"], one["activations"]) == (2 * P, 10**9)
    assert one["other"] == round(CONTEXT_GIB * GIB + 0.05 * 10**9)
    assert ddp["other"] - one["other"] == round(NCCL_GIB * GIB) + 2 * P  # NCCL and DDP's buckets


def test_offload_moves_states_to_the_host(estimates):
    estimate = estimates(Devices("GPU", 8, 80.0, None, "test"))["ZeRO-3 + CPU offload"]
    assert estimate.parts["weights"] == estimate.parts["optimizer"] == estimate.parts["gradients"] == 0
    assert estimate.host == pytest.approx(1.5 * (2 + 6 + 12 + 2) * P, rel=1e-6)


def test_a_placement_fits_when_its_total_does(estimates):
    total = estimates(Devices("GPU", 8, 80.0, None, "test"))["ZeRO-3"].total / GIB
    assert estimates(Devices("GPU", 8, total + 0.01, None, "test"))["ZeRO-3"].fits
    assert not estimates(Devices("GPU", 8, total - 0.01, None, "test"))["ZeRO-3"].fits


def test_offload_needs_a_host_with_enough_memory(estimates):
    name = "ZeRO-3 + CPU offload"
    assert estimates(Devices("GPU", 8, 80.0, 500.0, "test"))[name].fits
    assert not estimates(Devices("GPU", 8, 80.0, 100.0, "test"))[name].fits


def test_one_gpu_has_only_one_device_and_offload(estimates):
    assert list(estimates(Devices("GPU", 1, 80.0, None, "test"))) == ["one device", "ZeRO-3 + CPU offload"]


def test_more_devices_need_less_each(estimates):
    of_4, of_16 = (estimates(Devices("GPU", count, 80.0, None, "test")) for count in (4, 16))
    assert of_4["ZeRO-3"].total > of_16["ZeRO-3"].total
    assert of_4["DDP"].total == of_16["DDP"].total


def test_a_refused_placement_does_not_fit_and_has_a_reason(model, make_request):
    settings = make_request("dpo_8b", "8x80").settings  # precomputes the reference
    estimates = {
        estimate.placement: estimate
        for estimate in list_estimates(model, settings, Devices("GPU", 8, 1e6, None, "test"))
    }
    assert "precompute_ref_log_probs" in estimates[FSDP2].refused
    assert not estimates[FSDP2].fits
    assert estimates["ZeRO-3"].fits


def test_quantised_weights_stay_whole_under_fsdp2(model, make_request):
    settings = make_request("dpo_8b", "8x80", "--precompute_ref_log_probs", "false").settings
    blueprint = replace(model.blueprint, trained_parameters=P // 100)
    traced_step = replace(model.whole, trained=2 * P // 100)
    quantised = replace(model, blueprint=blueprint, whole=traced_step, sharded=traced_step, quantised=True)
    estimates = {
        estimate.placement: estimate
        for estimate in list_estimates(quantised, settings, Devices("GPU", 8, 80.0, None, "test"))
    }
    assert estimates[FSDP2].parts["weights"] == 2 * P - 2 * P // 100 + 4 * P // 100 // 8
