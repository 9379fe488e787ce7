"""Saves checkpoints and the final weights.

A checkpoint has transformers' files (weights, optimizer, schedule, random states). It is written under a temporary
name, then `checkpoint.store` verifies and renames it. If nothing is sharded, the state is copied and written while
training goes on. Overrides private methods of transformers' trainer.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import safe_open
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from dpokit.atomic_files import new_folder, read_record, write_json
from dpokit.checkpoint.store import describe_files, find_part, list_files, retire, seal
from dpokit.data.rendering import Renderer
from dpokit.distributed.placement import find_placement
from dpokit.errors import DpokitError, ModelError
from dpokit.model.check import ADAPTER_CONFIG
from dpokit.model.gguf import find_model_folder
from dpokit.model.tuned_folder import complete_folder, find_final_dtype, round_weights, warn_of_rounding
from dpokit.rundir import RunDir
from dpokit.settings.load import Settings
from dpokit.train.metric_sums import Sums


class ProgressTrainer(Trainer):
    """A trainer whose progress a checkpoint keeps. A base class that precedes one of TRL's, and uses its attributes.

    Attributes:
        evaluation_due: a signal put off the evaluation of this step.
        epoch_ended: the end of an epoch was reached; its log and evaluation are done or under way.
    """

    _total_train_tokens: float  # TRL's count of the tokens that this rank has trained on

    def __init__(self, **arguments: Any) -> None:
        self.evaluation_due = self.epoch_ended = False
        self._last_update: dict[str, Any] = {}  # of the last step, for the log at the end of the epoch
        self._sums = {"train": Sums(), "eval": Sums()}
        self._working_since: float | None = None  # when the training steps since the last log began
        super().__init__(**arguments)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *arguments: Any, learning_rate: float | None = None
    ) -> None:
        self._last_update = {"grad_norm": grad_norm, "learning_rate": learning_rate}
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *arguments, learning_rate=learning_rate)

    def _read_progress(self) -> dict[str, Any]:
        """This rank's counts and the metrics that are not logged yet, for a resume."""
        since, args = self._working_since, self.args
        ahead = not self.epoch_ended and (self.is_finished() or float(self.state.epoch or 0).is_integer())
        evaluated = args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= (self.state.epoch or 0)
        return {
            "loss": self._tr_loss.item(),
            "logged_step": self._globalstep_last_logged,
            "logged_loss": self._total_loss_scalar,
            "first_step": self._initial_global_step,
            "tokens": self._total_train_tokens,
            "sums": self._sums["train"].record(),
            "working_seconds": None if since is None else time.monotonic() - since,
            "last_update": {
                name: value.item() if isinstance(value, torch.Tensor) else value
                for name, value in self._last_update.items()
            },
            "log_due": ahead and args.logging_strategy == IntervalStrategy.EPOCH,
            "evaluation_due": self.evaluation_due or (ahead and evaluated),
        }

    def end_epoch(self) -> None:
        """Notes the end of an epoch, before its log and evaluation."""
        self.epoch_ended = True

    def put_off_evaluation(self) -> None:
        """Leaves the evaluation of this step to the next start of the run."""
        self.evaluation_due = True

    def is_finished(self) -> bool:
        """Whether the last step is done."""
        return self.state.global_step >= self.state.max_steps


REFERENCE = "reference.pt"  # written if --sync_ref_model moves the reference
FULL_BYTES = 2**20  # less free space means a full disk: torch.save does not give the reason of its failure
# Messages of a failed write. Free space alone does not tell: another rank may have deleted its files already.
WRITE_FAILED = ("No space left", "unexpected pos", "iostream error", "failed writing file")


