"""Reads the arguments of `accelerate launch` without torch: the recipe, its run folder, the processes of each node.

launch/train.sbatch calls `python -m dpokit.cluster.command ARGUMENTS` and evaluates its output, shell assignments.
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

# Below the ports that the system assigns itself, above those of well-known services.
FIRST_PORT, PORTS = 15000, 15000


@dataclass(frozen=True)
class Command:
    """The arguments of `accelerate launch`.

    Attributes:
        launcher: the launcher's own flags.
        recipe: the recipe's file.
        flags: the training flags.
    """

    launcher: tuple[str, ...]
    recipe: Path
    flags: tuple[str, ...]

    def find_launcher_flag(self, name: str) -> str | None:
        """The value of a launcher flag; None if it is not set."""
        return _find_flag(self.launcher, name)

    def find_setting(self, name: str) -> Any:
        """A setting's value from the command line, else the YAML file, else the recipe; None if no layer sets it.

        Raises: SettingsError if the YAML file or the recipe cannot be read.
        """
        flag = _find_flag(self.flags, name)
        if flag is not None:
            return flag
        config = _find_flag(self.flags, "config")
        file_settings = {} if config is None else read_yaml(config, "--config")
        return file_settings[name] if name in file_settings else read_defaults(self.recipe).get(name)

    def is_set(self, name: str) -> bool:
        """Whether a switch is on in the layer that sets it."""
        return str(self.find_setting(name)).lower() in ("true", "yes", "t", "y", "1")

    def run_folder(self) -> RunDir:
        """The run's folder. Raises: SettingsError if no layer sets it."""
        folder = self.find_setting("output_dir")
        if not folder:
            raise SettingsError(
                f"neither the command line nor {self.recipe} sets the run folder",
                expected="an output_dir: the job must find the run folder again",
                do="add --output_dir runs/NAME after the recipe",
            )
        return RunDir(str(folder))


def split_arguments(arguments: Sequence[str]) -> Command:
    """Launcher flags, recipe and training flags. Raises: SettingsError if no argument is a recipe."""
    for place, argument in enumerate(arguments):
        if argument.endswith(".py"):
            if not Path(argument).is_file():
                raise SettingsError(
                    f"there is no file {argument} in {Path.cwd()}",
                    expected="a recipe",
                    do="submit from the folder that holds recipes/, or give the recipe's full path",
                )
            return Command(tuple(arguments[:place]), Path(argument), tuple(arguments[place + 1 :]))
    raise SettingsError(
        f"no recipe in: {shlex.join(arguments) or '(nothing)'}",
        expected="the same arguments as accelerate launch",
        do="sbatch launch/train.sbatch --config_file accelerate_configs/ddp.yaml recipes/dpo_gpt2.py --beta 0.2",
    )


def find_processes(command: Command, *, nodes: int, environment: Mapping[str, str]) -> int | None:
    """How many processes each node starts; None lets the launcher decide (only for one node).

    The number is `DPOKIT_PROCESSES_PER_NODE`, else that of the placement's file, else the node's GPUs under Slurm.

    Raises:
        SettingsError: several nodes with a placement for one process.
        MachineError: several nodes, and the number of processes of each is unknown.
    """
    placement = read_placement(command)
    if nodes > 1 and placement.get("distributed_type", "NO") in ("NO", False):
        name = command.find_launcher_flag("config_file")
        raise SettingsError(
            f"{nodes} nodes, and {name or 'no placement (--config_file)'}: each node would train alone",
            expected="a placement for many processes",
            do="--config_file accelerate_configs/ddp.yaml or another file of that folder; for one process: --nodes 1",
        )
    sources = (
        environment.get("DPOKIT_PROCESSES_PER_NODE"),
        placement.get("num_processes"),
        environment.get("SLURM_GPUS_ON_NODE"),
    )
    numbers = [int(text) for text in map(str, sources) if text.isdigit() and int(text) > 0]
    if not numbers and nodes > 1:
        raise MachineError(
            f"{nodes} nodes, and the number of processes of each is not set",
            expected="GPUs that Slurm counts (--gpus-per-node), or the number of processes",
            do="sbatch --gpus-per-node=8, or DPOKIT_PROCESSES_PER_NODE=8",
        )
    return numbers[0] if numbers else None


def read_placement(command: Command) -> dict[str, Any]:
    """The settings of the placement's file; empty without one. Raises: SettingsError if it cannot be read."""
    name = command.find_launcher_flag("config_file")
    return {} if name is None else read_yaml(name, "--config_file")


