"""What stands behind `accelerate launch`, read without torch: the recipe, its run folder, processes a node.

`python -m dpokit.cluster.command WORDS` is what launch/train.sbatch asks before it launches; it answers in shell.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpokit.cluster.status import Status, read_status
from dpokit.errors import DpokitError, MachineError, SettingsError
from dpokit.rundir import RunDir
from dpokit.settings.layers import read_defaults, read_yaml

# Below the ports that a system hands out by itself, above those of known services.
FIRST_PORT, PORTS = 15000, 15000


@dataclass(frozen=True)
class Command:
    """The words behind `accelerate launch`.

    Attributes:
        launcher: the launcher's own flags.
        recipe: the recipe's file.
        flags: the training flags.
    """

    launcher: tuple[str, ...]
    recipe: Path
    flags: tuple[str, ...]

    def find_launcher_flag(self, name: str) -> str | None:
        """What the launcher is told; None where the flag is not there."""
        return _find_flag(self.launcher, name)

    def find_setting(self, name: str) -> Any:
        """A setting's value by the layers of a run: command line, YAML file, recipe; None where none has it.

        Raises: SettingsError where the YAML file or the recipe cannot be read.
        """
        given = _find_flag(self.flags, name)
        if given is not None:
            return given
        config = _find_flag(self.flags, "config")
        written = {} if config is None else read_yaml(config, "--config")
        return written[name] if name in written else read_defaults(self.recipe).get(name)

    def is_set(self, name: str) -> bool:
        """Whether a switch is on, in whichever layer."""
        return str(self.find_setting(name)).lower() in ("true", "yes", "t", "y", "1")

    def run_folder(self) -> RunDir:
        """The folder the run will have. Raises: SettingsError where no layer names it."""
        folder = self.find_setting("output_dir")
        if not folder:
            raise SettingsError(
                f"neither the command line nor {self.recipe} says where the run will be",
                expected="an output_dir: the job must find the run folder again",
                do="add --output_dir runs/NAME behind the recipe",
            )
        return RunDir(str(folder))


def split_words(words: Sequence[str]) -> Command:
    """Launcher flags, recipe, training flags. Raises: SettingsError where no word is a recipe."""
    for place, word in enumerate(words):
        if word.endswith(".py"):
            if not Path(word).is_file():
                raise SettingsError(
                    f"there is no file {word} in {Path.cwd()}",
                    expected="a recipe",
                    do="submit from the folder that holds recipes/, or give the recipe's whole path",
                )
            return Command(tuple(words[:place]), Path(word), tuple(words[place + 1 :]))
    raise SettingsError(
        f"no recipe in: {shlex.join(words) or '(nothing)'}",
        expected="the words that would stand behind accelerate launch",
        do="sbatch launch/train.sbatch --config_file accelerate_configs/ddp.yaml recipes/dpo_gpt2.py --beta 0.2",
    )


def find_processes(command: Command, *, nodes: int, environment: Mapping[str, str]) -> int | None:
    """How many processes each node starts; None leaves it to the launcher (one node alone).

    `DPOKIT_PROCESSES_PER_NODE`, else a number in the placement's file, else the GPUs that Slurm gave the node.

    Raises:
        SettingsError: several nodes, and a placement that is for one process.
        MachineError: several nodes, and nobody says how many processes each has.
    """
    placement = read_placement(command)
    if nodes > 1 and placement.get("distributed_type", "NO") in ("NO", False):
        name = command.find_launcher_flag("config_file")
        raise SettingsError(
            f"{nodes} nodes, and {name or 'no placement (--config_file)'}: each node would train alone",
            expected="a placement for many processes",
            do="--config_file accelerate_configs/ddp.yaml, or another of that folder; for one process: --nodes 1",
        )
    known = (
        environment.get("DPOKIT_PROCESSES_PER_NODE"),
        placement.get("num_processes"),
        environment.get("SLURM_GPUS_ON_NODE"),
    )
    numbers = [int(text) for text in map(str, known) if text.isdigit() and int(text) > 0]
    if not numbers and nodes > 1:
        raise MachineError(
            f"{nodes} nodes, and nobody says how many processes each of them starts",
            expected="GPUs that Slurm counts (--gpus-per-node), or a number",
            do="sbatch --gpus-per-node=8, or DPOKIT_PROCESSES_PER_NODE=8",
        )
    return numbers[0] if numbers else None


def read_placement(command: Command) -> dict[str, Any]:
    """The placement's file; empty without one. Raises: SettingsError where it cannot be read."""
    name = command.find_launcher_flag("config_file")
    return {} if name is None else read_yaml(name, "--config_file")


