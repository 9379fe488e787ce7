"""Which of a run's weights are merged; where they lie in shards, these are gathered into one folder first."""

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import merge_fsdp_weights
from huggingface_hub import save_torch_state_dict
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dpokit.checkpoint.pickles import check_pickles
from dpokit.checkpoint.store import check_checkpoint, check_origin, find_checkpoints
from dpokit.console import say
from dpokit.errors import ModelError, RunFolderError
from dpokit.interpreter import PYTHON
from dpokit.model.check import ADAPTER_FILE
from dpokit.model.load import build_peft_config, find_base, load_tokenizer
from dpokit.rundir import RunDir, read_record, write_json
from dpokit.settings.load import Settings

FSDP_SHARDS = "pytorch_model_fsdp_0"  # accelerate's name for a model saved by SHARDED_STATE_DICT
ZERO_LATEST = "latest"  # DeepSpeed's file that names the folder of its shards


def find_weights(run: RunDir, *, step: int | None) -> Path:
    """The folder to merge: the final weights, or a checkpoint that verifies; every byte of that is read.

    Args:
        step: the checkpoint's; None for the final weights, or else the newest checkpoint that verifies.

    Raises: RunFolderError where there is none.
    """
    final = run.find_weights()
    if step is None and final is not None:
        return final
    if step is not None:
        path = run.path / f"checkpoint-{step}"
        if not path.is_dir():
            names = ", ".join(each.name for each in run.checkpoints()) or "no checkpoint at all"
            raise RunFolderError(
                f"there is no {path}", expected=f"one of: {names}", do="correct --checkpoint, or leave it out"
            )
        problem = check_checkpoint(path, deep=True).problem
        if problem is not None:
            raise RunFolderError(
                f"{path} cannot be merged: {problem}",
                expected="a checkpoint that verifies",
                do=f"choose one that `dpokit verify {run.path}` calls whole",
            )
        return path
    state = (run.read_run() or {}).get("state", "not begun")
    for checkpoint in find_checkpoints(run, deep=False):
        problem = checkpoint.problem or check_checkpoint(checkpoint.path, deep=True).problem
        if problem is None:
            say(f"the run is {state} and has no final weights: {checkpoint.path.name} is merged, its newest whole one")
            return checkpoint.path
        say(f"{checkpoint.path.name} is passed over: {problem}")
    raise RunFolderError(
        f"{run.path} holds no weights: neither {run.adapter.name}/ nor {run.model.name}/, and no checkpoint that "
        f"verifies (the run is {state})",
        expected="a finished run, or a whole checkpoint",
        do="let the run finish",
    )


def gather_weights(folder: Path, settings: Settings, *, room: Path) -> Path:
    """A folder of whole weights, config and tokenizer: the same one, or the empty `room`, filled from its shards.

    Raises: RunFolderError where the shards cannot be gathered, or hold what must not be loaded.
    """
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")) and _has_weights(folder):
        return folder
    check_origin(folder, trusted=settings.data.trust_checkpoint)
    check_pickles(folder)
    if (folder / FSDP_SHARDS).is_dir():
        say(f"gathering the shards of {folder.name} (FSDP2)")
        merge_fsdp_weights(str(folder / FSDP_SHARDS), str(room))
    elif (folder / ZERO_LATEST).is_file():
        say(f"gathering the shards of {folder.name} (ZeRO-3)")
        _gather_zero(folder, room)
    else:
        raise RunFolderError(
            f"{folder} holds no weights that are known here",
            expected="safetensors, or the shards of FSDP2 or ZeRO-3",
            do="choose another --checkpoint",
        )
    model, trust = settings.model, settings.training.trust_remote_code
    base = find_base(model)
    name = base or str(model.model_name_or_path)
    options = {"revision": "main" if base else model.model_revision, "trust_remote_code": trust}
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model_name_or_path {name}: no config could be loaded: {' '.join(str(error).split())[:300]}",
            expected="the model that the run began with, whose config the shards do not hold",
            do="name it where it is now: --model_name_or_path FOLDER",
        ) from error
    if model.use_peft:
        adapter = _find_adapter_config(settings, config)
        adapter.base_model_name_or_path = name
        adapter.save_pretrained(room)
        (room / "model.safetensors").rename(room / ADAPTER_FILE)
    else:
        config.save_pretrained(room)
        with suppress(OSError):  # a base need not have one
            GenerationConfig.from_pretrained(name, revision=options["revision"]).save_pretrained(room)
    load_tokenizer(model, trust_remote_code=trust).save_pretrained(room)
    return room


def follow_base(folder: Path, settings: Settings, *, then: str, room: Path) -> Path:
    """An adapter's folder, or a copy in `room` that names its base where this is now.

    Args:
        then: what the run called the model that it began with; `settings` have it by its name of now.
        room: where a copy may be made.
    """
    now, config = str(settings.model.model_name_or_path), folder / "adapter_config.json"
    if now == then or not config.exists():
        return folder
    described = read_record(config)
    if described["base_model_name_or_path"] != then:
        return folder
    copy = room / "adapter"
    shutil.copytree(folder, copy)
    write_json(copy / config.name, described | {"base_model_name_or_path": now})
    return copy


def _find_adapter_config(settings: Settings, config: Any) -> PeftConfig:
    """Of the adapter that the run went on with, or that its flags describe."""
    model = settings.model
    if find_base(model) is not None:
        return PeftConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    with torch.device("meta"):
        trust = settings.training.trust_remote_code
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return build_peft_config(settings, skeleton)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _gather_zero(folder: Path, room: Path) -> None:
    """By DeepSpeed's own program, so that it is imported nowhere here; it cannot write tied weights as safetensors."""
    command = [*PYTHON, "-m", "deepspeed.utils.zero_to_fp32", str(folder), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    written = sorted(room.glob("pytorch_model*.bin"))
    if done.returncode or not written:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFolderError(
            f"the shards of {folder} cannot be gathered: {last[:300]}",
            expected="ZeRO shards that DeepSpeed's zero_to_fp32 takes (the extra `deepspeed` must be installed)",
            do="choose another --checkpoint, or let the run finish: it writes whole weights at its end",
        )
    state: dict[str, torch.Tensor] = {}
    for file in written:
        state |= torch.load(file, weights_only=True, mmap=True)
    save_torch_state_dict(state, room)
    for file in room.glob("pytorch_model*"):
        file.unlink()
