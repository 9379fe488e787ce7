"""A run from its first line to its last: settings, folder, data, model, training, weights."""

from collections.abc import Mapping, Sequence
from copy import copy
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from dpokit.after_training import check_wishes, find_commands, run_commands
from dpokit.checkpoint.preempt import Notice, choose_signals, find_preempted_restart
from dpokit.checkpoint.resume import MODEL, claim_folder
from dpokit.console import hide_progress, quiet_dependencies, say
from dpokit.data.columns import fingerprint_ids
from dpokit.data.prepare import PreparedData, prepare_data
from dpokit.data.tally import print_report
from dpokit.distributed.coordination import build_on_each_machine_first, decide_on_main_process, peer_errors
from dpokit.distributed.placement import find_requested_placement
from dpokit.distributed.processes import is_main_process
from dpokit.errors import SettingsError
from dpokit.interrupts import Preempted, recording
from dpokit.model.load import build_peft_config, find_max_length, load_policy, load_reference, load_tokenizer
from dpokit.model.reference import can_be_computed_ahead, decide_reference, find_identity, is_kept
from dpokit.run_state import find_kept_evaluation, keep_record, record_preemption
from dpokit.rundir import RunDir, write_json
from dpokit.settings.load import Settings, load_settings
from dpokit.train.alarms import AlarmCallback
from dpokit.train.callbacks import (
    EpochCallback,
    MetricsCallback,
    PlacementCallback,
    PreemptCallback,
    ResumeCallback,
    ScreenCallback,
)
from dpokit.train.dpo_trainer import PairTrainer
from dpokit.train.gates import GateCallback, Gates
from dpokit.train.gpu_metrics import GpuCallback
from dpokit.train.preflight import check_model_path, check_quantised, check_start, check_world
from dpokit.train.sft_trainer import AnswerTrainer
from dpokit.train.steps import StepTrainer
from dpokit.train.trackers import REPLACED, set_up_trackers, track_run
from dpokit.train.value_checks import check_values


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
    if settings.training.disable_tqdm:
        hide_progress()
    for note in settings.notes:
        say(note)
    run = RunDir(settings.training.output_dir)
    with recording(lambda why: record_preemption(run, why)):
        asked_to_end = _train(run, settings)
    clear_device_cache(garbage_collection=True)  # what follows is other programs
    if is_main_process():
        commands = list(find_commands(run, settings))
        run_commands(commands, token=settings.training.hub_token, asked_to_end=asked_to_end)
    return run


def _train(run: RunDir, settings: Settings) -> str | None:
    """Returns the signal that came too late to cut the run short, if any."""
    training = settings.training
    gates = Gates(settings.data.gates)
    world_size = check_world(gates)
    placement = find_requested_placement(training)
    say_world(placement, on_cpu=training.use_cpu, timeout_seconds=training.ddp_timeout)
    if settings.origins.get("hub_token") == "command line":
        say("--hub_token on a command line is seen by every user of this machine; the variable HF_TOKEN is not")
    set_up_trackers(settings)
    signals = choose_signals(settings.data.preempt_signal)
    notice = Notice(PartialState().process_index, settings.data.save_before_seconds)
    # When one of several processes has failed, the launcher signals the others: that is no preemption, so they wait for
    # what their next collective says. A process that is alone has nothing to save before its first step.
    notice.asked_at_boundaries = PartialState().num_processes > 1
    with peer_errors(training.ddp_timeout):
        ended = decide_on_main_process(lambda: find_preempted_restart(run))
        if ended is not None:
            raise Preempted(ended)
        decide_on_main_process(lambda: check_values(settings))
        decide_on_main_process(lambda: check_model_path(settings, gates))
        decide_on_main_process(lambda: check_wishes(settings))
        start = decide_on_main_process(lambda: claim_folder(run, settings, world_size=world_size, placement=placement))
    run.token = start.token
    training.gradient_accumulation_steps = start.accumulation or training.gradient_accumulation_steps
    with (
        notice.heard(signals),  # until the last word is written: launchers end the others when one process has ended
        track_run(run, settings) as tracker,
        keep_record(run, settings, world_size),
        peer_errors(training.ddp_timeout),
    ):
        tracker.begin()
        trainer, data = build_trainer(run, settings, gates, notice)
        identity, accepted = decide_on_main_process(lambda: check_start(start, settings, data.fingerprint, world_size))
        for name, (before, now) in accepted.items():
            say(f"accepted: {name} was {before}, now {now}")
        if is_main_process():
            run.write_run(model_fingerprint=identity[MODEL])  # by which a merge knows the base again
        if accepted and is_main_process():
            run.write_run(accepted_changes=[*(run.read_run() or {}).get("accepted_changes", []), accepted])
        callbacks = (
            GpuCallback(),  # completes each log before anyone keeps it
            # The file of metrics is begun early: going on may begin with an evaluation.
            *(EpochCallback(trainer), PlacementCallback(trainer, run), tracker, MetricsCallback(trainer, run)),
            *(ScreenCallback(), ResumeCallback(trainer, start.checkpoint, identity)),
            AlarmCallback(trainer, run, answers=settings.data.eval_answers),
            PreemptCallback(trainer, notice),
            # The gates come last: they must know of each log and save that another callback asks for.
            GateCallback(trainer, gates, with_adapter=settings.model.use_peft),
        )
        for callback in callbacks:
            trainer.add_callback(callback)
        if start.universal:
            trainer.load_universal()
        with (
            trainer.writing_ended(),
            peer_errors(training.ddp_timeout, lambda: f" at step {trainer.state.global_step + 1}"),
        ):
            trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
        trainer.save_weights(run.adapter if settings.model.use_peft else run.model)
        best = find_kept_evaluation(trainer)
        if is_main_process():
            write_json(run.data_json, data.record())
            run.write_run(best=best)
    kept = "" if best is None else f" (eval loss {best['value']:.4f}, of step {best['step']})"
    say(f"\nthe tuned model is in {run.adapter if settings.model.use_peft else run.model}{kept}")
    trainer.end()
    return notice.why


