"""The shell variables of train.sbatch: run folder, processes, port, and the flags that a restart adds."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from dpokit.checkpoint.store import write_manifest
from dpokit.cluster.command import collect_job_variables, find_port, format_for_shell, split_arguments
from dpokit.errors import MachineError, SettingsError
from dpokit.rundir import RunDir

DDP, DDP_CPU, ZERO3 = (f"accelerate_configs/{name}.yaml" for name in ("ddp", "ddp_cpu", "zero3"))
RECIPE = "recipes/dpo_gpt2.py"


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def finish(folder: Path, state: str = "finished", checkpoint: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    RunDir(folder).write_run(state=state, generations=[{"resumed_step": 0}])
    if checkpoint is not None:
        (folder / f"checkpoint-{checkpoint}").mkdir()
        write_manifest(folder / f"checkpoint-{checkpoint}", checkpoint, {}, {})


def test_the_run_folder_comes_from_flag_else_yaml_else_recipe(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("output_dir: runs/of_yaml\n")
    ways = {
        "runs/dpo_gpt2": [],
        "runs/of_yaml": ["--config", str(config)],
        "runs/a": ["--config", str(config), "--output_dir", "runs/a"],
        "runs/b": ["--output_dir", "runs/a", "--output_dir=runs/b"],
        "runs/c": ["--output-dir", "runs/c"],
    }
    for folder, flags in ways.items():
        assert collect_job_variables([RECIPE, *flags], {})["run"] == folder


def test_every_recipe_has_a_run_folder():
    for recipe in sorted((ROOT / "recipes").glob("*.py")):
        assert split_arguments([str(recipe)]).run_folder().path.parts[0] == "runs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe in"),
        (["--config_file", DDP], "no recipe in"),
        (["recipes/nothing.py"], "there is no file recipes/nothing.py"),
        (["--config_file", "nothing.yaml", RECIPE], "--config_file nothing.yaml"),
        ([RECIPE, "--config", "nothing.yaml"], "--config nothing.yaml"),
    ],
)
def test_arguments_without_a_recipe_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        collect_job_variables(arguments, {})


def test_a_recipe_may_compute_its_defaults(tmp_path):
    recipe = tmp_path / "computed.py"
    recipe.write_text("import os\nDEFAULTS = {'output_dir': os.path.join('runs', 'x')}\n")
    assert collect_job_variables([str(recipe)], {})["run"] == "runs/x"


def test_a_recipe_without_output_dir_needs_the_flag(tmp_path):
    recipe = tmp_path / "none.py"
    recipe.write_text("DEFAULTS = {}\n")
    with pytest.raises(SettingsError, match="sets the run folder"):
        collect_job_variables([str(recipe)], {})
    assert collect_job_variables([str(recipe), "--output_dir", "x"], {})["run"] == "x"


def read_arguments(*arguments: str, **environment: str) -> list[str]:
    return list(collect_job_variables(list(arguments), {"SLURM_JOB_ID": "7", **environment})["words"])


def test_one_process_adds_only_num_processes():
    placement = "accelerate_configs/single_gpu.yaml"
    assert read_arguments("--config_file", placement, RECIPE) == [
        "--num_processes",
        "1",
        "--config_file",
        placement,
        RECIPE,
    ]
    assert read_arguments(RECIPE) == ["--main_process_port", str(find_port({"SLURM_JOB_ID": "7"})), RECIPE]


def test_processes_come_from_environment_placement_or_gpus():
    assert read_arguments("--config_file", DDP_CPU, RECIPE)[:2] == ["--num_processes", "2"]
    assert read_arguments("--config_file", DDP, RECIPE, SLURM_GPUS_ON_NODE="8")[:2] == ["--num_processes", "8"]
    two = {"SLURM_NNODES": "2", "MASTER_ADDR": "n1"}
    assert read_arguments("--config_file", DDP_CPU, RECIPE, **two)[:2] == ["--num_processes", "4"]
    environment = two | {"DPOKIT_PROCESSES_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8"}
    assert read_arguments("--config_file", DDP, RECIPE, **environment)[:2] == ["--num_processes", "6"]


def test_several_nodes_get_an_address_a_port_and_no_ssh():
    arguments = read_arguments(
        "--config_file", ZERO3, RECIPE, SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8", MASTER_ADDR="n1"
    )
    text = " ".join(arguments)
    assert "--num_processes 16 " in text
    assert "--num_machines 2 --main_process_ip n1 --rdzv_backend static" in text
    assert "--deepspeed_multinode_launcher standard" in text
    assert "deepspeed" not in " ".join(read_arguments("--config_file", DDP_CPU, RECIPE, SLURM_NNODES="2"))


def test_the_users_flags_come_after_those_of_the_job():
    arguments = read_arguments("--num_processes", "5", "--config_file", DDP_CPU, RECIPE, "--beta", "0.2")
    assert arguments[-6:] == ["--num_processes", "5", "--config_file", DDP_CPU, RECIPE, "--beta", "0.2"][-6:]
    assert arguments.index("2") < arguments.index("5")


def test_several_nodes_need_a_placement_for_many_and_a_number():
    with pytest.raises(SettingsError, match="each node would train alone"):
        read_arguments(RECIPE, SLURM_NNODES="2")
    with pytest.raises(SettingsError, match="each node would train alone"):
        read_arguments("--config_file", "accelerate_configs/single_gpu.yaml", RECIPE, SLURM_NNODES="2")
    with pytest.raises(MachineError, match="number of processes of each is not set"):
        read_arguments("--config_file", DDP, RECIPE, SLURM_NNODES="2")


def test_each_start_of_a_job_has_its_own_port():
    ports = {
        find_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(start)}) for job in (1, 2) for start in (0, 3)
    }
    assert len(ports) == 4
    assert all(15000 <= port < 30000 for port in ports)
    assert 15000 <= find_port({"SLURM_JOB_ID": "99999999"}) < 30000


def test_the_array_index_replaces_its_mark_in_every_argument():
    variables = collect_job_variables([RECIPE, "--output_dir", "runs/x_%a", "--seed=%a"], {"SLURM_ARRAY_TASK_ID": "4"})
    assert variables["run"] == "runs/x_4"
    assert variables["words"][-3:] == ["--output_dir", "runs/x_4", "--seed=4"]


def restart(*flags: str) -> list[str]:
    return read_arguments(RECIPE, *flags, SLURM_RESTART_COUNT="1")[3:]


def test_a_restart_keeps_the_run_and_resumes_its_checkpoint(tmp_path):
    flags = ["--output_dir", str(tmp_path / "run")]
    never, path = ["--resume_from_checkpoint", "never"], ["--resume_from_checkpoint", "elsewhere/checkpoint-9"]
    over, auto = ["--overwrite_run", "true"], ["--resume_from_checkpoint", "auto"]
    assert restart(*flags, *over, *path) == [*flags, *over, *path, "--overwrite_run", "false"]
    finish(tmp_path / "run", "preempted")
    assert restart(*flags) == flags
    assert restart(*flags, *over) == [*flags, *over, "--overwrite_run", "false"]
    assert restart(*flags, *never) == [*flags, *never, *auto]
    assert restart(*flags, *path) == [*flags, *path]
    finish(tmp_path / "run", "preempted", checkpoint=3)
    assert restart(*flags, *path) == [*flags, *path, *auto]


def test_the_first_start_changes_no_flag(tmp_path):
    finish(tmp_path / "run", "preempted", checkpoint=3)
    flags = ["--output_dir", str(tmp_path / "run"), "--overwrite_run"]
    assert read_arguments(RECIPE, *flags)[3:] == flags


def test_a_finished_run_is_not_started_again(tmp_path):
    finish(tmp_path / "run")
    arguments = [RECIPE, "--output_dir", str(tmp_path / "run")]
    assert collect_job_variables(arguments, {"SLURM_RESTART_COUNT": "1"})["finished"] == "yes"
    assert collect_job_variables(arguments, {})["finished"] == ""
    assert collect_job_variables([*arguments, "--overwrite_run"], {"SLURM_RESTART_COUNT": "1"})["finished"] == ""
    assert collect_job_variables(arguments, {})["began"] == "1"


def test_bash_reads_hostile_values_back_unchanged():
    hostile = ["a b", "it's", '"', "$HOME", "`id`", "$(id)", "back\\slash", "two\nlines", "", "*", "%a;&|<>", "-n", "é"]
    script = format_for_shell({"run": "a 'b' $c", "words": hostile})
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = f'{script}\npython3 -c {json.dumps(show)} "$run" "${{words[@]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["a 'b' $c", *hostile]