def launcher_words(command: Command, *, nodes: int, address: str, environment: Mapping[str, str]) -> list[str]:
    """What this job adds to the launcher's flags, the same on all nodes; whatever the user wrote comes after it.

    Args:
        command: the words of the user.
        nodes: of the job.
        address: of the first node.
        environment: Slurm's variables.
    """
    processes = find_processes(command, nodes=nodes, environment=environment)
    words = [] if processes is None else ["--num_processes", str(processes * nodes)]
    if nodes > 1 or (processes or 2) > 1:
        words += ["--main_process_port", str(find_port(environment))]
    if nodes > 1:
        words += ["--num_machines", str(nodes), "--main_process_ip", address, "--rdzv_backend", "static"]
        if read_placement(command).get("distributed_type") == "DEEPSPEED":
            # accelerate's default for several machines is pdsh, which logs in by ssh; Slurm has started us everywhere.
            words += ["--deepspeed_multinode_launcher", "standard"]
    return words


def find_port(environment: Mapping[str, str]) -> int:
    """A port of this job and this start: a former start may still hold its own."""
    job, start = (int(environment.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return FIRST_PORT + (job * 13 + start) % PORTS


def restart_flags(command: Command, status: Status) -> list[str]:
    """What a restarted job adds to the training flags: the flags are those of the first start, the folder is not.

    A restart deletes no run, whatever the flags say, and goes on from the run's own checkpoint where there is one.
    """
    flags = []
    if command.is_set("overwrite_run"):
        flags += ["--overwrite_run", "false"]
    if status.state != "none":
        asked = command.find_setting("resume_from_checkpoint")
        if asked == "never" or (asked not in (None, "auto") and status.good_step is not None):
            flags += ["--resume_from_checkpoint", "auto"]
    return flags


def facts(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, str | list[str]]:
    """What launch/train.sbatch must know, under the names of its variables.

    `run` (the folder), `began` (its starts so far), `finished` (`yes` where nothing is left to be done), `notice` (the
    signal that means: save and end), `words` (those behind `accelerate launch`, but for the rank of the machine).

    Raises:
        DpokitError: the words are no command of a run, or do not suit this job.
    """
    index = environment.get("SLURM_ARRAY_TASK_ID")
    command = split_words([word.replace("%a", index) for word in words] if index else words)
    run = command.run_folder()
    status = read_status(run)
    restarted = int(environment.get("SLURM_RESTART_COUNT") or 0) > 0
    # A finished run that was to be overwritten may be the old one: then the run itself decides, and says so.
    over = restarted and status.state == "finished" and not command.is_set("overwrite_run")
    ours = launcher_words(
        command,
        nodes=int(environment.get("SLURM_NNODES") or 1),
        address=environment.get("MASTER_ADDR", ""),
        environment=environment,
    )
    again = restart_flags(command, status) if restarted else []
    return {
        "run": str(run.path),
        "began": str(status.generations),
        "finished": "yes" if over else "",
        "notice": str(command.find_setting("preempt_signal") or "SIGUSR1").upper().removeprefix("SIG"),
        "words": [*ours, *command.launcher, str(command.recipe), *command.flags, *again],
    }


def in_shell(values: Mapping[str, str | list[str]]) -> str:
    """Assignments that bash reads back as they were, whatever the values hold."""
    return "\n".join(
        f"{name}={shlex.quote(value)}" if isinstance(value, str) else f"{name}=({shlex.join(value)})"
        for name, value in values.items()
    )


def _find_flag(words: Sequence[str], name: str) -> str | None:
    """The last value of `--name value` or `--name=value`, with underscores or dashes; a bare switch is `true`."""
    found = None
    for place, word in enumerate(words):
        after = words[place + 1] if place + 1 < len(words) else "--"
        flag, has_value, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            found = value if has_value else "true" if after.startswith("--") else after
    return found


def main() -> None:
    """Prints the facts for the words of the command line; a mistake is one message and exit code 2."""
    try:
        print(in_shell(facts(sys.argv[1:], os.environ)))
    except DpokitError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