def build_launcher_arguments(
    command: Command, *, nodes: int, address: str, environment: Mapping[str, str]
) -> list[str]:
    """The launcher flags that the job adds, equal on all nodes; the user's flags come after them and override them.

    Args:
        command: the user's arguments.
        nodes: the job's number of nodes.
        address: the first node's address.
        environment: Slurm's variables.
    """
    processes = find_processes(command, nodes=nodes, environment=environment)
    arguments = [] if processes is None else ["--num_processes", str(processes * nodes)]
    if nodes > 1 or (processes or 2) > 1:
        arguments += ["--main_process_port", str(find_port(environment))]
    if nodes > 1:
        arguments += ["--num_machines", str(nodes), "--main_process_ip", address, "--rdzv_backend", "static"]
        if read_placement(command).get("distributed_type") == "DEEPSPEED":
            # accelerate's default for several machines is pdsh, which uses ssh; Slurm has already started every node.
            arguments += ["--deepspeed_multinode_launcher", "standard"]
    return arguments


def find_port(environment: Mapping[str, str]) -> int:
    """A port for this start of this job: an earlier start may still hold its own port."""
    job, start = (int(environment.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return FIRST_PORT + (job * 13 + start) % PORTS


def build_restart_flags(command: Command, status: Status) -> list[str]:
    """The training flags that a restart adds to those of the first start, because the folder has changed since.

    A restart never deletes the run, and it resumes from the run's own checkpoint if there is one.
    """
    flags = []
    if command.is_set("overwrite_run"):
        flags += ["--overwrite_run", "false"]
    if status.state != "none":
        setting = command.find_setting("resume_from_checkpoint")
        if setting == "never" or (setting not in (None, "auto") and status.good_step is not None):
            flags += ["--resume_from_checkpoint", "auto"]
    return flags


def collect_job_variables(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, str | list[str]]:
    """The shell variables of launch/train.sbatch.

    `run` (the folder), `began` (its number of starts so far), `finished` (`yes` if the run is complete), `notice` (the
    signal that makes the run save and end), `words` (the arguments of `accelerate launch` except the machine's rank).

    Raises:
        DpokitError: the arguments start no run, or conflict with this job.
    """
    index = environment.get("SLURM_ARRAY_TASK_ID")
    command = split_arguments([argument.replace("%a", index) for argument in arguments] if index else arguments)
    run = command.run_folder()
    status = read_status(run)
    is_restart = int(environment.get("SLURM_RESTART_COUNT") or 0) > 0
    # With overwrite_run the finished run may be the one to overwrite: then the run itself decides and reports it.
    is_finished = is_restart and status.state == "finished" and not command.is_set("overwrite_run")
    job_arguments = build_launcher_arguments(
        command,
        nodes=int(environment.get("SLURM_NNODES") or 1),
        address=environment.get("MASTER_ADDR", ""),
        environment=environment,
    )
    restart_arguments = build_restart_flags(command, status) if is_restart else []
    return {
        "run": str(run.path),
        "began": str(status.began),
        "finished": "yes" if is_finished else "",
        "notice": str(command.find_setting("preempt_signal") or "SIGUSR1").upper().removeprefix("SIG"),
        "words": [*job_arguments, *command.launcher, str(command.recipe), *command.flags, *restart_arguments],
    }


def format_for_shell(values: Mapping[str, str | list[str]]) -> str:
    """Shell assignments, quoted so that bash reads back every value unchanged."""
    return "\n".join(
        f"{name}={shlex.quote(value)}" if isinstance(value, str) else f"{name}=({shlex.join(value)})"
        for name, value in values.items()
    )


def _find_flag(arguments: Sequence[str], name: str) -> str | None:
    """The last value of `--name value` or `--name=value`, in underscores or dashes; a bare switch is `true`."""
    last_value = None
    for place, argument in enumerate(arguments):
        next_argument = arguments[place + 1] if place + 1 < len(arguments) else "--"
        flag, has_value, value = argument.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            last_value = value if has_value else "true" if next_argument.startswith("--") else next_argument
    return last_value


def main() -> None:
    """Prints the shell variables for the command line; for a user error it prints one message and exits with code 2."""
    try:
        print(format_for_shell(collect_job_variables(sys.argv[1:], os.environ)))
    except DpokitError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
