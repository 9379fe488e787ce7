"""`dpokit submit`: adds a job's lines to launch/train.sbatch, checks the job and queues it. No torch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dpokit.cluster.command import Command, read_placement, split_arguments
from dpokit.cluster.status import MAX_RESTARTS
from dpokit.credentials import SECRET_SETTING, SECRET_VARIABLE, find_secrets
from dpokit.errors import MachineError, RunFolderError, SettingsError
from dpokit.run_names import check_file_name
from dpokit.rundir import RunDir

BODY = Path("launch") / "train.sbatch"
# train.sbatch has the same value; the job's own line comes after it and overrides it.
SIGNAL_SECONDS = 300


@dataclass(frozen=True)
class SlurmJob:
    """A run under Slurm: its recipe and flags, and its options of sbatch.

    Attributes:
        recipe: the recipe's file.
        config_file: the placement's file.
        flags: the training flags.
        nodes, gpus_per_node: as in sbatch; 0 GPUs for a run on CPUs.
        processes_per_node: None takes the number from the placement or the GPUs.
        cpus_per_task, mem: CPUs and memory of each node, as in sbatch, because a job has one task on each node.
        partition, account, qos, time, array, job_name: as in sbatch.
        output: the job's log, as in sbatch; None takes sbatch's own default.
        setup: a file that the job sources before anything else; None for none.
        exclusive: the job shares its nodes with no other job.
        signal_seconds: how many seconds before the time limit Slurm signals the run to save and end.
        max_restarts: how many crashes lead to another start.
        sbatch: further options of sbatch, each one argument: `--constraint=h100`.
    """

    recipe: Path
    config_file: Path
    flags: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    array: str | None = None
    exclusive: bool = False
    job_name: str | None = None
    output: str | None = None
    setup: Path | None = None
    signal_seconds: int = SIGNAL_SECONDS
    max_restarts: int = MAX_RESTARTS
    sbatch: tuple[str, ...] = ()

    def arguments(self) -> tuple[str, ...]:
        """The arguments of `accelerate launch`."""
        return ("--config_file", str(self.config_file), str(self.recipe), *self.flags)

    def command(self) -> Command:
        """The arguments as the job will read them; for an array, as its first job will."""
        first = re.match(r"\d+", self.array or "")
        return split_arguments(
            [word.replace("%a", first[0]) for word in self.arguments()] if first else self.arguments()
        )

    def options(self) -> list[str]:
        """The job's own options of sbatch, each one argument."""
        named = {
            "job-name": self.job_name or self.recipe.stem,
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "array": self.array,
            "output": self.output,
            "signal": f"B:USR1@{self.signal_seconds}",
        }
        options = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return [*options, *(["--exclusive"] if self.exclusive else []), *self.sbatch]


def render_job(job: SlurmJob) -> str:
    """The job script for sbatch: train.sbatch with the job's own lines before its first command.

    Raises:
        SettingsError: an option that no #SBATCH line can hold, or a secret, which Slurm would store and show.
        MachineError: train.sbatch does not exist.
    """
    _check_secrets(job)
    lines = find_body().read_text().splitlines()
    # sbatch reads options up to the first command; the later of two equal options wins.
    last_option = max(place for place, line in enumerate(lines) if line.startswith("#SBATCH"))
    first_command = next(place for place, line in enumerate(lines) if line and not line.startswith("#"))
    variables = [f"DPOKIT_MAX_RESTARTS={job.max_restarts}", f"DPOKIT_PYTHON={shlex.quote(sys.executable)}"]
    if job.processes_per_node is not None:
        variables.append(f"DPOKIT_PROCESSES_PER_NODE={job.processes_per_node}")
    if job.setup is not None:
        variables.append(f"DPOKIT_SETUP={shlex.quote(str(job.setup.absolute()))}")
    job_lines = [f"export {' '.join(variables)}", f"set -- {shlex.join(job.arguments())}"]
    return "\n".join(
        [
            *lines[: last_option + 1],
            *(_option_line(option) for option in job.options()),
            *lines[last_option + 1 : first_command],
            *job_lines,
            *lines[first_command:],
            "",
        ]
    )


