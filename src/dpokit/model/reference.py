"""Cache of reference log-probs: computed once, kept on disk under a hash of everything they depend on.

They depend on token ids and masks, the reference's weights, the precision and `ld_alpha`; not on learning rate, beta
or output folder, so restarts and the trials of a sweep reuse them. Only rank 0 reads and writes the disk: a folder that
only one node sees serves all ranks.

The first pair of every 16th part is also scored in fp32, so that a later run can compare its own model with the one
that filled the cache: in 16 bits, rounding hides other weights.
"""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file
from trl import DPOConfig, get_quantization_config

from dpokit.atomic_files import apply_umask
from dpokit.caches import find_caches
from dpokit.console import say
from dpokit.distributed.placement import find_precompute_trouble
from dpokit.errors import find_disk_trouble
from dpokit.file_hashes import hash_file
from dpokit.model.gguf import find_model_folder
from dpokit.model.load import find_base
from dpokit.settings.load import Settings

PART_PAIRS = 256  # an interruption loses at most one part
FORMAT = 2  # of a part's file
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
PARTS_PER_FP32 = 16  # fp32 is slow on a GPU, and one rank computes it while the others wait
SPOT_CHECKS = 4


def find_cache_folder() -> Path:
    """Returns the folder of the cached log-probs."""
    return find_caches() / "reference"


def find_identity(settings: Settings) -> dict[str, object]:
    """Returns what log-probs depend on besides the rows, autocast, `ld_alpha`; reads files: call it in one process."""
    model = settings.model
    base = find_base(model)
    return {
        "weights": hash_weights(str(model.model_name_or_path), model.model_revision),
        "base": base and hash_weights(base, None),
        "dtype": str(model.dtype),
        "quantisation": str(get_quantization_config(model)),
    }


def describe_scores(identity: dict[str, object], training: DPOConfig, token_ids: str) -> dict[str, object]:
    """Returns everything that the log-probs depend on; `token_ids` is the fingerprint of the scored rows."""
    autocast = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    return describe_whole_scores(identity, token_ids) | {"autocast": autocast, "ld_alpha": training.ld_alpha}


def describe_whole_scores(identity: dict[str, object], token_ids: str) -> dict[str, object]:
    """Returns `describe_scores` of log-probs without autocast, each token with its whole weight."""
    return {**identity, "autocast": "no", "ld_alpha": None, "token_ids": token_ids, "format": FORMAT}


def is_kept(settings: Settings, token_ids: str, pairs: int) -> bool:
    """Returns whether the log-probs of all these pairs are on disk. Reads files: to be called by one process."""
    folder = find_cache_folder()
    with suppress(OSError):  # the folder may belong to another user
        if folder.is_dir():
            depends_on = describe_scores(find_identity(settings), settings.training, token_ids)
            return ReferenceCache(folder, depends_on, pairs).is_complete()
    return False


def can_be_computed_ahead(settings: Settings) -> bool:
    """Returns whether the reference is constant, and the pairs are known, before training starts."""
    training = settings.training
    if training.sync_ref_model or settings.data.dataset_streaming or not training.disable_dropout:
        return False
    return find_precompute_trouble(training, settings.model) is None


def decide_reference(settings: Settings, *, kept: bool = False) -> Settings:
    """Returns settings with `precompute_ref_log_probs` on if it is unset, possible and worthwhile; else the same ones.

    It is worthwhile if training uses each pair more than once, or if the log-probs are `kept` on disk already.
    """
    if settings.kind != "dpo":
        return settings
    training, able = settings.training, can_be_computed_ahead(settings)
    epochs = training.max_steps <= 0 and training.num_train_epochs > 1
    if "precompute_ref_log_probs" in settings.origins or not able or not (epochs or kept):
        return settings
    return settings.with_training("this machine", precompute_ref_log_probs=True)


