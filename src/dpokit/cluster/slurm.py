"""`dpokit submit`: launch/train.sbatch with a job's own lines in it, checked before it is queued. No torch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dpokit.cluster.command import Command, read_placement, split_words
from dpokit.cluster.status import MAX_RESTARTS
from dpokit.credentials import SECRET_SETTING, SECRET_VARIABLE, find_secrets
from dpokit.errors import MachineError, RunFolderError, SettingsError
from dpokit.rundir import RunDir

BODY = Path("launch") / "train.sbatch"
# train.sbatch asks for the same; a job's own line stands behind it and wins.
SIGNAL_SECONDS = 300


@dataclass(frozen=True)
class Job:
    """What Slurm is asked for, and what runs there.

    Attributes:
        recipe: the recipe's file.
        config_file: the placement.
        flags: training flags.
        nodes, gpus_per_node: as Slurm has them; 0 GPUs for a job on processors.
        processes_per_node: None leaves it to the placement and the GPUs.
        partition, account, time, array, job_name: as Slurm has them.
        exclusive: whole nodes.
        signal_seconds: how long before the time limit the run is asked to save and end.
        max_restarts: crashes that are followed by another start.
        sbatch: further options of sbatch, each in one word, `--constraint=h100`.
    """

    recipe: Path
    config_file: Path
    flags: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    array: str | None = None
    exclusive: bool = False
    job_name: str | None = None
    signal_seconds: int = SIGNAL_SECONDS
    max_restarts: int = MAX_RESTARTS
    sbatch: tuple[str, ...] = ()

    def words(self) -> tuple[str, ...]:
        """What stands behind `accelerate launch`."""
        return ("--config_file", str(self.config_file), str(self.recipe), *self.flags)

    def command(self) -> Command:
        """The words as the job will read them; of an array, those of its first job."""
        first = re.match(r"\d+", self.array or "")
        return split_words([word.replace("%a", first[0]) for word in self.words()] if first else self.words())

    def options(self) -> list[str]:
        """The job's own options of sbatch, each in one word."""
        named = {
            "job-name": self.job_name or self.recipe.stem,
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node or None,
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "array": self.array,
            "signal": f"B:USR1@{self.signal_seconds}",
        }
        given = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return [*given, *(["--exclusive"] if self.exclusive else []), *self.sbatch]


def render_job(job: Job) -> str:
    """The text that sbatch gets: train.sbatch, and the job's own lines where its first command would stand.

    Raises:
        SettingsError: an option that a line of its own cannot hold, or a secret, which Slurm would keep and show.
        MachineError: train.sbatch is not there.
    """
    _check_secrets(job)
    lines = find_body().read_text().splitlines()
    # sbatch reads options up to the first command, and of two that differ it takes the later.
    last_option = max(place for place, line in enumerate(lines) if line.startswith("#SBATCH"))
    first_command = next(place for place, line in enumerate(lines) if line and not line.startswith("#"))
    words = [f"DPOKIT_MAX_RESTARTS={job.max_restarts}", f"DPOKIT_PYTHON={shlex.quote(sys.executable)}"]
    if job.processes_per_node is not None:
        words.append(f"DPOKIT_PROCESSES_PER_NODE={job.processes_per_node}")
    own = [f"export {' '.join(words)}", f"set -- {shlex.join(job.words())}"]
    return "\n".join(
        [
            *lines[: last_option + 1],
            *(_option_line(option) for option in job.options()),
            *lines[last_option + 1 : first_command],
            *own,
            *lines[first_command:],
            "",
        ]
    )


def _find_job_secrets(job: Job) -> list[str]:
    """What among the job's flags and options is a secret, by its name or kind."""
    names = [word.partition("=")[0] for word in job.flags if word.startswith("--")]
    found = [name for name in names if name.replace("-", "_").endswith(SECRET_SETTING)]
    for option in job.options():
        assignments = (part.partition("=") for part in option.partition("=")[2].split(","))  # --export=A=1,B=2
        found += [name for name, _, value in assignments if value and SECRET_VARIABLE.search(name)]
    return found + find_secrets("\n".join([*job.options(), *job.words()]))


def _check_secrets(job: Job) -> None:
    """Raises SettingsError for a job whose text would hold a secret."""
    found = _find_job_secrets(job)
    if found:
        raise SettingsError(
            f"the job's text would hold a secret ({found[0]}); Slurm keeps the text and shows it",
            expected="a job without secrets",
            do="export HF_TOKEN or WANDB_API_KEY before dpokit submit, as sbatch passes variables on; or log in on the "
            "nodes with `hf auth login`",
        )


def _option_line(option: str) -> str:
    name, equals, value = option.partition("=")
    if not re.fullmatch(r"--[a-z][a-z0-9-]*", name):
        raise SettingsError(
            f"--sbatch={option!r} is no option of sbatch in one word",
            expected="a long option, with its value behind an equals sign",
            do="--sbatch=--constraint=h100",
        )
    if any(ord(letter) < 32 for letter in value) or '"' in value or "\\" in value:
        raise SettingsError(
            f"{name} has a line break, a double quote or a backslash: {value!r}",
            expected="a value that a #SBATCH line can hold",
            do="write it without those, or put the option on sbatch's own command line with launch/train.sbatch",
        )
    plain = re.fullmatch(r"[\w@%+=:,./~\[\]*-]*", value, re.ASCII)
    return f"#SBATCH {name}{equals}{value}" if plain else f'#SBATCH {name}{equals}"{value}"'


def find_body() -> Path:
    """launch/train.sbatch of this folder, or of the source tree. Raises: MachineError where neither has it."""
    for folder in (Path(), Path(__file__).parents[3]):
        if (folder / BODY).is_file():
            return folder / BODY
    raise MachineError(
        f"there is no {BODY} in {Path.cwd()}, nor beside the package",
        expected="the folder of a clone, or an installation from one (pip install -e .)",
        do="run dpokit submit in the clone",
    )


