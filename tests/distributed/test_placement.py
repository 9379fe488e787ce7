"""The requested placement, the placement in force, and refused ones; for real launches see test_placements."""

import pytest
import torch
from torch import nn
from trl import DPOConfig, ModelConfig

from dpokit.distributed.placement import check_placement, find_placement, find_requested_placement
from dpokit.errors import SettingsError


@pytest.fixture
def training(tmp_path) -> DPOConfig:
    return DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)


@pytest.fixture
def ask(training, monkeypatch):
    """The arguments of a run whose launcher requests a placement by its environment."""

    def ask_for(placement: str) -> DPOConfig:
        if placement.startswith("FSDP"):
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
            monkeypatch.setenv("FSDP_VERSION", placement[-1])
        if placement.startswith("ZeRO"):
            from accelerate.utils import DeepSpeedPlugin

            offload = "cpu" if "offload" in placement else "none"
            training.deepspeed_plugin = DeepSpeedPlugin(
                zero_stage=int(placement[5]), offload_optimizer_device=offload, offload_param_device=offload
            )
        return training

    return ask_for


@pytest.mark.parametrize("placement", ["one device", "ZeRO-2", "ZeRO-3", "ZeRO-3 + CPU offload", "FSDP1", "FSDP2"])
def test_the_requested_placement_is_read(placement, ask):
    assert find_requested_placement(ask(placement)) == placement


def test_a_data_parallel_model_is_not_on_one_device():
    assert find_placement(nn.Linear(2, 2)) == "one device"
    assert find_placement(nn.DataParallel(nn.Linear(2, 2))) == "DataParallel"


EIGHT_BIT = ModelConfig(use_peft=True, load_in_8bit=True)
FOUR_BIT = ModelConfig(use_peft=True, load_in_4bit=True)


@pytest.mark.parametrize(
    ("placement", "flags", "model", "seen", "do"),
    [
        ("FSDP1", {}, ModelConfig(), "retired", "FSDP2"),
        ("FSDP2", {}, EIGHT_BIT, "cannot be sharded", "--load_in_4bit"),
        ("ZeRO-2", {}, EIGHT_BIT, "not read back", "--load_in_4bit"),
        ("ZeRO-3", {}, EIGHT_BIT, "not read back", "DDP"),
        ("FSDP2", {"optim": "paged_adamw_8bit"}, FOUR_BIT, "--optim paged_adamw_8bit", "--optim adamw_torch"),
        ("FSDP2", {"optim": "adamw_bnb_8bit"}, ModelConfig(), "--optim adamw_bnb_8bit", "ZeRO-2"),
        ("FSDP2", {"precompute_ref_log_probs": True, "use_cpu": False}, ModelConfig(), "before the model", "ZeRO-3"),
        ("ZeRO-3", {"precompute_ref_log_probs": True}, FOUR_BIT, "loses track", "ZeRO-2"),
    ],
)
def test_a_combination_that_fails_is_refused_with_a_remedy(placement, flags, model, seen, do, ask):
    training = ask(placement)
    for name, value in flags.items():
        setattr(training, name, value)
    with pytest.raises(SettingsError, match=f"does not work under {placement}: .*{seen}") as error:
        check_placement(training, model)
    assert do in error.value.do


@pytest.mark.parametrize(
    ("placement", "flags", "model"),
    [
        ("one device", {"optim": "paged_adamw_8bit"}, EIGHT_BIT),
        ("ZeRO-2", {"optim": "paged_adamw_8bit"}, FOUR_BIT),
        ("ZeRO-3", {"precompute_ref_log_probs": True, "use_cpu": False}, ModelConfig()),
        ("FSDP2", {}, FOUR_BIT),
        ("FSDP2", {"precompute_ref_log_probs": True}, ModelConfig()),
    ],
)
def test_a_combination_that_works_passes(placement, flags, model, ask):
    training = ask(placement)
    for name, value in flags.items():
        setattr(training, name, value)
    check_placement(training, model)


def test_one_process_that_sees_several_gpus_takes_one(monkeypatch, tmp_path):
    from dpokit.settings.load import load_settings

    monkeypatch.setattr(DPOConfig, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 4) or 4))
    settings = load_settings("dpo_test", {"output_dir": str(tmp_path)}, ["--use_cpu"])
    assert settings.training._n_gpu == 1
    assert torch.cuda.device_count() <= 1 or settings.training.n_gpu == 1
