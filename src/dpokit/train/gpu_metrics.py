"""Power, memory and utilisation of rank 0's GPU, added to each log of training steps."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig

from dpokit.console import say

EVERY_SECONDS = 1.0
PEAKS = {"gpu_memory_gib"}  # logged as a maximum; all others as a mean


def read_gpu(device: torch.device) -> dict[str, float]:
    """Watts, GiB in use by all processes, and percent of time in use, as `nvidia-smi` or `amd-smi` shows them.

    Raises: NVML's errors: it is not installed, there is no driver, or the device does not report the number.
    """
    return {
        "gpu_power_watts": torch.cuda.power_draw(device) / 1000,
        "gpu_memory_gib": torch.cuda.device_memory_used(device) / 2**30,
        "gpu_utilisation_percent": float(torch.cuda.utilization(device)),
    }


class Sampler:
    """Reads numbers every second, in a thread of its own, until `stop` or the first reading that fails."""

    def __init__(self, read: Callable[[], Mapping[str, float]], *, every_seconds: float = EVERY_SECONDS) -> None:
        self._read = read
        self._every_seconds = every_seconds
        self._readings: defaultdict[str, list[float]] = defaultdict(list)
        self._ended = Event()
        self._thread = Thread(target=self._sample, name="gpu", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(self._every_seconds):
            try:
                reading = self._read()
            except Exception:  # a driver that is reset raises many kinds; training goes on without these numbers
                return
            for name, value in reading.items():
                self._readings[name].append(value)

    def take(self) -> dict[str, float]:
        """The mean, or the maximum, of each number since the last call; empty if nothing was read since."""
        readings, self._readings = self._readings, defaultdict(list)
        return {
            name: max(values) if name in PEAKS else sum(values) / len(values) for name, values in list(readings.items())
        }

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


class GpuCallback(TrainerCallback):
    """Adds the GPU's numbers to each log of training steps; does nothing without a GPU."""

    def __init__(self) -> None:
        self.sampler: Sampler | None = None

    def on_train_begin(self, args: DPOConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        device = args.device
        if device.type != "cuda" or not state.is_world_process_zero:
            return
        try:
            read_gpu(device)
        except Exception as error:  # NVML has a class for each reason
            say(f"the GPU's power, memory and use are not logged: {error}")
            return
        self.sampler = Sampler(lambda: read_gpu(device))

    def on_log(
        self,
        args: DPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.sampler is not None and logs and "loss" in logs:
            logs.update(self.sampler.take())

    def on_train_end(self, args: DPOConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.sampler is not None:
            self.sampler.stop()
            self.sampler = None