def _find_job_secrets(job: SlurmJob) -> list[str]:
    """The job's flags, variables and values that are secrets by their name or form."""
    flags = [word.partition("=")[0] for word in job.flags if word.startswith("--")]
    secrets = [name for name in flags if name.replace("-", "_").endswith(SECRET_SETTING)]
    for option in job.options():
        assignments = (part.partition("=") for part in option.partition("=")[2].split(","))  # --export=A=1,B=2
        secrets += [name for name, _, value in assignments if value and SECRET_VARIABLE.search(name)]
    return secrets + find_secrets("\n".join([*job.options(), *job.arguments()]))


def _check_secrets(job: SlurmJob) -> None:
    """Raises SettingsError if the job script would hold a secret."""
    secrets = _find_job_secrets(job)
    if secrets:
        raise SettingsError(
            f"the job script would hold a secret ({secrets[0]}); Slurm stores the script and shows it",
            expected="a job without secrets",
            do="export HF_TOKEN or WANDB_API_KEY before dpokit submit, as sbatch passes variables on; or log in on the "
            "nodes with `hf auth login`",
        )


def _option_line(option: str) -> str:
    name, equals, value = option.partition("=")
    if not re.fullmatch(r"--[a-z][a-z0-9-]*", name):
        raise SettingsError(
            f"--sbatch={option!r} is not a long option of sbatch in one argument",
            expected="a long option, with its value after an equals sign",
            do="--sbatch=--constraint=h100",
        )
    if any(ord(letter) < 32 for letter in value) or '"' in value or "\\" in value:
        raise SettingsError(
            f"{name} has a line break, a double quote or a backslash: {value!r}",
            expected="a value that a #SBATCH line can hold",
            do="write it without these, or call sbatch yourself with this option and launch/train.sbatch",
        )
    plain = re.fullmatch(r"[\w@%+=:,./~\[\]*-]*", value, re.ASCII)
    return f"#SBATCH {name}{equals}{value}" if plain else f'#SBATCH {name}{equals}"{value}"'


def find_body() -> Path:
    """The path of launch/train.sbatch, here or in the source tree. Raises: MachineError if neither has it."""
    for folder in (Path(), Path(__file__).parents[3]):
        if (folder / BODY).is_file():
            return folder / BODY
    raise MachineError(
        f"there is no {BODY} in {Path.cwd()} or beside the package",
        expected="the folder of a clone, or an installation from one (pip install -e .)",
        do="run dpokit submit in the clone",
    )


def check_job(job: SlurmJob) -> None:
    """Checks a job before it is queued, except its training flags, whose check needs torch.

    Raises:
        SettingsError: an invalid placement, array, time, number or set-up file.
        RunFolderError: the run folder is not writable, or holds a finished run.
    """
    _check_numbers(job)
    if job.setup is not None:
        check_setup(job.setup)
    check_file_name(job.config_file, "--config-file")
    command = job.command()
    placement = read_placement(command)
    if placement.get("distributed_type", "NO") in ("NO", False) and (job.nodes > 1 or job.gpus_per_node > 1):
        raise SettingsError(
            f"{job.nodes} nodes with {job.gpus_per_node} GPUs each, but a placement for one process "
            f"({job.config_file})",
            expected="a placement for many processes",
            do="--config-file accelerate_configs/ddp.yaml or another file of that folder",
        )
    if placement.get("num_processes") == "gpu" and not (job.gpus_per_node or job.processes_per_node):
        raise SettingsError(
            f"{job.config_file} takes all GPUs of a node, and the job requests none",
            expected="GPUs for the job, or a placement on CPUs",
            do="--gpus-per-node 8, or --config-file accelerate_configs/ddp_cpu.yaml; if your site assigns GPUs by "
            "another option: --processes-per-node 8",
        )
    run = command.run_folder()
    _check_array(job, run)
    resumes = command.find_setting("resume_from_checkpoint") not in (None, "never")
    check_folder(run, finished_allowed=resumes or command.is_set("overwrite_run"))


