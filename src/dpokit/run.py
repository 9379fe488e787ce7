"""A whole training run: settings, folder, data, model, training, final weights."""

from collections.abc import Mapping, Sequence
from copy import copy
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from trl import DPOConfig, SFTConfig

from dpokit.after_training import check_after_training, describe_end, find_commands, run_commands
from dpokit.atomic_files import write_json
from dpokit.checkpoint.preempt import Notice, choose_signals, find_preempted_restart
from dpokit.checkpoint.resume import MODEL, Start, claim_folder
from dpokit.console import hide_progress, quiet_dependencies, say
from dpokit.data.columns import fingerprint_ids
from dpokit.data.doctor.short import describe_length_bias
from dpokit.data.prepare import PreparedData, prepare_data
from dpokit.data.tally import print_report
from dpokit.distributed.coordination import build_on_each_machine_first, decide_on_main_process, peer_errors
from dpokit.distributed.cores import set_threads
from dpokit.distributed.placement import find_requested_placement
from dpokit.distributed.processes import is_main_process
from dpokit.errors import SettingsError
from dpokit.interrupts import Preempted, recording
from dpokit.model.gguf import describe_gguf
from dpokit.model.load import (
    build_peft_config,
    find_base,
    find_max_length,
    load_policy,
    load_reference,
    load_tokenizer,
)
from dpokit.model.reference import can_be_computed_ahead, decide_reference, find_identity, is_kept
from dpokit.run_state import find_kept_evaluation, keep_record, record_preemption
from dpokit.rundir import RunDir
from dpokit.settings.checks import show_choices
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
from dpokit.train.trackers import REPLACED, decide_trackers, track_run
from dpokit.train.value_checks import check_values


def train(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str] | Mapping[str, Any]) -> RunDir:
    """Trains one run and returns its folder.

    Args:
        recipe: the recipe's file.
        defaults: its `DEFAULTS`.
        argv: flags, or settings by name, which override the defaults.

    Raises:
        DpokitError: an error that the user can correct; run.json has its message if the folder is this run's.
    """
    quiet_dependencies()
    settings = load_settings(recipe, defaults, argv)
    if settings.training.disable_tqdm:
        hide_progress()
    for note in settings.notes:
        say(note)
    run = RunDir(settings.training.output_dir)
    with recording(lambda why: record_preemption(run, why)):
        end_signal = _train(run, settings)
    clear_device_cache(garbage_collection=True)  # the commands that follow are processes of their own
    if is_main_process():
        commands = list(find_commands(run, settings))
        run_commands(commands, token=settings.training.hub_token, stop_signal=end_signal)
        say(describe_end(run, settings))
    return run


