"""Devices: the values of `--gpus`, and this machine's own."""

import pytest

from dpokit.errors import SettingsError
from dpokit.plan.devices import find_target, parse_gpus


@pytest.mark.parametrize(
    ("text", "count", "memory"), [("8x80", 8, 80.0), ("80", 1, 80.0), ("1x24", 1, 24.0), ("4 X 79.2", 4, 79.2)]
)
def test_gpus_are_read_as_a_count_and_the_memory_of_each(text, count, memory):
    devices = parse_gpus(text)
    assert (devices.kind, devices.count, devices.memory_gib) == ("GPU", count, memory)


@pytest.mark.parametrize("text", ["", "x80", "8x", "0x80", "8x0", "-8x80", "8x80GB", "8*80", "eight", "8x80x2"])
def test_a_wrong_gpus_flag_is_refused_in_one_message(text):
    with pytest.raises(SettingsError, match="is not a number of GPUs") as caught:
        parse_gpus(text)
    assert "8x80" in caught.value.do


def test_without_a_gpu_the_plan_is_for_this_machine():
    devices = find_target(on_cpu=True)
    assert devices.kind == "CPU"
    assert devices.host_gib == devices.memory_gib > 0
