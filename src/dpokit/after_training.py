"""What follows training where it was asked for: evaluate, merge, card and push.

Each is the verb, in a program of its own. The run's process still has its model's memory, and what launchers and
accelerate told it of other processes; a verb begins without both. And where one fails, its command is what goes on.
"""

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from dpokit.card.front_matter import check_licence, is_on_disk
from dpokit.console import say
from dpokit.data.sources import load_splits
from dpokit.errors import DataError, ReleaseError, SettingsError
from dpokit.interpreter import PYTHON
from dpokit.interrupts import Interrupted
from dpokit.model.load import find_base
from dpokit.push.hub import Target, check_target
from dpokit.rundir import RunDir
from dpokit.settings.load import Settings

# Enough for intervals of some 4 % and a few samples in the card; `dpokit evaluate RUN` looks at all.
EVALUATED = ("--limit", "500", "--answers", "8", "--max-new-tokens", "128")
# What torchrun and accelerate tell the processes that they start.
OF_LAUNCHERS = (
    *("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_", "DEEPSPEED_", "PET_", "GROUP_", "ROLE_"),
    *("MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"),
)


def check_wishes(settings: Settings) -> None:
    """Finds before training what would stop the merge or the push after it; asks the Hub, too. On one process alone.

    Raises:
        SettingsError: `--push_to_hub` without a repository or a licence, or with one that is none; no token; an adapter
            that nobody else could load; a merged/ in the way of `--merge_after_training`.
        DataError: no held-out pairs for the merge's proof.
        HubError: the token may not write there, or the repository is not as private as the run's model is to be.
    """
    training, licence = settings.training, settings.data.hub_license
    if settings.data.merge_after_training:
        _check_merge(settings)
    if not training.push_to_hub:
        return
    if "/" not in (training.hub_model_id or ""):
        raise SettingsError(
            f"--push_to_hub, and hub_model_id is {training.hub_model_id or 'not set'}",
            expected="where the model goes",
            do="--hub_model_id USER/NAME",
        )
    if licence is None:
        raise SettingsError(
            "--push_to_hub, and no licence", expected="the model's licence", do="--hub_license apache-2.0, or another"
        )
    if licence == "other":
        raise SettingsError(
            "--hub_license other: its name and its text have no flags here",
            expected="a licence that the Hub knows",
            do="train without --push_to_hub; then dpokit card RUN --license other --license-name NAME --license-link "
            f"URL --repo-id {training.hub_model_id}, and dpokit push RUN",
        )
    check_licence(licence)
    _check_base(settings)
    check_target(find_target(settings), token=training.hub_token)


def _check_merge(settings: Settings) -> None:
    """Raises SettingsError for a merged/ in the way, DataError where nothing is held out for the proof."""
    data, merged = settings.data, RunDir(settings.training.output_dir).merged
    if merged.exists() and not data.overwrite_run:
        raise SettingsError(
            f"--merge_after_training, and {merged} is there already",
            expected="a folder without it: what training ends with takes its place",
            do=f"delete {merged} or move it away, or leave --merge_after_training out",
        )
    if settings.training.eval_strategy == "no" and data.eval_fraction is None:  # else training needs the pairs, too
        splits = load_splits(data.dataset_name, data.dataset_config, streaming=False)
        if data.dataset_test_split not in splits:
            raise DataError(
                f"--merge_after_training, and no pairs for its proof: there is no split {data.dataset_test_split!r}",
                expected=f"--dataset_test_split {' or '.join(splits)}, or --eval_fraction 0.05",
                do="name one, or train without --merge_after_training, then dpokit merge RUN --no-proof",
            )


def _check_base(settings: Settings) -> None:
    """Raises SettingsError for an adapter that would be sent alone, and whose base is a folder of this machine."""
    model = settings.model
    name = str(model.model_name_or_path)
    if not model.use_peft or settings.data.merge_after_training or not is_on_disk(name):
        return
    base = find_base(model) or name
    if is_on_disk(base):
        raise SettingsError(
            f"--push_to_hub would send an adapter whose base is {base}, a folder of this machine",
            expected="a base that those who load the adapter can load, too",
            do="--merge_after_training; or train without --push_to_hub, then dpokit push RUN --base-model ID",
        )


def find_target(settings: Settings) -> Target:
    """Where `--push_to_hub` sends the model."""
    training = settings.training
    public = training.hub_private_repo is False
    return Target(str(training.hub_model_id), public=public, revision=training.hub_revision)


def find_commands(run: RunDir, settings: Settings) -> Iterator[list[str]]:
    """The verbs that the settings ask for, in the order in which they stand on each other, as words."""
    training, folder = settings.training, str(run.path)
    trust = ["--trust_remote_code", "true"] if training.trust_remote_code else []  # no run folder can grant it
    if training.push_to_hub and training.eval_strategy != "no":
        yield ["evaluate", folder, *EVALUATED, *trust]
    if settings.data.merge_after_training:
        yield ["merge", folder, *trust]
    if training.push_to_hub:
        words = ["push", folder, "--repo-id", str(training.hub_model_id), "--license", str(settings.data.hub_license)]
        yield [*words, *find_target(settings).flags(), "--yes"]


def run_commands(
    commands: Sequence[Sequence[str]], *, token: str | None = None, asked_to_end: str | None = None
) -> None:
    """Runs the verbs one after the other. On one process alone, once the others are let go.

    Args:
        commands: of `find_commands`.
        token: of the Hub, where it was given as a flag; the verbs read it from their environment.
        asked_to_end: the signal that came while the run ended by itself: none of the verbs is begun.

    Raises:
        ReleaseError: one ended early; what it said stands on the screen.
        Interrupted: a signal came; the verb that was running has ended.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    environment |= {"HF_TOKEN": token} if token else {}
    for place, words in enumerate(commands):
        rest = " && ".join(f"dpokit {shlex.join(command)}" for command in commands[place:])
        try:
            if asked_to_end is not None:
                raise Interrupted(asked_to_end)
            say(f"\n$ dpokit {shlex.join(words)}")
            code = _run_verb([*PYTHON, "-m", "dpokit.cli", *words], environment)
        except Interrupted as end:
            end.advice = f"the run itself is finished, its weights are kept; to go on: {rest}"
            raise
        if code != 0:
            raise ReleaseError(
                f"dpokit {words[0]} ended with {code}; the run itself is finished, its weights are kept",
                expected="what its own message says",
                do=f"mend that, then: {rest}",
            )


def _run_verb(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Returns a verb's exit code. Raises: Interrupted on a signal, after the verb has ended, too."""
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        except Interrupted:
            process.terminate()  # Ctrl-C in a terminal has reached it already
            process.wait()
            raise
