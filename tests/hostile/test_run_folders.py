"""Untrusted run folders: verbs take the description of model and data from them, but no permission."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from run_to_merge import build_base, build_run
from test_cli import dpokit

from dpokit.after_training import run_commands
from dpokit.cluster.status import read_status
from dpokit.errors import ReleaseError, RunFolderError, SettingsError
from dpokit.merge.merge import merge_run
from dpokit.model.base_and_tuned import find_run
from dpokit.model.load import load_policy
from dpokit.rundir import RunDir, read_metrics
from dpokit.settings.flags import FlagParser
from dpokit.settings.load import FROM_RUN, load_settings, read_run_settings

# Settings of a stranger's run.json that must have no effect on this machine.
GREEDY = {
    "trust_remote_code": True,
    "trust_checkpoint": True,
    "hub_token": "hf_" + "a" * 30,
    "push_to_hub": True,
    "hub_model_id": "stranger/collects",
    "report_to": ["wandb"],
    "output_dir": "/etc",
    "resume_from_checkpoint": "/tmp/checkpoint-1",
    "deepspeed": "/tmp/own.json",
    "fsdp": "full_shard",
    "dataset_num_proc": 500,
    "dataloader_num_workers": 500,
    "torch_compile": True,
    "attn_implementation": "stranger/kernel",
    "optim": "adamw_bnb_8bit",
    "overwrite_run": True,
    "merge_after_training": True,
    "gates": "warn",
    "accelerator_config": "/tmp/own.json",
    "run_name": "run",
    "ddp_timeout": 10**9,
}


def record_with(**values: object) -> dict:
    return {"settings": {name: {"value": value, "origin": "command line"} for name, value in values.items()}}


@pytest.mark.parametrize("name", GREEDY)
def test_a_run_folder_grants_nothing(name):
    settings = read_run_settings(record_with(**{name: GREEDY[name]}))
    assert settings.get(name) != GREEDY[name]
    assert settings["output_dir"] == "unused"


def test_a_flag_comes_from_the_run_or_the_command_line():
    """Only flags with the fact FROM_RUN are read from a run folder, and all names with that fact are flags."""
    flags = set(FlagParser().names()) | set(FlagParser("sft").names())
    assert FROM_RUN - {"kind"} <= flags
    taken = read_run_settings(record_with(**dict.fromkeys(flags, "x"))).keys()
    assert taken - {"output_dir", "report_to", "use_cpu"} == FROM_RUN & flags
    assert not {name for name in FROM_RUN if "trust" in name or "hub" in name or "dir" in name or "num_proc" in name}


DAMAGED = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "3",
    "nested without end": "[" * 100_000,
    **{
        f"{name} {value!r}": json.dumps({"state": "finished", name: value})
        for name, values in {
            "settings": ("x", [], 3, {"beta": 0.1}, {"beta": ["x"]}, {"beta": None}),
            "generations": ("x", {}, 3, ["x"], [None]),
            "state": ([], {}, 3, True),
            "why": ([], 3),
            "recipe": ([], 3),
            "world_size": ("x", None, []),
            "best": ("x", 3, []),
            "versions": ("x", []),
        }.items()
        for value in values
    },
}
READERS = {
    "status": lambda run: read_status(run),
    "merge": lambda run: merge_run(run),
    "evaluate": lambda run: find_run(str(run.path)),
    "resume": lambda run: run.take_possession(0),
    "write": lambda run: run.write_run(state="failed"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/random", "/proc/kmsg"])
def test_a_record_that_is_a_device_is_not_read(target, reader, tmp_path):
    run = RunDir(tmp_path)
    run.run_json.symlink_to(target)
    with pytest.raises(RunFolderError, match=r"is damaged|is a link to|cannot be read"):
        READERS[reader](run)


@pytest.mark.parametrize("reader", READERS)
def test_a_huge_record_is_not_read(reader, tmp_path):
    run = RunDir(tmp_path)
    with run.run_json.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RunFolderError, match="has 1,099,511,627,776 bytes"):
        READERS[reader](run)


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_record_is_one_message(reader, case, tmp_path):
    run = RunDir(tmp_path)
    run.run_json.write_text(DAMAGED[case])
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        READERS[reader](run)


@pytest.mark.parametrize(
    "line", ["3", "[]", '"x"', "{}", '{"step": "x"}', '{"step": null}', '{"step": true}', "{", "[" * 10**5]
)
def test_the_metrics_end_before_a_damaged_line(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n{{"step": 3, "loss": 0.5}}\n')
    assert [record["step"] for record in read_metrics(file)] == [1]


@pytest.fixture
def coded_run(plain_tokenizer, tmp_path) -> tuple[RunDir, Path]:
    """A run whose model has custom code, with trust_remote_code in its settings; and the file that the code creates."""
    base, ran = build_base(tmp_path / "base", "llama", plain_tokenizer), tmp_path / "it-ran"
    own = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnLlama"}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": own}))
    (base / "own_llama.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass OwnConfig(LlamaConfig):\n"
        "    model_type = 'own_llama'\n\n\nclass OwnLlama(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    run = build_run(tmp_path, base, None, trust_remote_code=True)
    for folder in (base, run.model):
        code = folder / "own_llama.py"
        code.write_text(f"open({str(ran)!r}, 'w').close()\n{code.read_text()}")
    return run, ran


@pytest.mark.parametrize(
    "argv",
    [["evaluate"], ["merge"], ["merge", "--no-proof"], ["chat", "--prompt", "Hello"]],
    ids=lambda argv: " ".join(argv),
)
def test_code_that_only_the_run_trusts_is_not_run(argv, coded_run):
    (run, ran), (verb, *flags) = coded_run, argv
    done = dpokit(verb, str(run.path), *flags)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "code of its own" in done.stderr
    assert not ran.exists()


@pytest.mark.parametrize("verb", ["evaluate", "merge"])
def test_code_is_run_if_the_command_line_trusts_it(verb, coded_run):
    run, ran = coded_run
    done = dpokit(verb, str(run.path), "--trust_remote_code", "true")
    assert done.returncode == 0, done.stderr
    assert ran.exists()


@pytest.mark.cold
def test_a_verb_after_training_imports_no_module_of_the_folder(tmp_path, monkeypatch, capfd):
    for name in ("typer", "torch", "json", "dpokit"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReleaseError):
        run_commands([["merge", str(tmp_path / "no run")]])
    assert "RunFolderError" in capfd.readouterr().err
    assert not (tmp_path / "it-ran").exists()


def test_an_adapter_that_names_a_module_is_refused(tiny_gpt2, plain_tokenizer, tmp_path):
    from peft import LoraConfig

    run = build_run(tmp_path, tiny_gpt2, LoraConfig(target_modules=["c_attn"]))
    config = run.adapter / "adapter_config.json"
    stranger = {"megatron_config": {"x": 1}, "megatron_core": "antigravity"}
    config.write_text(json.dumps(json.loads(config.read_text()) | stranger))
    settings = load_settings("test", {"model_name_or_path": str(run.adapter), "use_peft": True, "use_cpu": True}, [])
    with pytest.raises(Exception, match="is for Megatron"):
        load_policy(settings, plain_tokenizer)


# -- a sweep's folder --------------------------------------------------------------------------------------------------

SPACE = "recipe: {recipe}\nsearch: {search}\nparameters: {{learning_rate: {values}}}\n{more}"
STRANGE = [{"trust_remote_code": True}, {"learning_rate": 1e-5, "model_name_or_path": "x"}, {"learning_rate": 7}, {}]


@pytest.mark.parametrize("settings", STRANGE, ids=str)
@pytest.mark.parametrize(
    ("search", "values", "more"),
    [
        ("grid", "[1e-5, 2e-5]", ""),
        ("random", "[1e-5, 2e-5]", "trials: 2"),
        ("tpe", "{low: 1e-6, high: 1e-4}", "trials: 2"),
    ],
)
def test_a_trial_with_settings_of_another_space_is_refused(settings, search, values, more, tmp_path):
    pytest.importorskip("optuna")
    from dpokit.sweep.space import load_space

    path = tmp_path / "space.yaml"
    path.write_text(SPACE.format(recipe=ROOT / "recipes" / "dpo_gpt2.py", search=search, values=values, more=more))
    space = load_space(path)
    space.check_trial(0, {"learning_rate": 1e-5})
    with pytest.raises(SettingsError, match="has settings of another space"):
        space.check_trial(0, settings)


@pytest.mark.parametrize("text", ["--user=root", "12", "", "12_3 13_4", "x_y"])
def test_a_job_file_without_a_job_id_is_ignored(text, tmp_path):
    from dpokit.cluster.slurm import SlurmJob
    from dpokit.sweep.slurm import Queue, QueuedRun

    queue = Queue(SlurmJob(Path("recipe.py"), Path("placement.yaml")), group="g")
    run = QueuedRun(0, {}, RunDir(tmp_path / "trial-0"), queue=queue)
    run.job_file.write_text(text)
    assert run.find_job() is None
    run.job_file.write_text("12_3\n")
    assert run.find_job() == "12_3"