def prepare_run(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Tokens and reference log-probs of a run ahead of it, for its caches; returns what data.json will hold.

    Raises: DpokitError: what the user can mend.
    """
    quiet_dependencies()
    settings = load_settings(recipe, defaults, [*argv, "--report_to", "none"])
    training = settings.training
    if settings.kind == "dpo" and not training.precompute_ref_log_probs:
        training.precompute_ref_log_probs = can_be_computed_ahead(settings)
        if not training.precompute_ref_log_probs:
            say("the reference is not computed: a run with these settings asks it at each step")
    with TemporaryDirectory(prefix="dpokit-prepare-") as folder, peer_errors(training.ddp_timeout):
        training.output_dir = folder
        _, data = build_trainer(RunDir(folder), settings, Gates(settings.data.gates))
    return data.record()


def build_trainer(
    run: RunDir, settings: Settings, gates: Gates, notice: Notice | None = None
) -> tuple[StepTrainer, PreparedData]:
    """Data, models and trainer of a run, its callbacks left out; writes data.json and shows its table.

    Raises: Preempted where the notice comes while the reference is computed.
    """
    training = settings.training
    tokenizer = load_tokenizer(settings.model, trust_remote_code=training.trust_remote_code)
    policy = load_policy(settings, tokenizer)
    check_quantised(policy, settings.model, gates)
    peft_config = build_peft_config(settings, policy)
    max_length = find_max_length(settings, policy)
    data = build_on_each_machine_first(
        lambda: prepare_data(
            settings.data,
            tokenizer,
            max_length=max_length,
            with_eval=training.eval_strategy != "no",
            processes=training.dataset_num_proc,
            seed=training.seed,
        ),
        timeout_seconds=training.ddp_timeout,
    )
    if is_main_process():
        write_json(run.data_json, data.record())
        run.write_run(data_fingerprint=data.fingerprint)
        print_report(data.record())
    if settings.kind == "dpo":
        settle_reference(run, settings, data.train)
    args = copy(training)
    args.push_to_hub = False  # transformers would send each checkpoint, its optimizer too; dpokit push sends the model
    args.hub_token = None  # so no file that the trainer writes can hold it
    parts = {
        "model": policy,
        "args": args,
        "train_dataset": data.train,
        "eval_dataset": data.eval,
        "processing_class": tokenizer,
        "peft_config": peft_config,
    }
    if notice is not None:
        notice.asked_at_boundaries = True  # the first is the end of the reference's first part, or of the first step
    try:
        if settings.kind == "sft":
            trainer: StepTrainer = AnswerTrainer(**parts)
        else:
            trainer = build_pair_trainer(settings, {**parts, "notice": notice}, max_length)
    except (ValueError, ImportError) as error:  # TRL's own checks of settings and model together
        raise SettingsError(
            " ".join(str(error).split())[:500],
            expected="settings that go together, and with this model",
            do="change one of the settings that the first line names",
        ) from error
    trainer.run = run
    for replaced in (ProgressCallback, PrinterCallback, *REPLACED):
        trainer.remove_callback(replaced)
    return trainer, data


def settle_reference(run: RunDir, settings: Settings, pairs: Any) -> None:
    """Decides whether the reference's log-probs are computed ahead, where nobody said; the settings then say so."""
    kept = isinstance(pairs, Dataset) and decide_on_main_process(
        lambda: is_kept(settings, fingerprint_ids([pairs]), len(pairs))
    )
    if decide_reference(settings, kept=kept) and is_main_process():
        run.write_run(settings=settings.record())


def build_pair_trainer(settings: Settings, parts: Mapping[str, Any], longest: int | None) -> PairTrainer:
    """The trainer of preference pairs, with its reference.

    Args:
        parts: arguments of any trainer.
        longest: most tokens of a row; None where nobody knows.
    """
    return PairTrainer(
        **parts,
        ref_model=load_reference(settings),
        shared_prefix=settings.data.shared_prefix,
        longest=longest,
        reference=decide_on_main_process(lambda: find_identity(settings))
        if settings.training.precompute_ref_log_probs
        else None,
    )


def say_world(placement: str, *, on_cpu: bool, timeout_seconds: int) -> None:
    """One line on who trains together, and how long they wait for each other; nothing where one process is alone."""
    processes = PartialState().num_processes
    if processes > 1:
        say(
            f"{processes} {'CPU processes' if on_cpu else 'GPUs'}, {placement}; a process waits at most "
            f"{timeout_seconds:,} s for the others (--ddp_timeout)"
        )
