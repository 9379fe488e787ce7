"""What rank 0's GPU does while it trains, beside the other numbers of a log: power, memory, use."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig

from dpokit.console import say

EVERY_SECONDS = 1.0
PEAKS = {"gpu_memory_gib"}  # a log says the most of these, and the mean of the others


def read_gpu(device: torch.device) -> dict[str, float]:
    """What `nvidia-smi` (or `amd-smi`) shows of the device now: watts, GiB in use by all processes, percent of time.

    Raises: what NVML raises: it is not installed, there is no driver, the device does not tell.
    """
    return {
        "gpu_power_watts": torch.cuda.power_draw(device) / 1000,
        "gpu_memory_gib": torch.cuda.device_memory_used(device) / 2**30,
        "gpu_utilisation_percent": float(torch.cuda.utilization(device)),
    }


class Sampler:
    """Reads numbers every second, in a thread of its own, until `stop`; the first reading that fails is the last."""

    def __init__(self, read: Callable[[], Mapping[str, float]], *, every_seconds: float = EVERY_SECONDS) -> None:
        self._read = read
        self._every_seconds = every_seconds
        self._seen: defaultdict[str, list[float]] = defaultdict(list)
        self._ended = Event()
        self._thread = Thread(target=self._sample, name="gpu", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(self._every_seconds):
            try:
                reading = self._read()
            except Exception:  # a driver that is reset tells it in many ways; training goes on without these numbers
                return
            for name, value in reading.items():
                self._seen[name].append(value)

    def take(self) -> dict[str, float]:
        """The mean, or the most, of each number since the last call; empty where nothing was read since."""
        seen, self._seen = self._seen, defaultdict(list)
        return {name: max(all_) if name in PEAKS else sum(all_) / len(all_) for name, all_ in list(seen.items())}

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


class GpuCallback(TrainerCallback):
    """Adds the GPU's numbers to each log of training steps; nothing where there is no GPU."""

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