class SavingTrainer(ProgressTrainer):
    """A trainer that writes checkpoints which verify.

    Args:
        run: the run folder.
        identity: the settings that a resume must match (`describe_identity`), for the manifest of each checkpoint.
        arguments: those of TRL's trainer.

    Attributes:
        stall_seconds: how long training waited for the last save.
    """

    ref_model: Any

    def __init__(self, *, run: RunDir, identity: Mapping[str, Any], **arguments: Any) -> None:
        self.run = run
        self._identity = dict(identity)
        self.stall_seconds = 0.0
        self._in_background = False
        self._buffers: list[torch.Tensor] = []
        self._writing: Thread | None = None
        self._write_error: BaseException | None = None
        super().__init__(**arguments)

    @cached_property
    def placement(self) -> str:
        """The placement of the prepared model, first read when training starts: later, shards may be gathered."""
        return find_placement(self.model_wrapped)

    # -- saving ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.monotonic()
        self.wait_for_checkpoint()
        step, part = self.state.global_step, find_part(self.run, self.state.global_step)
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()  # without parents: a run folder that was deleted stays deleted
        self.accelerator.wait_for_everyone()
        self.store_flos()
        if self.args.save_strategy != SaveStrategy.NO and self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(self.run.path / f"checkpoint-{step}")  # on all ranks, as all load it
        with _delete_if_failed(self.run, part):
            if self._is_sharded():
                self._save_shards(part, step)
            else:
                self._save_whole(part, step)
        self.stall_seconds = time.monotonic() - began

    def _save_small(self, part: Path) -> list[str]:
        """Writes each rank's own state and rank 0's trainer state; returns all files that any rank sees. Collective."""
        self._save_rng_state(str(part))
        # write_json refuses NaN, which a loss may be.
        (part / f"progress_{self.accelerator.process_index}.json").write_text(json.dumps(self._read_progress()))
        if self.accelerator.is_main_process:
            self._save_state(part)
        # A network file system may show a node's new files to another node late.
        return sorted({name for names in gather_object([list_files(part)]) for name in names})

    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save_shards(self, part: Path, step: int) -> None:
        """Saves what each process holds, by DeepSpeed or FSDP2. Collective."""
        self.save_model(str(part), _internal_call=True)
        # A pickle of all flags, which no code loads; run.json has them.
        (part / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(part))
            self._save_scaler(str(part))
        names = self._save_small(part)
        # Any rank can hash any file, so all ranks share the work.
        own_share = describe_files(part, names[self.accelerator.process_index :: self.accelerator.num_processes])
        files = dict(entry for entries in gather_object([own_share]) for entry in entries.items())
        if self.accelerator.is_main_process:
            self._finish(part, step, files)
        self.accelerator.wait_for_everyone()

    def _save_whole(self, part: Path, step: int) -> None:
        """Saves on rank 0, in the background if the memory holds a copy of the state. Collective."""
        write = self._copy_state(part) if self.accelerator.is_main_process else None
        names = self._save_small(part)
        if write is None:
            return

        def write_all() -> None:
            with _delete_if_failed(self.run, part):
                write()
                self._finish(part, step, describe_files(part, {*names, *list_files(part)}))

        def attempt() -> None:
            try:
                write_all()
            except BaseException as error:  # the training thread raises it
                self._write_error = error

        if self._in_background:
            self._writing = Thread(target=attempt, name="checkpoint")
            self._writing.start()
        else:
            write_all()

    def _copy_state(self, part: Path) -> Callable[[], None]:
        """A function that writes the weights and the optimizer; of a copy, if it is to run in the background."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        weights = {name: value for name, value in model.state_dict().items() if _is_saved(model, name)}
        states: dict[str, Any] = {"scheduler.pt": self.lr_scheduler.state_dict()}
        if not self.args.save_only_model:
            states["optimizer.pt"] = self.optimizer.state_dict()
            if getattr(self.accelerator, "scaler", None) is not None:
                states["scaler.pt"] = self.accelerator.scaler.state_dict()
        reference = self.ref_model.state_dict() if self._moves_reference() else {}
        leaves = tree_leaves([weights, states, reference])
        bytes_ = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        # Newly allocated memory takes ten times as long to fill, so the memory of the last copy is reused.
        self._in_background = bytes_ < sum(buffer.nbytes for buffer in self._buffers) + available_bytes() / 2
        if self._in_background:
            copier = Copier(self._buffers)
            weights, states, reference = tree_map(copier.copy, (weights, states, reference))
            self._buffers = list(copier.copies.values()) if bytes_ < available_bytes() / 2 else []

        def write() -> None:
            self._write_model(part, weights)
            for name, value in states.items():
                torch.save(value, part / name)
            if reference:
                torch.save(reference, part / REFERENCE)

        return write

    def _finish(self, part: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
        check_tensors(part)
        facts = {
            "world_size": self.accelerator.num_processes,
            "placement": self.placement,
            "settings": self._identity,
            "weights_alone": self._find_gap(),
        }
        seal(self.run, step, files, facts)
        best = self.state.best_model_checkpoint
        retire(self.run, limit=self.args.save_total_limit, best=None if best is None else Path(best))

    @contextmanager
    def finish_writing(self) -> Iterator[None]:
        """At the end of the block, also by an error, waits until a checkpoint in the background is complete."""
        try:
            yield
        finally:
            if self._writing is not None:
                self._writing.join()

    def _find_gap(self) -> str | None:
        """Why no run can resume from this run's checkpoints; None if one can."""
        if self.args.save_only_model:
            return "it holds weights alone (--save_only_model)"
        if self._moves_reference() and self._is_sharded():
            return "its reference, which --sync_ref_model moves, is not saved where it is sharded"
        return None

    def _moves_reference(self) -> bool:
        return bool(getattr(self.args, "sync_ref_model", False))  # only DPO has the flag

    def raise_write_error(self) -> None:
        """Raises the error of the write in the background, if there is one."""
        if self._write_error is not None:
            error, self._write_error = self._write_error, None
            raise error

    def is_true_on_any_rank(self, value: bool) -> bool:
        """Whether the value is true on at least one rank. Collective; the only wait for the GPU in a step."""
        if self.accelerator.num_processes == 1:
            return value
        count = torch.full((), float(value), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum") > 0)

    def wait_for_checkpoint(self) -> None:
        """Waits until the checkpoint that is being written is complete. Raises: the error of its write."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        self.raise_write_error()

    def _save_state(self, part: Path) -> None:
        """Writes trainer_state.json as transformers does."""
        state = self.state
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                saved = state.stateful_callbacks[type(callback).__name__]
                if isinstance(saved, list):
                    saved.append(callback.state())
                else:
                    state.stateful_callbacks[type(callback).__name__] = callback.state()
        state.save_to_json(str(part / "trainer_state.json"))

    def _write_model(self, part: Path, state: dict[str, torch.Tensor]) -> None:
        """Writes model or adapter, and tokenizer, as safetensors and JSON only."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            self._write_adapter(model, part, state)
        else:
            model.save_pretrained(part, state_dict=state)
        self.processing_class.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's empty card

    def _write_adapter(self, model: PeftModel, part: Path, state: dict[str, torch.Tensor]) -> None:
        """Writes the adapter. PEFT compares its vocabulary with the base's config.json: of a GGUF file, its copy's."""
        described = model.peft_config[model.active_adapter]
        base = described.base_model_name_or_path
        described.base_model_name_or_path = base and find_model_folder(base)
        try:
            # TRL keeps a copy of a loaded adapter's start as a second adapter, the reference.
            model.save_pretrained(part, state_dict=state, selected_adapters=[model.active_adapter])
        finally:
            described.base_model_name_or_path = base
        config = part / ADAPTER_CONFIG
        if base and (record := read_record(config))["base_model_name_or_path"] != base:
            write_json(config, record | {"base_model_name_or_path": base})

    def save_weights(self, folder: Path, settings: Settings) -> None:
        """Writes the final weights, in `find_final_dtype`, and the files that belong to them.

        The folder appears only when it is complete. Collective.
        """
        self.wait_for_checkpoint()
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.accelerator.is_main_process:
            self.run.check_possession()
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            with new_folder(folder) as part:
                weights, dtype = round_weights(model, state, find_final_dtype(settings))
                warn_of_rounding(model, settings, state, weights)
                self._write_model(part, weights)
                complete_folder(part, settings, Renderer(self.processing_class).ends, dtype=dtype)
        self.accelerator.wait_for_everyone()


def check_tensors(folder: Path) -> None:
    """Checks the headers of all safetensors files. Raises: ModelError for a file without tensors or an empty tensor."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            empty = [name for name in names if 0 in file.get_slice(name).get_shape()]
        if empty or not names:
            raise ModelError(
                f"{path.name} was written with {f'empty tensors ({empty[0]}, ...)' if empty else 'no tensor'}",
                expected="weights; the checkpoint was not kept",
                do="report it with the placement and the versions in run.json: the shards were not gathered",
            )


@contextmanager
def _delete_if_failed(run: RunDir, part: Path) -> Iterator[None]:
    """Deletes the checkpoint `part` if its write fails.

    Raises:
        RunFolderError: a later start of the run has taken the folder over, and deleted the part.
        OSError: the disk is full, even if torch's own error does not say so.
    """
    try:
        yield
    except BaseException as error:  # tokenizers raise a bare Exception, torch's checkpoints a BaseException
        full = shutil.disk_usage(part.parent).free < FULL_BYTES
        for file in part.rglob("*"):  # the error's traceback may hold files open, and an open file keeps its space
            with suppress(OSError):
                os.truncate(file, 0)
        shutil.rmtree(part, ignore_errors=True)
        run.check_possession()
        is_unclear = not isinstance(error, OSError | DpokitError | KeyboardInterrupt | SystemExit)
        if (full or any(text in str(error) for text in WRITE_FAILED)) and is_unclear:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part)) from error
        raise


def _is_saved(model: Any, name: str) -> bool:
    """Whether a checkpoint holds the weight: of a model with an adapter, only the adapter's."""
    return not isinstance(model, PeftModel) or "lora_" in name or "modules_to_save" in name


def available_bytes() -> int:
    """Bytes of this machine's memory that are still available."""
    return int(psutil.virtual_memory().available)


class Copier:
    """Copies tensors to the CPU, once for all that share memory, so that tied weights stay tied.

    Args:
        buffers: tensors of an earlier copy that is no longer needed, whose memory is reused.
    """

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        self.copies: dict[tuple[Any, ...], torch.Tensor] = {}
        self._free: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        for buffer in buffers:
            self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def copy(self, leaf: Any) -> Any:
        """A copy of a tensor; anything else unchanged."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        key = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype, id(leaf) if leaf.data_ptr() == 0 else 0)
        if key not in self.copies:
            free = self._free.get((leaf.shape, leaf.dtype))
            buffer = free.pop() if free else torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")
            self.copies[key] = buffer.copy_(leaf.detach())
        return self.copies[key]
