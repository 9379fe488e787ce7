"""Who holds which share: by hand for 8B parameters on 8 devices."""

from dataclasses import replace
from functools import partial

import pytest
from planning import ask

from dpokit.plan.blueprint import Blueprint
from dpokit.plan.placements import CONTEXT_GIB, FSDP2, NCCL_GIB, Model, list_rooms
from dpokit.plan.target import GIB, Target
from dpokit.plan.trace import Traced

P = 8_000_000_000
STEP = (3_000_000_000, 1_000_000_000)


@pytest.fixture
def asked(tmp_path):
    return partial(ask, tmp_path)


def traced(size: int, *, states: int) -> Traced:
    held = {"weights": size * P, "reference": size * P, "trained": size * P, "states": states * P}
    return Traced(**held, peak=0, at_peak={}, moments={0: STEP, 2 * P: (10**9, 0)})


@pytest.fixture
def model() -> Model:
    """8B parameters, all trained, weights in bf16, a live reference."""
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
def rooms(model, asked):
    settings = asked("dpo_8b", "8x80", "--precompute_ref_log_probs", "false").settings
    return lambda target: {room.placement: room for room in list_rooms(model, settings, target)}


def test_zero_and_fsdp_shard_as_their_papers_say(rooms):
    found = rooms(Target("GPU", 8, 80.0, None, "test"))
    assert list(found) == ["one device", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "ZeRO-3 + CPU offload"]
    zero2, zero3, fsdp2 = (found[name].parts for name in ("ZeRO-2", "ZeRO-3", "FSDP2"))
    # arXiv 1910.02054: 2P whole, gradients and states (fp32 weight, two moments) over all devices.
    assert zero2["weights"] == 2 * P
    assert zero2["gradients"] == zero3["gradients"] == 6 * P // 8
    assert zero2["optimizer"] == zero3["optimizer"] == 12 * P // 8
    assert zero2["reference"] == 2 * P
    assert zero3["weights"] == zero3["reference"] == 2 * P // 8
    # fp32 weight, gradient and moments, all sharded.
    assert (fsdp2["weights"], fsdp2["gradients"], fsdp2["optimizer"]) == (4 * P // 8, 4 * P // 8, 8 * P // 8)
    for parts in (zero2, zero3, fsdp2):
        assert (parts["activations"], parts["logits"]) == STEP


def test_on_whole_devices_the_peak_is_the_worst_moment_of_gradients_and_activations(rooms):
    found = rooms(Target("GPU", 8, 80.0, None, "test"))
    one, ddp = found["one device"].parts, found["DDP"].parts
    assert (one["weights"], one["optimizer"], one["reference"]) == (2 * P, 4 * P, 2 * P)
    assert (one["gradients"], one["activations"]) == (2 * P, 10**9)
    assert one["other"] == round(CONTEXT_GIB * GIB + 0.05 * 10**9)
    assert ddp["other"] - one["other"] == round(NCCL_GIB * GIB) + 2 * P  # NCCL and DDP's buckets


def test_offload_moves_states_to_the_host(rooms):
    room = rooms(Target("GPU", 8, 80.0, None, "test"))["ZeRO-3 + CPU offload"]
    assert room.parts["weights"] == room.parts["optimizer"] == room.parts["gradients"] == 0
    assert room.host == pytest.approx(1.5 * (2 + 6 + 12 + 2) * P, rel=1e-6)


def test_a_placement_fits_when_its_total_does(rooms):
    total = rooms(Target("GPU", 8, 80.0, None, "test"))["ZeRO-3"].total / GIB
    assert rooms(Target("GPU", 8, total + 0.01, None, "test"))["ZeRO-3"].fits
    assert not rooms(Target("GPU", 8, total - 0.01, None, "test"))["ZeRO-3"].fits


def test_offload_needs_a_host_with_room(rooms):
    name = "ZeRO-3 + CPU offload"
    assert rooms(Target("GPU", 8, 80.0, 500.0, "test"))[name].fits
    assert not rooms(Target("GPU", 8, 80.0, 100.0, "test"))[name].fits


def test_one_gpu_has_no_one_to_share_with(rooms):
    assert list(rooms(Target("GPU", 1, 80.0, None, "test"))) == ["one device", "ZeRO-3 + CPU offload"]


def test_more_devices_need_less_each(rooms):
    of_4, of_16 = (rooms(Target("GPU", count, 80.0, None, "test")) for count in (4, 16))
    assert of_4["ZeRO-3"].total > of_16["ZeRO-3"].total
    assert of_4["DDP"].total == of_16["DDP"].total


def test_what_a_run_would_refuse_does_not_fit_and_says_why(model, asked):
    settings = asked("dpo_8b", "8x80").settings  # precomputes the reference
    rooms = {room.placement: room for room in list_rooms(model, settings, Target("GPU", 8, 1e6, None, "test"))}
    assert "precompute_ref_log_probs" in rooms[FSDP2].refused
    assert not rooms[FSDP2].fits
    assert rooms["ZeRO-3"].fits


def test_quantised_weights_stay_whole_under_fsdp2(model, asked):
    settings = asked("dpo_8b", "8x80", "--precompute_ref_log_probs", "false").settings
    blueprint = replace(model.blueprint, trained_parameters=P // 100)
    held = replace(model.whole, trained=2 * P // 100)
    quantised = replace(model, blueprint=blueprint, whole=held, sharded=held, quantised=True)
    rooms = {room.placement: room for room in list_rooms(quantised, settings, Target("GPU", 8, 80.0, None, "test"))}
    assert rooms[FSDP2].parts["weights"] == 2 * P - 2 * P // 100 + 4 * P // 100 // 8