def _train(run: RunDir, settings: Settings) -> str | None:
    """Trains the run; returns the signal that arrived too late to end it early, if any."""
    training = settings.training
    gates = Gates(settings.data.gates)
    world_size = check_world(gates)
    placement = find_requested_placement(training)
    say_world(placement, on_cpu=training.use_cpu, timeout_seconds=training.ddp_timeout)
    if settings.origins.get("hub_token") == "command line":
        say("--hub_token on a command line is visible to every user of this machine; the variable HF_TOKEN is not")
    settings = decide_trackers(settings)
    signals = choose_signals(settings.data.preempt_signal)
    notice = Notice(PartialState().process_index, settings.data.save_before_seconds)
    # If one of several processes fails, the launcher signals the others. That is not a preemption, so they wait for the
    # error of their next collective. A single process has nothing to save before its first step.
    notice.checked_at_boundaries = PartialState().num_processes > 1
    with peer_errors(training.ddp_timeout):
        if training.use_cpu:
            say(set_threads())
        ended = decide_on_main_process(lambda: find_preempted_restart(run))
        if ended is not None:
            raise Preempted(ended)
        decide_on_main_process(lambda: check_values(settings))
        decide_on_main_process(lambda: check_model_path(settings, gates))
        decide_on_main_process(lambda: check_after_training(settings))
        start = decide_on_main_process(lambda: claim_folder(run, settings, world_size=world_size, placement=placement))
    run = RunDir(run.path, start.token)  # rank 0 has taken possession of the folder for all ranks
    if settings.data.template_date is None:
        settings = settings.with_data("the run's first start", template_date=start.template_date)
    if start.accumulation not in (None, training.gradient_accumulation_steps):
        settings = settings.with_training("resume", gradient_accumulation_steps=start.accumulation)
    with (
        notice.listen(signals),  # until run.json is complete: launchers end all processes when one has ended
        track_run(run, settings) as tracker,
        keep_record(run, settings, world_size),
        peer_errors(training.ddp_timeout),
    ):
        tracker.begin()
        trainer, data = build_trainer(run, settings, gates, start=start, notice=notice)
        callbacks = (
            GpuCallback(),  # adds to each log before other callbacks use it
            # metrics.jsonl is opened early: a resume may start with an evaluation.
            *(EpochCallback(trainer), PlacementCallback(trainer, run), tracker, MetricsCallback(trainer, run)),
            *(ScreenCallback(), ResumeCallback(trainer, start.checkpoint)),
            AlarmCallback(trainer, run, answers=settings.data.eval_answers),
            PreemptCallback(trainer, notice),
            # The gates come last: they must see each log and save that another callback requests.
            GateCallback(trainer, gates, with_adapter=settings.model.use_peft),
        )
        for callback in callbacks:
            trainer.add_callback(callback)
        if start.universal:
            trainer.load_universal()
        with (
            trainer.finish_writing(),
            peer_errors(training.ddp_timeout, lambda: f" at step {trainer.state.global_step + 1}"),
        ):
            trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
        trainer.save_weights(run.adapter if settings.model.use_peft else run.model, settings)
        best = find_kept_evaluation(trainer)
        if is_main_process():
            write_json(run.data_json, data.record())
            run.write_run(best=best)
    kept = "" if best is None else f" (eval loss {best['value']:.4f}, of step {best['step']})"
    say(f"\nthe tuned model is in {run.adapter if settings.model.use_peft else run.model}{kept}")
    trainer.end()
    return notice.why


def prepare_run(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Caches the tokens and reference log-probs of a run in advance; returns the content of data.json.

    Raises: DpokitError: an error that the user can correct.
    """
    quiet_dependencies()
    settings = load_settings(recipe, defaults, argv).with_training("dpokit prepare", report_to=[])
    if settings.kind == "dpo" and not settings.training.precompute_ref_log_probs:
        if can_be_computed_ahead(settings):
            settings = settings.with_training("dpokit prepare", precompute_ref_log_probs=True)
        else:
            say("reference log-probs are not computed: with these settings a run computes them at each step")
    with TemporaryDirectory(prefix="dpokit-prepare-") as folder, peer_errors(settings.training.ddp_timeout):
        if settings.training.use_cpu:
            say(set_threads())
        settings = settings.with_training("dpokit prepare", output_dir=folder)
        _, data = build_trainer(RunDir(folder), settings, Gates(settings.data.gates))
    return data.record()


def build_trainer(
    run: RunDir, settings: Settings, gates: Gates, *, start: Start | None = None, notice: Notice | None = None
) -> tuple[StepTrainer, PreparedData]:
    """The trainer and data of a run, without the run's callbacks; writes data.json and prints its table.

    Args:
        run: the run folder.
        settings: all settings.
        gates: where the check of quantised weights reports.
        start: where the run begins; None compares nothing, and checkpoints then lack the settings of a resume.
        notice: the signals of this process; None for a run that no signal ends early.

    Raises:
        Preempted: a signal arrives while the reference is computed.
        RunFolderError: the checkpoint of `start` is of other pairs or another model.
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
            seed=training.seed if training.data_seed is None else training.data_seed,
        ),
        timeout_seconds=training.ddp_timeout,
    )
    if settings.kind == "dpo" and isinstance(data.train, Dataset):
        data.findings += describe_length_bias(data.train)
    if is_main_process():
        write_json(run.data_json, data.record())
        run.write_run(data_fingerprint=data.fingerprint)
        print_report(data.record())
    identity = {} if start is None else compare_with_start(run, start, settings, data.fingerprint)
    if settings.kind == "dpo":
        settings = settle_reference(run, settings, data.train)
    parts = {
        "run": run,
        "identity": identity,
        "model": policy,
        "args": copy_arguments(settings.training),
        "train_dataset": data.train,
        "eval_dataset": data.eval,
        "processing_class": tokenizer,
        "peft_config": peft_config,
    }
    if notice is not None:
        notice.checked_at_boundaries = True  # first after a part of the reference, or after the first step
    try:
        if settings.kind == "sft":
            trainer: StepTrainer = AnswerTrainer(**parts)
        else:
            trainer = build_pair_trainer(settings, {**parts, "notice": notice}, max_length)
    except (ValueError, ImportError) as error:  # TRL's own checks of the settings and the model
        raise SettingsError(
            show_choices(" ".join(str(error).split()))[:500],
            expected="settings that fit each other and this model",
            do="change one of the settings that the first line names",
        ) from error
    for replaced in (ProgressCallback, PrinterCallback, *REPLACED):
        trainer.remove_callback(replaced)
    return trainer, data


