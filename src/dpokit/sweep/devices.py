"""Which of this machine's devices each of several runs side by side has."""

import os

import torch

from dpokit.errors import SettingsError


def share_devices(jobs: int) -> list[dict[str, str]]:
    """What each slot's environment says of GPUs or threads. Raises: SettingsError for more jobs than GPUs."""
    if jobs == 1:
        return [{}]
    gpus = torch.cuda.device_count()
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))
        return [{"OMP_NUM_THREADS": threads}] * jobs
    if jobs > gpus:
        raise SettingsError(
            f"--jobs {jobs}, and {gpus} GPUs are visible", expected="a GPU for each run, or more", do=f"--jobs {gpus}"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    each = gpus // jobs
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[slot * each : (slot + 1) * each])} for slot in range(jobs)]
