"""Evaluates, merges and pushes a run after training, if its settings ask for it.

Each verb runs as a program of its own, because the run's process still holds the model's memory and the environment
variables of its launcher. If a verb fails, the user can repeat its command.
"""

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from dpokit.card.front_matter import check_licence, is_on_disk
from dpokit.console import say
from dpokit.data.source_rows import choose_rows, load_sources
from dpokit.distributed.cores import find_users_number
from dpokit.errors import DataError, DpokitError, ReleaseError, SettingsError
from dpokit.interpreter import PYTHON
from dpokit.interrupts import Interrupted
from dpokit.model.load import find_base
from dpokit.push.hub import PushTarget, check_target
from dpokit.report.read import load_run
from dpokit.report.verdict import build_verdict
from dpokit.rundir import RunDir
from dpokit.settings.load import Settings

# Enough for intervals of about 4 % and a few samples in the card; `dpokit evaluate RUN` takes all pairs.
EVALUATE_FLAGS = ("--limit", "500", "--answers", "8", "--max-new-tokens", "128")
NEXT_VERBS = {
    "evaluate": "compares base and tuned model on held-out pairs",
    "report": "writes curves and results to one page",
    "chat": "asks both models side by side",
}
# Prefixes of the environment variables that torchrun and accelerate set in the processes they start.
LAUNCHER_PREFIXES = (
    *("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_", "DEEPSPEED_", "PET_", "GROUP_", "ROLE_"),
    *("MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"),
)


def check_after_training(settings: Settings) -> None:
    """Checks before training that the merge and the push after it can succeed; asks the Hub. Only one process calls it.

    Raises:
        SettingsError: `--push_to_hub` without a repository, or without a licence that the Hub knows; no token; an
            adapter that others cannot load; `--merge_after_training` while merged/ exists.
        DataError: no held-out pairs to check the merge with.
        HubError: the token may not write to the repository, or the repository's visibility is not the requested one.
    """
    training, licence = settings.training, settings.data.hub_license
    if settings.data.merge_after_training:
        _check_merge(settings)
    if not training.push_to_hub:
        return
    if "/" not in (training.hub_model_id or ""):
        raise SettingsError(
            f"--push_to_hub, but hub_model_id is {training.hub_model_id or 'not set'}",
            expected="the target repository",
            do="--hub_model_id USER/NAME",
        )
    if licence is None:
        raise SettingsError(
            "--push_to_hub, but no licence", expected="the model's licence", do="--hub_license apache-2.0, or another"
        )
    if licence == "other":
        raise SettingsError(
            "--hub_license other: training has no flags for the licence's name and link",
            expected="a licence that the Hub knows",
            do="train without --push_to_hub; then dpokit card RUN --license other --license-name NAME --license-link "
            f"URL --repo-id {training.hub_model_id}, and dpokit push RUN",
        )
    check_licence(licence)
    _check_base(settings)
    check_target(find_push_target(settings), token=training.hub_token)


def _check_merge(settings: Settings) -> None:
    """Raises SettingsError if merged/ exists, DataError if there are no held-out pairs to check the merge with."""
    data, merged = settings.data, RunDir(settings.training.output_dir).merged
    if merged.exists() and not data.overwrite_run:
        raise SettingsError(
            f"--merge_after_training, but {merged} exists already",
            expected="a run folder without merged/, which the merge will write",
            do=f"delete {merged} or move it away, or leave --merge_after_training out",
        )
    if (
        settings.training.eval_strategy == "no" and data.eval_fraction is None
    ):  # otherwise training itself checks the pairs
        try:
            choose_rows(data, load_sources(data, streaming=False), training=False)
        except DataError as error:
            raise DataError(
                f"--merge_after_training, but no held-out pairs to check it: {error.seen}",
                expected="--dataset_test_split NAME, or --eval_fraction 0.05",
                do="set one of them, or train without --merge_after_training, then dpokit merge RUN --no-proof",
            ) from error