def compare_with_start(run: RunDir, start: Start, settings: Settings, data_fingerprint: str | None) -> dict[str, Any]:
    """The settings that a later resume must match; run.json records the changes that this resume was allowed.

    Raises: RunFolderError for a change that was not accepted.
    """
    world_size = PartialState().num_processes
    identity, accepted = decide_on_main_process(lambda: check_start(start, settings, data_fingerprint, world_size))
    for name, (before, now) in accepted.items():
        say(f"accepted: {name} was {before}, now {now}")
    if is_main_process():
        name = str(find_base(settings.model) or settings.model.model_name_or_path)
        gguf = describe_gguf(name)
        # By the fingerprint a merge recognises the base; of a GGUF file, that is the fingerprint of its converted copy.
        run.write_run(model_fingerprint=identity[MODEL], **({} if gguf is None else {"gguf": gguf}))
    if accepted and is_main_process():
        run.write_run(accepted_changes=[*(run.read_run() or {}).get("accepted_changes", []), accepted])
    return identity


def copy_arguments(training: DPOConfig | SFTConfig) -> DPOConfig | SFTConfig:
    """A copy for the trainer: the trainers change their arguments, and `Settings` keeps what was requested."""
    args = copy(training)
    args.accelerator_config = copy(training.accelerator_config)
    args.gradient_checkpointing_kwargs = copy(training.gradient_checkpointing_kwargs)
    args.push_to_hub = False  # transformers would send each checkpoint, its optimizer too; dpokit push sends the model
    args.hub_token = None  # so no file that the trainer writes can hold it
    return args


def settle_reference(run: RunDir, settings: Settings, pairs: Any) -> Settings:
    """The settings with the decision whether the reference's log-probs are computed ahead; run.json records it."""
    kept = isinstance(pairs, Dataset) and decide_on_main_process(
        lambda: is_kept(settings, fingerprint_ids([pairs]), len(pairs))
    )
    decided = decide_reference(settings, kept=kept)
    if decided is not settings and is_main_process():
        run.write_run(settings=decided.record())
    return decided


def build_pair_trainer(settings: Settings, parts: Mapping[str, Any], longest: int | None) -> PairTrainer:
    """The trainer of preference pairs, with its reference.

    Args:
        settings: all settings.
        parts: the arguments of the trainer that do not depend on its kind.
        longest: the maximum number of tokens of a row; None if it is not known.
    """
    return PairTrainer(
        **parts,
        ref_model=load_reference(settings),
        shared_prefix=settings.data.shared_prefix,
        group_by_prompt=settings.data.group_by_prompt,
        longest=longest,
        reference=decide_on_main_process(lambda: find_identity(settings))
        if settings.training.precompute_ref_log_probs
        else None,
    )


def say_world(placement: str, *, on_cpu: bool, timeout_seconds: int) -> None:
    """Prints the number of processes, their placement and their time-out; nothing for a single process."""
    processes = PartialState().num_processes
    if processes > 1:
        say(
            f"{processes} {'CPU processes' if on_cpu else 'GPUs'}, {placement}; a process waits at most "
            f"{timeout_seconds:,} s for the others (--ddp_timeout)"
        )
