"""What follows training where it was asked for: evaluate, merge, card and push.

Each is the verb, in a program of its own. The run's process still has its model's memory, and what launchers and
accelerate told it of other processes; a verb begins without both. And where one fails, its command is what goes on.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence

from dpokit.errors import ReleaseError, SettingsError
from dpokit.release.access import check_push
from dpokit.release.front_matter import check_licence
from dpokit.rundir import RunDir
from dpokit.screen import say
from dpokit.settings import Settings

# Enough for intervals of some 4 % and a few samples in the card; `dpokit evaluate RUN` looks at all.
EVALUATED = ("--limit", "500", "--answers", "8", "--max-new-tokens", "128")
# What torchrun and accelerate tell the processes that they start.
OF_LAUNCHERS = (
    *("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_", "DEEPSPEED_", "PET_", "GROUP_", "ROLE_"),
    *("MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"),
)


def check_wishes(settings: Settings) -> None:
    """Asks the Hub before training whether it would take the model afterwards. On one process alone.

    Raises:
        SettingsError: `--push_to_hub` without a repository or a licence, or with one that is none; no token.
        HubError: the token may not write there.
    """
    training, licence = settings.training, settings.data.hub_license
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
    check_licence(licence)
    check_push(str(training.hub_model_id), token=training.hub_token)


def find_commands(run: RunDir, settings: Settings) -> Iterator[list[str]]:
    """The verbs that the settings ask for, in the order in which they stand on each other, as words."""
    training, folder = settings.training, str(run.path)
    if training.push_to_hub and training.eval_strategy != "no":
        yield ["evaluate", folder, *EVALUATED]
    if settings.data.merge_after_training:
        yield ["merge", folder]
    if training.push_to_hub:
        words = ["push", folder, "--repo-id", str(training.hub_model_id), "--license", str(settings.data.hub_license)]
        words += ["--public"] if training.hub_private_repo is False else []
        words += ["--revision", training.hub_revision] if training.hub_revision else []
        yield [*words, "--yes"]


def run_commands(commands: Sequence[Sequence[str]], *, token: str | None = None) -> None:
    """Runs the verbs one after the other. On one process alone, once the others are let go.

    Args:
        commands: of `find_commands`.
        token: of the Hub, where it was given as a flag; the verbs read it from their environment.

    Raises: ReleaseError: one ended early; what it said stands on the screen.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    environment |= {"HF_TOKEN": token} if token else {}
    for place, words in enumerate(commands):
        say(f"\n$ dpokit {shlex.join(words)}")
        done = subprocess.run([sys.executable, "-m", "dpokit.cli", *words], env=environment, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            rest = " && ".join(f"dpokit {shlex.join(command)}" for command in commands[place:])
            raise ReleaseError(
                f"dpokit {words[0]} ended with {done.returncode}; the run itself is finished, its weights are kept",
                expected="what its own message says",
                do=f"mend that, then: {rest}",
            )