def _check_numbers(job: SlurmJob) -> None:
    numbers = {
        "nodes": (job.nodes, 1),
        "gpus-per-node": (job.gpus_per_node, 0),
        "processes-per-node": (job.processes_per_node, 1),
        "cpus-per-task": (job.cpus_per_task, 1),
        "signal-seconds": (job.signal_seconds, 1),
        "max-restarts": (job.max_restarts, 0),
    }
    for name, (number, least) in numbers.items():
        if number is not None and number < least:
            raise SettingsError(f"--{name} is {number}", expected=f"at least {least}", do=f"correct --{name}")
    if job.mem is not None and job.mem.isdigit() and int(job.mem) > 0:
        raise SettingsError(
            f"--mem {job.mem} has no unit: Slurm would give each node {job.mem} megabytes",
            expected="a number and a unit; 0 for all memory of a node",
            do=f"--mem {job.mem}G for gigabytes, or --mem {job.mem}M",
        )
    limit = None if job.time is None else parse_seconds(job.time)
    if limit is not None and limit <= job.signal_seconds:
        raise SettingsError(
            f"--time {job.time} is {limit} s, and the run is to end {job.signal_seconds} s before that limit: at once",
            expected="a --time above --signal-seconds",
            do="raise --time, or set --signal-seconds 60, enough for a step and a checkpoint",
        )


def check_setup(path: Path) -> None:
    """Raises SettingsError if the set-up file does not exist or bash cannot parse it."""
    if not path.is_file():
        raise SettingsError(
            f"--setup {path}: there is no such file",
            expected="a file of shell commands, on a disk that all nodes share",
            do="write one, such as: module load cuda",
        )
    parsed = subprocess.run(["bash", "-n", str(path.absolute())], capture_output=True, text=True, check=False)
    if parsed.returncode != 0:
        raise SettingsError(
            f"--setup {path} is no script that bash reads: {' '.join(parsed.stderr.split())[:500]}",
            expected="shell commands, such as: module load cuda",
            do="correct the line that bash names",
        )


def parse_seconds(text: str) -> int | None:
    """A time of Slurm in seconds; None without a limit. Raises: SettingsError if Slurm would not accept it."""
    if text.lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?)|(?:(?:(\d+):)?(\d+):(\d+))|(\d+)", text)
    if match is None:
        raise SettingsError(
            f"--time {text!r} is not a time that Slurm reads",
            expected="minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]",
            do="--time 8:00:00, or --time 2-00 for two days",
        )
    days, hours, minutes, seconds, clock_hours, clock_minutes, clock_seconds, bare_minutes = (
        int(x or 0) for x in match.groups()
    )
    clock = (clock_hours * 60 + clock_minutes) * 60 + clock_seconds
    return ((days * 24 + hours) * 60 + minutes + bare_minutes) * 60 + seconds + clock


def _check_array(job: SlurmJob, run: RunDir) -> None:
    if job.array is None:
        return
    if not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", job.array):
        raise SettingsError(
            f"--array {job.array!r} is not an array that Slurm reads",
            expected="indices, ranges, and the number of jobs that may run at once",
            do="--array 0-7, or --array 0,2,4%2",
        )
    if run.path == RunDir(str(split_arguments(job.arguments()).find_setting("output_dir"))).path:
        raise SettingsError(
            f"every job of --array {job.array} would write to {run.path}",
            expected="a run folder for each job",
            do="--output_dir runs/NAME_%a --seed %a: each job replaces %a with its index",
        )


def check_folder(run: RunDir, *, finished_allowed: bool) -> None:
    """Raises RunFolderError if the folder is not writable or holds a finished run; creates nothing.

    Args:
        run: the folder.
        finished_allowed: whether the folder may hold a finished run, because the flags resume or overwrite it.
    """
    nearest = run.path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "is not writable" if nearest.is_dir() else "is a file"
        raise RunFolderError(
            f"{run.path} cannot be created: {nearest} {reason}",
            expected="a folder that the job can write to from every node",
            do="choose another --output_dir",
        )
    if not finished_allowed and (run.read_run() or {}).get("state") == "finished":
        raise RunFolderError(
            f"{run.path} holds a finished run",
            expected="an empty or a new folder",
            do="choose another --output_dir, or --overwrite_run true; to continue it: --resume_from_checkpoint auto",
        )


def submit_text(text: str) -> str:
    """Queues a job script and returns the job's id. Raises: MachineError if sbatch is missing or refuses the job."""
    if shutil.which("sbatch") is None:
        raise MachineError(
            "there is no sbatch on this machine",
            expected="Slurm's commands: a login node of the cluster",
            do="log in there; --dry-run prints the job script on any machine",
        )
    done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MachineError(
            f"sbatch refused the job: {' '.join(done.stderr.split())}",
            expected="a job that this cluster accepts",
            do="correct the option that sbatch names; --dry-run prints the job script",
        )
    return done.stdout.strip().partition(";")[0]  # after a semicolon comes the cluster's name
