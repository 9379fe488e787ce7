"""Finds the weights of a run to merge, and gathers sharded weights into one folder."""

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

from dpokit.atomic_files import read_record, write_json
from dpokit.checkpoint.pickles import check_pickles
from dpokit.checkpoint.store import check_checkpoint, check_origin, find_checkpoints
from dpokit.console import say
from dpokit.errors import ModelError, RunFolderError
from dpokit.interpreter import PYTHON
from dpokit.model.check import ADAPTER_FILE
from dpokit.model.gguf import find_model_folder
from dpokit.model.load import build_peft_config, find_base, load_tokenizer
from dpokit.model.tuned_folder import read_stored_dtype
from dpokit.rundir import RunDir
from dpokit.settings.load import Settings

FSDP_SHARDS = "pytorch_model_fsdp_0"  # accelerate's folder of a model saved as SHARDED_STATE_DICT
ZERO_LATEST = "latest"  # DeepSpeed's file with the name of the shards' folder


def find_weights(run: RunDir, *, step: int | None) -> Path:
    """Returns the folder to merge: the final weights, or a checkpoint, after reading each of its bytes to verify it.

    Args:
        step: step of the checkpoint; None for the final weights, or without them the newest checkpoint that verifies.

    Raises: RunFolderError: there are no such weights.
    """
    final = run.find_weights()
    if step is None and final is not None:
        return final
    if step is not None:
        path = run.path / f"checkpoint-{step}"
        if not path.is_dir():
            names = (
                ", ".join(checkpoint.name for checkpoint in run.checkpoints()) or "none, as the run has no checkpoints"
            )
            raise RunFolderError(
                f"there is no {path}", expected=f"one of: {names}", do="correct --checkpoint, or leave it out"
            )
        problem = check_checkpoint(path, deep=True).problem
        if problem is not None:
            raise RunFolderError(
                f"{path} cannot be merged: {problem}",
                expected="a checkpoint that verifies",
                do=f"choose a checkpoint that `dpokit verify {run.path}` reports as whole",
            )
        return path
    state = (run.read_run() or {}).get("state", "not started")
    for checkpoint in find_checkpoints(run, deep=False):
        problem = checkpoint.problem or check_checkpoint(checkpoint.path, deep=True).problem
        if problem is None:
            say(
                f"the run is {state}, without final weights: merging its newest whole checkpoint {checkpoint.path.name}"
            )
            return checkpoint.path
        say(f"{checkpoint.path.name} is skipped: {problem}")
    raise RunFolderError(
        f"{run.path} holds no weights: neither {run.adapter.name}/ nor {run.model.name}/, and no checkpoint that "
        f"verifies (the run is {state})",
        expected="a finished run, or a whole checkpoint",
        do="let the run finish",
    )


def gather_weights(folder: Path, settings: Settings, *, scratch: Path) -> Path:
    """Returns a folder with whole weights, config and tokenizer: `folder` itself, or `scratch`, filled from its shards.

    Raises: RunFolderError: the shards cannot be gathered, or hold pickles that are unsafe to load.
    """
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")) and _has_weights(folder):
        return folder
    check_origin(folder, trusted=settings.data.trust_checkpoint)
    check_pickles(folder)
    if (folder / FSDP_SHARDS).is_dir():
        say(f"gathering the shards of {folder.name} (FSDP2)")
        merge_fsdp_weights(str(folder / FSDP_SHARDS), str(scratch))
    elif (folder / ZERO_LATEST).is_file():
        say(f"gathering the shards of {folder.name} (ZeRO-3)")
        _gather_zero(folder, scratch)
    else:
        raise RunFolderError(
            f"{folder} holds no weights of a known format",
            expected="safetensors, or the shards of FSDP2 or ZeRO-3",
            do="choose another --checkpoint",
        )
    model, trust = settings.model, settings.training.trust_remote_code
    base = find_base(model)
    name = base or str(model.model_name_or_path)
    options = {"revision": "main" if base else model.model_revision, "trust_remote_code": trust}
    try:
        config = AutoConfig.from_pretrained(find_model_folder(name), **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model_name_or_path {name}: no config could be loaded: {' '.join(str(error).split())[:300]}",
            expected="the model that the run started from: its config is not in the shards",
            do="set its present folder: --model_name_or_path FOLDER",
        ) from error
    if model.use_peft:
        adapter = _find_adapter_config(settings, config)
        adapter.base_model_name_or_path = name
        adapter.save_pretrained(scratch)
        (scratch / "model.safetensors").rename(scratch / ADAPTER_FILE)
    else:
        config.dtype = read_stored_dtype(str(scratch), None)  # of the shards, not of the base
        config.save_pretrained(scratch)
        with suppress(OSError):  # not every base has a generation_config.json
            generation = GenerationConfig.from_pretrained(find_model_folder(name), revision=options["revision"])
            generation.save_pretrained(scratch)
    load_tokenizer(model, trust_remote_code=trust).save_pretrained(scratch)
    return scratch


def follow_base(folder: Path, settings: Settings, *, recorded: str, scratch: Path) -> Path:
    """Returns the adapter's folder, or a copy in `scratch` whose config names the base's present folder.

    Args:
        recorded: name of the run's first model in run.json; `settings` has its present name.
        scratch: folder for the copy.
    """
    present, config = str(settings.model.model_name_or_path), folder / "adapter_config.json"
    if present == recorded or not config.exists():
        return folder
    record = read_record(config)
    if record["base_model_name_or_path"] != recorded:
        return folder
    copy = scratch / "adapter"
    shutil.copytree(folder, copy)
    write_json(copy / config.name, record | {"base_model_name_or_path": present})
    return copy


def _find_adapter_config(settings: Settings, config: Any) -> PeftConfig:
    """The config of the adapter that the run continued, or that its flags describe."""
    model = settings.model
    if find_base(model) is not None:
        return PeftConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    with torch.device("meta"):
        trust = settings.training.trust_remote_code
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return build_peft_config(settings, skeleton)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _gather_zero(folder: Path, scratch: Path) -> None:
    """Gathers ZeRO shards with DeepSpeed's own program, since dpokit does not import DeepSpeed.

    The program cannot write tied weights as safetensors, so its output is converted here.
    """
    command = [*PYTHON, "-m", "deepspeed.utils.zero_to_fp32", str(folder), str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    written = sorted(scratch.glob("pytorch_model*.bin"))
    if done.returncode or not written:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFolderError(
            f"the shards of {folder} cannot be gathered: {last[:300]}",
            expected="ZeRO shards that DeepSpeed's zero_to_fp32 can read (install the extra `deepspeed`)",
            do="choose another --checkpoint, or let the run finish: then it writes whole weights",
        )
    state: dict[str, torch.Tensor] = {}
    for file in written:
        state |= torch.load(file, weights_only=True, mmap=True)
    save_torch_state_dict(state, scratch)
    for file in scratch.glob("pytorch_model*"):
        file.unlink()