def check_job(job: Job) -> None:
    """What can be known before the job is queued, but for the training flags, which need torch.

    Raises:
        SettingsError: placement, array, time or numbers that cannot be.
        RunFolderError: the run folder cannot be written, or holds a finished run.
    """
    _check_numbers(job)
    if not job.config_file.is_file():
        there = ", ".join(sorted(path.stem for path in Path("accelerate_configs").glob("*.yaml"))) or "none"
        raise SettingsError(
            f"--config-file {job.config_file}: there is no such file",
            expected=f"a placement's file (in accelerate_configs: {there})",
            do="--config-file accelerate_configs/ddp.yaml",
        )
    command = job.command()
    placement = read_placement(command)
    if placement.get("distributed_type", "NO") in ("NO", False) and (job.nodes > 1 or job.gpus_per_node > 1):
        raise SettingsError(
            f"{job.nodes} nodes with {job.gpus_per_node} GPUs each, and a placement for one process "
            f"({job.config_file})",
            expected="a placement for many processes",
            do="--config-file accelerate_configs/ddp.yaml, or another of that folder",
        )
    if placement.get("num_processes") == "gpu" and not (job.gpus_per_node or job.processes_per_node):
        raise SettingsError(
            f"{job.config_file} takes all GPUs of a node, and the job asks for none",
            expected="GPUs for the job, or a placement on processors",
            do="--gpus-per-node 8, or --config-file accelerate_configs/ddp_cpu.yaml; where the site gives GPUs by an "
            "option of its own, --processes-per-node 8",
        )
    run = command.run_folder()
    _check_array(job, run)
    goes_on = command.find_setting("resume_from_checkpoint") not in (None, "never")
    check_folder(run, finished_too=goes_on or command.is_set("overwrite_run"))


def _check_numbers(job: Job) -> None:
    numbers = {
        "nodes": (job.nodes, 1),
        "gpus-per-node": (job.gpus_per_node, 0),
        "processes-per-node": (job.processes_per_node, 1),
        "signal-seconds": (job.signal_seconds, 1),
        "max-restarts": (job.max_restarts, 0),
    }
    for name, (number, least) in numbers.items():
        if number is not None and number < least:
            raise SettingsError(f"--{name} is {number}", expected=f"at least {least}", do=f"correct --{name}")
    limit = None if job.time is None else parse_seconds(job.time)
    if limit is not None and limit <= job.signal_seconds:
        raise SettingsError(
            f"--time {job.time} is {limit} s, and the run is to be asked to end {job.signal_seconds} s before: at once",
            expected="more time than --signal-seconds",
            do="raise --time, or --signal-seconds 60: long enough for a step and a checkpoint",
        )


def parse_seconds(text: str) -> int | None:
    """Slurm's time in seconds; None without a limit. Raises: SettingsError for what Slurm would not read."""
    if text.lower() in ("infinite", "unlimited"):
        return None
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?)|(?:(?:(\d+):)?(\d+):(\d+))|(\d+)", text)
    if found is None:
        raise SettingsError(
            f"--time {text!r} is no time of Slurm's",
            expected="minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]",
            do="--time 8:00:00, or --time 2-00 for two days",
        )
    days, hours, minutes, seconds, clock_hours, clock_minutes, clock_seconds, alone = (
        int(x or 0) for x in found.groups()
    )
    clock = (clock_hours * 60 + clock_minutes) * 60 + clock_seconds
    return ((days * 24 + hours) * 60 + minutes + alone) * 60 + seconds + clock


def _check_array(job: Job, run: RunDir) -> None:
    if job.array is None:
        return
    if not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", job.array):
        raise SettingsError(
            f"--array {job.array!r} is no array of Slurm's",
            expected="indices, ranges, and how many may run at once",
            do="--array 0-7, or --array 0,2,4%2",
        )
    if run.path == RunDir(str(split_words(job.words()).find_setting("output_dir"))).path:
        raise SettingsError(
            f"every job of --array {job.array} would write to {run.path}",
            expected="a run folder each",
            do="--output_dir runs/NAME_%a --seed %a: %a becomes the index of the job",
        )


def check_folder(run: RunDir, *, finished_too: bool) -> None:
    """Raises RunFolderError where the folder cannot be written or holds a finished run; makes nothing.

    Args:
        run: the folder.
        finished_too: the flags say what becomes of a finished run.
    """
    nearest = run.path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "may not be written" if nearest.is_dir() else "is a file"
        raise RunFolderError(
            f"{run.path} cannot be made: {nearest} {why}",
            expected="a folder that the job can write to, from every node",
            do="choose another --output_dir",
        )
    if not finished_too and (run.read_run() or {}).get("state") == "finished":
        raise RunFolderError(
            f"{run.path} holds a finished run",
            expected="an empty or a new folder",
            do="choose another --output_dir, or --overwrite_run true; to go on with it: --resume_from_checkpoint auto",
        )


def submit_text(text: str) -> str:
    """Queues the text; the job's id. Raises: MachineError without an sbatch, or with its words where it refuses."""
    if shutil.which("sbatch") is None:
        raise MachineError(
            "there is no sbatch on this machine",
            expected="Slurm's commands: a login node of the cluster",
            do="log in there; --dry-run prints the job's text on any machine",
        )
    done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MachineError(
            f"sbatch refused the job: {' '.join(done.stderr.split())}",
            expected="a job that this cluster takes",
            do="correct the option that sbatch names; --dry-run prints the text it was given",
        )
    return done.stdout.strip().partition(";")[0]  # behind a semicolon stands the cluster's name