def _check_base(settings: Settings) -> None:
    """Raises SettingsError if a lone adapter would be sent whose base is a folder or file of this machine."""
    model = settings.model
    name = str(model.model_name_or_path)
    if not model.use_peft or settings.data.merge_after_training or not is_on_disk(name):
        return
    base = find_base(model) or name
    if is_on_disk(base):
        raise SettingsError(
            f"--push_to_hub would send an adapter whose base is {base}, a folder or file of this machine",
            expected="a base that others can load, too",
            do="--merge_after_training; or train without --push_to_hub, then dpokit push RUN --base-model ID",
        )


def find_push_target(settings: Settings) -> PushTarget:
    """The repository and branch to which `--push_to_hub` sends the model."""
    training = settings.training
    public = training.hub_private_repo is False
    return PushTarget(str(training.hub_model_id), public=public, revision=training.hub_revision)


def find_commands(run: RunDir, settings: Settings) -> Iterator[list[str]]:
    """Yields the arguments of each `dpokit` command that the settings ask for, in the order to run them."""
    training, folder = settings.training, str(run.path)
    trust = ["--trust_remote_code", "true"] if training.trust_remote_code else []  # a run folder cannot grant this
    if training.push_to_hub and training.eval_strategy != "no":
        yield ["evaluate", folder, *EVALUATE_FLAGS, *trust]
    if settings.data.merge_after_training:
        yield ["merge", folder, *trust]
    if training.push_to_hub:
        push = ["push", folder, "--repo-id", str(training.hub_model_id), "--license", str(settings.data.hub_license)]
        yield [*push, *find_push_target(settings).flags(), "--yes"]


def run_commands(
    commands: Sequence[Sequence[str]], *, token: str | None = None, stop_signal: str | None = None
) -> None:
    """Runs `dpokit` commands one after the other. Only one process calls it, after the others have ended.

    Args:
        commands: the result of `find_commands`.
        token: the Hub token of a flag, passed to the commands by their environment; None without one.
        stop_signal: the signal that arrived while the run finished; if set, no command starts.

    Raises:
        ReleaseError: a command failed; its own message is on the screen.
        Interrupted: a signal arrived; the running command has ended.
    """
    kept = find_users_number()
    environment = {
        name: value for name, value in os.environ.items() if name == kept or not name.startswith(LAUNCHER_PREFIXES)
    }
    environment |= {"HF_TOKEN": token} if token else {}
    for place, arguments in enumerate(commands):
        rest = " && ".join(f"dpokit {shlex.join(command)}" for command in commands[place:])
        try:
            if stop_signal is not None:
                raise Interrupted(stop_signal)
            say(f"\n$ dpokit {shlex.join(arguments)}")
            code = _run_verb([*PYTHON, "-m", "dpokit.cli", *arguments], environment)
        except Interrupted as end:
            end.advice = f"the run itself is finished and its weights are saved; to continue: {rest}"
            raise
        if code != 0:
            raise ReleaseError(
                f"dpokit {arguments[0]} ended with {code}; the run itself is finished and its weights are saved",
                expected="exit code 0",
                do=f"follow the message above, then: {rest}",
            )


def describe_end(run: RunDir, settings: Settings) -> str:
    """The result of a finished run, the places of its files and the commands that come next, as lines."""
    try:
        verdict = build_verdict(load_run(run.path, name=run.path.name))
    except DpokitError as error:  # such as a damaged evaluation of an earlier run
        verdict = error.seen
    merged = [f"the merged model is in {run.merged}"] if run.find_whole() == run.merged else []
    lines = ["", verdict, *merged, f"settings, metrics and checkpoints are in {run.path}", ""]
    trust = ["--trust_remote_code", "true"] if settings.training.trust_remote_code else []
    for verb, purpose in NEXT_VERBS.items():
        command = shlex.join(["dpokit", verb, str(run.path), *([] if verb == "report" else trust)])
        lines.append(f"  {command}   {purpose}")
    return "\n".join(lines)


def _run_verb(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Returns the command's exit code. Raises: Interrupted on a signal, after the command has ended."""
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        except Interrupted:
            process.terminate()  # Ctrl-C in a terminal reaches it directly
            process.wait()
            raise