def hash_weights(name: str, revision: str | None) -> str:
    """Returns an identifier of a model's weights: the sha256 of a folder's files, or a Hub id with its commit.

    For a GGUF file: of the folder with its converted copy, which is what a run trains.
    """
    folder = Path(find_model_folder(name))
    if not folder.is_dir():
        config = cached_file(name, "config.json", revision=revision)
        return f"{name}@{Path(str(config)).parent.name}"
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + bytes.fromhex(hash_file(path)))
    return digest.hexdigest()


@dataclass(frozen=True)
class PartScores:
    """Log-probs of the pairs of a part.

    Attributes:
        log_probs: `(2, pairs)`, fp32: chosen, rejected; in the run's precision.
        first_in_fp32: `(2,)`, fp32: those of the first pair, computed in fp32; NaN if they are not.
    """

    log_probs: torch.Tensor
    first_in_fp32: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of the part's file, by name."""
        return {"log_probs": self.log_probs.contiguous(), "first_in_fp32": self.first_in_fp32.contiguous()}


class ReferenceCache:
    """Cached log-probs of a list of pairs under one reference, in parts.

    Args:
        folder: `find_cache_folder()`.
        depends_on: everything the log-probs depend on; its hash is the name of their folder.
        pairs: number of pairs.
    """

    def __init__(self, folder: Path, depends_on: dict[str, object], pairs: int) -> None:
        self.depends_on = depends_on
        text = json.dumps(depends_on, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.pairs = pairs
        self._has_failed = False

    def parts(self) -> list[range]:
        """Returns the indices of each part's pairs."""
        return [range(at, min(at + PART_PAIRS, self.pairs)) for at in range(0, self.pairs, PART_PAIRS)]

    def has_fp32(self, part: range) -> bool:
        """Returns whether the first pair of a part is also scored in fp32."""
        return part.start // PART_PAIRS % PARTS_PER_FP32 == 0

    def is_complete(self) -> bool:
        """Returns whether every part exists; `read` checks the contents."""
        return self.pairs > 0 and all(self._path(part).is_file() for part in self.parts())

    def read(self, part: range) -> PartScores | None:
        """Returns the scores of a part; None if it is missing, torn or changed."""
        path = self._path(part)
        try:
            if not path.is_file():
                return None
            with safe_open(path, framework="pt") as file:
                scores = PartScores(file.get_tensor("log_probs"), file.get_tensor("first_in_fp32"))
                checksum = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError, KeyError) as error:
            say(f"reference log-probs: {path} cannot be read ({str(error)[:80]}), so they are computed again")
            return None
        if checksum != _hash(scores) or scores.log_probs.shape != (2, len(part)) or len(scores.first_in_fp32) != 2:
            say(f"reference log-probs: {path} has another checksum or shape, so they are computed again")
            return None
        return scores

    def write(self, part: range, scores: PartScores) -> None:
        """Writes a part, completely or not at all, also if two runs write it. A full disk prints one line, no error."""
        path = self._path(part)
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(scores.tensors(), temporary, metadata={"sha256": _hash(scores)})
            apply_umask(temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            if not self._has_failed:
                trouble = find_disk_trouble(error)
                reason = trouble.seen if trouble else str(error)[:80]
                say(f"reference log-probs: not kept in {self.folder}: {reason}; the run continues")
            self._has_failed = True
            with suppress(OSError):
                temporary.unlink()

    def forget(self) -> None:
        """Deletes all parts."""
        for part in self.parts():
            with suppress(OSError):
                self._path(part).unlink()

    def _path(self, part: range) -> Path:
        return self.folder / f"{part.start:08d}.safetensors"


def choose_spot_checks(starts: Sequence[int]) -> list[int]:
    """Returns up to `SPOT_CHECKS` of the parts' first pairs, spread over the parts that were read."""
    return sorted({starts[len(starts) * i // SPOT_CHECKS] for i in range(SPOT_CHECKS)}) if starts else []


def _hash(scores: PartScores) -> str:
    return hashlib.sha256(b"".join(values.numpy().tobytes() for values in scores.tensors().values())).hexdigest()
