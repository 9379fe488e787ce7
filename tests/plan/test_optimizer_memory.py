"""Bytes of optimizer states, by the optimizer's name."""

import pytest
import torch

from dpokit.plan.optimizer_memory import count_state_bytes


@pytest.mark.parametrize(
    ("optim", "dtype", "bytes_a_number"),
    [
        ("adamw_torch_fused", torch.float32, 8),
        ("adamw_torch", torch.bfloat16, 4),
        ("paged_adamw_32bit", torch.bfloat16, 8),
        ("adamw_8bit", torch.float32, 2 + 2 * 4 / 256),
        ("paged_adamw_8bit", torch.bfloat16, 2 + 2 * 4 / 256),
        ("lion_8bit", torch.float32, 1 + 4 / 256),
        ("lion_32bit", torch.float32, 4),
        ("sgd", torch.float32, 0),
        ("adafactor", torch.float32, 0),
    ],
)
def test_an_optimizer_has_these_bytes_of_state_per_number(optim, dtype, bytes_a_number):
    weight = torch.empty(1024, 1024, dtype=dtype, device="meta")
    assert count_state_bytes(optim, weight) / weight.numel() == bytes_a_number


def test_the_count_equals_the_states_of_adamw_in_torch():
    weight = torch.nn.Parameter(torch.ones(300, 20))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[weight].values() if t.ndim > 0)
    assert count_state_bytes("adamw_torch", weight) == held


def test_small_tensors_stay_in_32_bit_under_an_8_bit_optimizer():
    assert count_state_bytes("adamw_8bit", torch.empty(768, device="meta")) == 2 * 4 * 768
