"""What train.sbatch asks before it launches: run folder, processes, port, and what a restart adds."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from dpokit.checkpoint.store import write_manifest
from dpokit.cluster.command import facts, find_port, in_shell, split_words
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


def test_the_run_folder_is_that_of_command_line_yaml_file_or_recipe(tmp_path):
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
        assert facts([RECIPE, *flags], {})["run"] == folder


def test_every_recipe_names_its_folder_without_being_run():
    for recipe in sorted((ROOT / "recipes").glob("*.py")):
        assert split_words([str(recipe)]).run_folder().path.parts[0] == "runs"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no recipe in"),
        (["--config_file", DDP], "no recipe in"),
        (["recipes/nothing.py"], "there is no file recipes/nothing.py"),
        (["--config_file", "nothing.yaml", RECIPE], "--config_file nothing.yaml"),
        ([RECIPE, "--config", "nothing.yaml"], "--config nothing.yaml"),
    ],
)
def test_words_that_are_no_command_are_one_message(words, says):
    with pytest.raises(SettingsError, match=says):
        facts(words, {})


def test_a_recipe_may_compute_its_defaults(tmp_path):
    recipe = tmp_path / "computed.py"
    recipe.write_text("import os\nDEFAULTS = {'output_dir': os.path.join('runs', 'x')}\n")
    assert facts([str(recipe)], {})["run"] == "runs/x"


def test_a_recipe_without_a_folder_must_be_told_one(tmp_path):
    recipe = tmp_path / "none.py"
    recipe.write_text("DEFAULTS = {}\n")
    with pytest.raises(SettingsError, match="where the run will be"):
        facts([str(recipe)], {})
    assert facts([str(recipe), "--output_dir", "x"], {})["run"] == "x"


def words_of(*words: str, **environment: str) -> list[str]:
    return list(facts(list(words), {"SLURM_JOB_ID": "7", **environment})["words"])


def test_one_node_with_one_process_adds_no_more_than_their_number():
    one = "accelerate_configs/single_gpu.yaml"
    assert words_of("--config_file", one, RECIPE) == ["--num_processes", "1", "--config_file", one, RECIPE]
    assert words_of(RECIPE) == ["--main_process_port", str(find_port({"SLURM_JOB_ID": "7"})), RECIPE]


def test_processes_are_those_of_the_environment_the_placement_or_the_gpus():
    assert words_of("--config_file", DDP_CPU, RECIPE)[:2] == ["--num_processes", "2"]
    assert words_of("--config_file", DDP, RECIPE, SLURM_GPUS_ON_NODE="8")[:2] == ["--num_processes", "8"]
    two = {"SLURM_NNODES": "2", "MASTER_ADDR": "n1"}
    assert words_of("--config_file", DDP_CPU, RECIPE, **two)[:2] == ["--num_processes", "4"]
    given = two | {"DPOKIT_PROCESSES_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8"}
    assert words_of("--config_file", DDP, RECIPE, **given)[:2] == ["--num_processes", "6"]


def test_several_nodes_get_an_address_a_port_and_no_ssh():
    words = words_of("--config_file", ZERO3, RECIPE, SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8", MASTER_ADDR="n1")
    text = " ".join(words)
    assert "--num_processes 16 " in text
    assert "--num_machines 2 --main_process_ip n1 --rdzv_backend static" in text
    assert "--deepspeed_multinode_launcher standard" in text
    assert "deepspeed" not in " ".join(words_of("--config_file", DDP_CPU, RECIPE, SLURM_NNODES="2"))


def test_what_the_user_wrote_stands_after_what_the_job_adds():
    words = words_of("--num_processes", "5", "--config_file", DDP_CPU, RECIPE, "--beta", "0.2")
    assert words[-6:] == ["--num_processes", "5", "--config_file", DDP_CPU, RECIPE, "--beta", "0.2"][-6:]
    assert words.index("2") < words.index("5")


def test_several_nodes_need_a_placement_for_many_and_a_number():
    with pytest.raises(SettingsError, match="each node would train alone"):
        words_of(RECIPE, SLURM_NNODES="2")
    with pytest.raises(SettingsError, match="each node would train alone"):
        words_of("--config_file", "accelerate_configs/single_gpu.yaml", RECIPE, SLURM_NNODES="2")
    with pytest.raises(MachineError, match="how many processes"):
        words_of("--config_file", DDP, RECIPE, SLURM_NNODES="2")


def test_a_port_is_of_the_job_and_of_the_start():
    ports = {
        find_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(start)}) for job in (1, 2) for start in (0, 3)
    }
    assert len(ports) == 4
    assert all(15000 <= port < 30000 for port in ports)
    assert 15000 <= find_port({"SLURM_JOB_ID": "99999999"}) < 30000


def test_an_array_puts_its_index_into_every_word():
    told = facts([RECIPE, "--output_dir", "runs/x_%a", "--seed=%a"], {"SLURM_ARRAY_TASK_ID": "4"})
    assert told["run"] == "runs/x_4"
    assert told["words"][-3:] == ["--output_dir", "runs/x_4", "--seed=4"]


def restart(*flags: str) -> list[str]:
    return words_of(RECIPE, *flags, SLURM_RESTART_COUNT="1")[3:]


def test_a_restart_deletes_no_run_and_goes_on_from_its_own_checkpoint(tmp_path):
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


def test_the_first_start_leaves_every_flag_as_it_is(tmp_path):
    finish(tmp_path / "run", "preempted", checkpoint=3)
    flags = ["--output_dir", str(tmp_path / "run"), "--overwrite_run"]
    assert words_of(RECIPE, *flags)[3:] == flags


def test_a_run_that_finished_before_its_restart_is_left_alone(tmp_path):
    finish(tmp_path / "run")
    words = [RECIPE, "--output_dir", str(tmp_path / "run")]
    assert facts(words, {"SLURM_RESTART_COUNT": "1"})["finished"] == "yes"
    assert facts(words, {})["finished"] == ""
    assert facts([*words, "--overwrite_run"], {"SLURM_RESTART_COUNT": "1"})["finished"] == ""
    assert facts(words, {})["began"] == "1"


def test_bash_reads_hostile_values_back_as_they_were():
    hostile = ["a b", "it's", '"', "$HOME", "`id`", "$(id)", "back\\slash", "two\nlines", "", "*", "%a;&|<>", "-n", "é"]
    script = in_shell({"run": "a 'b' $c", "words": hostile})
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = f'{script}\npython3 -c {json.dumps(show)} "$run" "${{words[@]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["a 'b' $c", *hostile]
