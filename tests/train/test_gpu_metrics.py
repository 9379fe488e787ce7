"""The GPU's numbers in a log."""

import itertools
import time

import pynvml
import pytest
import torch

from dpokit.train.gpu_metrics import Sampler, read_gpu


def wait_for(holds) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_log_has_the_mean_power_and_the_maximum_of_memory():
    watts, memory = iter([100.0, 300.0]), iter([3.0, 2.0])
    sampler = Sampler(lambda: {"gpu_power_watts": next(watts), "gpu_memory_gib": next(memory)}, every_seconds=0.01)
    wait_for(lambda: not sampler._thread.is_alive())  # the third reading failed
    assert sampler.take() == {"gpu_power_watts": 200.0, "gpu_memory_gib": 3.0}
    assert sampler.take() == {}
    sampler.stop()


def test_each_log_has_only_the_readings_since_the_last():
    counter = itertools.count()
    sampler = Sampler(lambda: {"gpu_power_watts": float(next(counter))}, every_seconds=0.005)
    wait_for(lambda: next(counter) > 10)
    first = sampler.take()["gpu_power_watts"]
    count = next(counter)
    wait_for(lambda: next(counter) > count + 10)
    sampler.stop()
    assert sampler.take()["gpu_power_watts"] > max(first, count)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_reading_raises_an_error():
    with pytest.raises(pynvml.NVMLError):
        read_gpu(torch.device("cuda:0"))


@pytest.mark.gpu
def test_a_gpu_draws_power_and_holds_memory():
    held = torch.zeros(2**28, device="cuda")
    reading = read_gpu(torch.device("cuda:0"))
    assert reading["gpu_power_watts"] > 1
    assert reading["gpu_memory_gib"] > held.nbytes / 2**30
    assert 0 <= reading["gpu_utilisation_percent"] <= 100
