"""A run from its first line to its last: settings, folder, data, model, training, weights."""

import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from dpokit.checkpoint.resume import claim_folder
from dpokit.data.doctor import print_report
from dpokit.data.prepare import PreparedData, fingerprint_ids, prepare_data
from dpokit.errors import DpokitError, RunFolderError, find_disk_trouble
from dpokit.model.load import build_peft_config, find_max_length, load_policy, load_reference, load_tokenizer
from dpokit.model.reference import decide_reference, find_identity, is_kept
from dpokit.placement import find_asked_placement
from dpokit.rundir import RunDir, write_json
from dpokit.screen import quiet_dependencies, say
from dpokit.settings import Settings, load_settings
from dpokit.train.callbacks import EpochCallback, MetricsCallback, PlacementCallback, ScreenCallback
from dpokit.train.gates import GateCallback, Gates
from dpokit.train.start import check_model_path, check_quantised, check_world
from dpokit.train.trackers import REPLACED, set_up_trackers, track_run
from dpokit.train.trainer import PairTrainer
from dpokit.world import (
    decide_on_main_process,
    is_main_process,
    main_process_first,
    peer_errors,
    speaks_for_all,
)

PACKAGES = ("dpokit", "torch", "transformers", "trl", "accelerate", "datasets", "peft")


def main(recipe: str, defaults: Mapping[str, Any]) -> None:
    """What a recipe's main guard calls: trains by the recipe's defaults and the command line.

    A mistake of the user ends in one message on rank 0 and exit code 2; anything else keeps its traceback.
    """
    with user_errors():
        train(recipe, defaults, sys.argv[1:])


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what the user can mend into one message of all ranks together and exit code 2."""
    try:
        yield
    except DpokitError as error:
        if speaks_for_all():
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def train(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str]) -> RunDir:
    """One run; returns its folder.

    Args:
        recipe: the recipe's file.
        defaults: its `DEFAULTS`.
        argv: flags, over the defaults.

    Raises:
        DpokitError: what the user can mend; run.json holds the reason where the folder is this run's.
    """
    quiet_dependencies()
    settings = load_settings(recipe, defaults, argv)
    training = settings.training
    gates = Gates(settings.data.gates)
    world_size = check_world(gates)
    placement = find_asked_placement(training)
    say_world(placement, on_cpu=training.use_cpu, timeout_seconds=training.ddp_timeout)
    set_up_trackers(settings)
    run = RunDir(training.output_dir)
    with peer_errors(training.ddp_timeout):
        decide_on_main_process(lambda: check_model_path(settings, gates))
        checkpoint = decide_on_main_process(lambda: claim_folder(run, settings))
    with (
        track_run(run, settings) as tracker,
        keep_record(run, settings, world_size),
        peer_errors(training.ddp_timeout),
    ):
        trainer, data = build_trainer(run, settings, gates)
        callbacks = (
            *(EpochCallback(trainer), PlacementCallback(trainer, run), tracker, MetricsCallback(run), ScreenCallback()),
            # The gates come last: they must know of each log and save that another callback asks for.
            GateCallback(trainer, gates, with_adapter=settings.model.use_peft),
        )
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_weights(run.adapter if settings.model.use_peft else run.model)
        best = find_best(trainer)
        if is_main_process():
            write_json(run.data_json, data.record())
            run.write_run(best=best)
    kept = "" if best is None else f" (eval loss {best['value']:.4f}, of step {best['step']})"
    say(f"\nthe tuned model is in {run.adapter if settings.model.use_peft else run.model}{kept}")
    trainer.end()
    return run


def prepare(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Tokens and reference log-probs of a run ahead of it, for its caches; returns what data.json will hold.

    Raises: DpokitError: what the user can mend.
    """
    quiet_dependencies()
    settings = load_settings(recipe, defaults, [*argv, "--report_to", "none"])
    training = settings.training
    training.precompute_ref_log_probs = not training.sync_ref_model
    with TemporaryDirectory(prefix="dpokit-prepare-") as folder, peer_errors(training.ddp_timeout):
        training.output_dir = folder
        _, data = build_trainer(RunDir(folder), settings, Gates(settings.data.gates))
    return data.record()


def build_trainer(run: RunDir, settings: Settings, gates: Gates) -> tuple[PairTrainer, PreparedData]:
    """Data, models and trainer of a run, its callbacks left out; writes data.json and shows its table."""
    training = settings.training
    tokenizer = load_tokenizer(settings.model, trust_remote_code=training.trust_remote_code)
    policy = load_policy(settings, tokenizer)
    check_quantised(policy, settings.model, gates)
    peft_config = build_peft_config(settings, policy)
    max_length = find_max_length(settings, policy)
    data = main_process_first(
        lambda: prepare_data(
            settings.data,
            tokenizer,
            max_length=max_length,
            with_eval=training.eval_strategy != "no",
            processes=training.dataset_num_proc,
            seed=training.seed,
        )
    )
    if is_main_process():
        write_json(run.data_json, data.record())
        run.write_run(data_fingerprint=data.fingerprint)
        print_report(data.record())
    kept = isinstance(data.train, Dataset) and decide_on_main_process(
        lambda: is_kept(settings, fingerprint_ids([data.train]), len(data.train))
    )
    if decide_reference(settings, kept=kept) and is_main_process():
        run.write_run(settings=settings.record())
    trainer = PairTrainer(
        model=policy,
        ref_model=load_reference(settings),
        args=training,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        peft_config=peft_config,
        shared_prefix=settings.data.shared_prefix,
        longest=max_length,
        reference=decide_on_main_process(lambda: find_identity(settings))
        if training.precompute_ref_log_probs
        else None,
    )
    for replaced in (ProgressCallback, PrinterCallback, *REPLACED):
        trainer.remove_callback(replaced)
    return trainer, data


@contextmanager
def keep_record(run: RunDir, settings: Settings, world_size: int) -> Iterator[None]:
    """run.json around a run: running, then finished, or failed and why. Disk trouble becomes the user's message."""

    def record(**changes: Any) -> None:
        if is_main_process():
            run.write_run(**changes)

    try:
        record(
            recipe=settings.recipe,
            state="running",
            why=None,
            world_size=world_size,
            versions={name: version(name) for name in PACKAGES},
            settings=settings.record(),
        )
        yield
        record(state="finished")
    except BaseException as error:
        trouble = error if isinstance(error, DpokitError) else find_disk_trouble(error)
        try:
            record(state="failed", why=str(trouble or "".join(traceback.format_exception_only(error)).strip()))
        except (OSError, RunFolderError):
            say(f"{run.run_json} could not be brought up to date")
        if trouble is not None and trouble is not error:
            raise trouble from error
        raise


def say_world(placement: str, *, on_cpu: bool, timeout_seconds: int) -> None:
    """One line on who trains together, and how long they wait for each other; nothing where one process is alone."""
    processes = PartialState().num_processes
    if processes > 1:
        say(
            f"{processes} {'CPU processes' if on_cpu else 'GPUs'}, {placement}; a process waits at most "
            f"{timeout_seconds:,} s for the others (--ddp_timeout)"
        )


def find_best(trainer: PairTrainer) -> dict[str, Any] | None:
    """The evaluation whose weights were kept: step and eval loss; None where the last weights were."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or state.best_metric is None or not math.isfinite(state.best_metric):
        return None
    return {"step": state.best_global_step, "metric": trainer.args.metric_for_best_model, "value": state.best_metric}
