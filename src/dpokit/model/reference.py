"""Reference log-probs: computed once, kept on disk, and found again by what they depend on.

They depend on the scored token ids, the reference's weights, the precision and `ld_alpha`; not on learning rate, beta
or output folder, so restarts and the trials of a sweep find them. Rank 0 alone touches the disk: a folder that only
one node sees serves all.
"""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file
from trl import DPOConfig, get_quantization_config

from dpokit.console import say
from dpokit.distributed.placement import find_precompute_trouble
from dpokit.errors import find_disk_trouble
from dpokit.model.load import find_base
from dpokit.settings.load import Settings

PART_PAIRS = 256  # what an interruption costs at most
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
SPOT_CHECKS = 4


def find_cache_folder() -> Path:
    """`DPOKIT_CACHE`, else dpokit's folder among the user's caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DPOKIT_CACHE") or Path(caches) / "dpokit") / "reference"


def find_identity(settings: Settings) -> dict[str, object]:
    """What a reference's log-probs depend on beside token ids and autocast; for one process to ask: it reads files."""
    model = settings.model
    base = find_base(model)
    return {
        "weights": hash_weights(str(model.model_name_or_path), model.model_revision),
        "base": base and hash_weights(base, None),
        "dtype": str(model.dtype),
        "quantisation": str(get_quantization_config(model)),
    }


def describe_scores(identity: dict[str, object], training: DPOConfig, token_ids: str) -> dict[str, object]:
    """Everything that log-probs depend on; `token_ids` stands for the scored rows, by their fingerprint."""
    autocast = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    return {**identity, "autocast": autocast, "ld_alpha": training.ld_alpha, "token_ids": token_ids}


def is_kept(settings: Settings, token_ids: str, pairs: int) -> bool:
    """Whether the log-probs of all these pairs are on disk already; for one process to ask."""
    folder = find_cache_folder()
    with suppress(OSError):  # a folder of somebody else's
        if folder.is_dir():
            depends_on = describe_scores(find_identity(settings), settings.training, token_ids)
            return ReferenceCache(folder, depends_on, pairs).is_complete()
    return False


def can_be_computed_ahead(settings: Settings) -> bool:
    """Whether the reference stays as it is, over pairs that can be gone through beforehand."""
    training = settings.training
    if training.sync_ref_model or settings.data.dataset_streaming or not training.disable_dropout:
        return False
    return find_precompute_trouble(training, settings.model) is None


def decide_reference(settings: Settings, *, kept: bool = False) -> Settings:
    """Settings with `precompute_ref_log_probs` on if nobody set it, it is possible and it pays; else the same settings.

    It pays where each pair is met more than once, and where the numbers are `kept` already.
    """
    if settings.kind != "dpo":
        return settings
    training, able = settings.training, can_be_computed_ahead(settings)
    epochs = training.max_steps <= 0 and training.num_train_epochs > 1
    if "precompute_ref_log_probs" in settings.origins or not able or not (epochs or kept):
        return settings
    return settings.with_training("this machine", precompute_ref_log_probs=True)


def hash_weights(name: str, revision: str | None) -> str:
    """What a model's weights are known by: the sha256 of a folder's files, or a Hub id with its commit."""
    folder = Path(name)
    if not folder.is_dir():
        config = cached_file(name, "config.json", revision=revision)
        return f"{name}@{Path(str(config)).parent.name}"
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class ReferenceCache:
    """The log-probs of one list of pairs under one reference, in parts.

    Args:
        folder: `find_cache_folder()`.
        depends_on: everything the numbers depend on; its hash names their folder.
        pairs: how many pairs there are.
    """

    def __init__(self, folder: Path, depends_on: dict[str, object], pairs: int) -> None:
        self.depends_on = depends_on
        text = json.dumps(depends_on, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.pairs = pairs
        self._full = False

    def parts(self) -> list[range]:
        """The pairs of each part."""
        return [range(at, min(at + PART_PAIRS, self.pairs)) for at in range(0, self.pairs, PART_PAIRS)]

    def is_complete(self) -> bool:
        """Whether every part is there; what is in them is looked at by `read`."""
        return self.pairs > 0 and all(self._path(part).is_file() for part in self.parts())

    def read(self, part: range) -> torch.Tensor | None:
        """`(2, pairs of the part)`, fp32: chosen, rejected. None where missing, torn, or not what was written."""
        path = self._path(part)
        try:
            if not path.is_file():
                return None
            with safe_open(path, framework="pt") as file:
                values: torch.Tensor = file.get_tensor("log_probs")
                checksum = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError, KeyError) as error:
            say(f"reference log-probs: {path} cannot be read ({str(error)[:80]}), so they are computed again")
            return None
        if checksum != _hash(values) or values.shape != (2, len(part)):
            say(f"reference log-probs: {path} is not what was written, so they are computed again")
            return None
        return values

    def write(self, part: range, values: torch.Tensor) -> None:
        """Keeps a part; it appears whole or not at all, also when two runs write it. A full disk costs one line."""
        path = self._path(part)
        beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"log_probs": values.contiguous()}, beside, metadata={"sha256": _hash(values)})
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            if not self._full:
                trouble = find_disk_trouble(error)
                why = trouble.seen if trouble else str(error)[:80]
                say(f"reference log-probs: not kept in {self.folder}: {why}; the run goes on")
            self._full = True
            with suppress(OSError):
                beside.unlink()

    def forget(self) -> None:
        """Deletes all parts."""
        for part in self.parts():
            with suppress(OSError):
                self._path(part).unlink()

    def _path(self, part: range) -> Path:
        return self.folder / f"{part.start:08d}.safetensors"


def choose_spot_checks(known: Sequence[range]) -> list[int]:
    """A few pairs, spread over the parts that were read."""
    rows = [row for part in known for row in part]
    return sorted({rows[len(rows) * i // SPOT_CHECKS] for i in range(SPOT_CHECKS)}) if rows else []


def _hash(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
