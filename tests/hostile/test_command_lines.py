"""Wrong command lines: every flag with nonsensical values ends in one message, or in a run that works."""

import json
from pathlib import Path

import pytest
import typer
from conftest import write_pairs
from test_cli import dpokit

from dpokit.errors import DpokitError, MachineError, SettingsError
from dpokit.run import train
from dpokit.settings.bounds import BOUNDS
from dpokit.settings.flags import KINDS, FlagParser
from dpokit.settings.load import load_settings
from dpokit.verbs.app import app

NUMBERS = ("-1", "0", "1", "-7", "0.5", "1e-300", "1e308", "-1e308", "nan", "inf", "-inf", "9" * 20, "1e400")
WORDS = ("", " ", "x", "-", "--", "null", "{}", "[", '{"x": 1}', "a=b", "\u00b2", "\u0663", "a" * 300, "/nowhere", "\n")


def flags_of(kind: str) -> dict[str, str]:
    """The name of each flag's type, by the flag."""
    parser = FlagParser(kind)
    return {
        action.dest: getattr(action.type, "__name__", str(action.type))
        for action in parser._actions
        if action.dest not in ("help", "config")
    }


FLAGS = {("dpo", name): type_ for name, type_ in flags_of("dpo").items()}
FLAGS |= {("sft", name): type_ for name, type_ in flags_of("sft").items() if ("dpo", name) not in FLAGS}


def load(kind: str, name: str, value: str, folder: Path) -> None:
    defaults = {"kind": kind, "output_dir": str(folder / "run"), "use_cpu": True, "report_to": "none"}
    load_settings("test", defaults, [f"--{name}={value}"])


@pytest.mark.parametrize(("kind", "name"), FLAGS)
def test_any_flag_value_is_accepted_or_refused_in_one_message(kind, name, tmp_path):
    numeric = FLAGS[kind, name] in ("int", "float")
    for value in NUMBERS if numeric else WORDS:
        try:
            load(kind, name, value, tmp_path)
        except (SettingsError, MachineError, DpokitError) as refusal:
            assert "Traceback" not in str(refusal)


@pytest.mark.parametrize(("kind", "name"), [key for key, type_ in FLAGS.items() if type_ in ("int", "float")])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_or_infinity_is_refused(value, kind, name, tmp_path):
    with pytest.raises(SettingsError, match=name):
        load(kind, name, value, tmp_path)


OUTSIDE = [
    (name, number)
    for name, bound in BOUNDS.items()
    for number in (bound.least - 1, bound.least if bound.without_least else None, bound.most + 1)
    if number is not None and not bound.holds(number) and abs(number) < 1e12
]


@pytest.mark.parametrize(("name", "number"), OUTSIDE)
def test_a_number_out_of_its_range_is_refused(name, number, tmp_path):
    kind = next(kind for kind in KINDS if (kind, name) in FLAGS)
    value = f"{number:g}" if FLAGS[kind, name] == "float" else str(int(number))
    with pytest.raises(SettingsError, match=f"{name} is ") as refusal:
        load(kind, name, value, tmp_path)
    assert f"--{name}" in refusal.value.do


def test_every_bound_has_a_flag():
    unknown = [name for name in BOUNDS if not any((kind, name) in FLAGS for kind in KINDS)]
    assert [f"{name}: settings/bounds.py has its range, but no flag has this name" for name in unknown] == []


# -- values that only a run can check ----------------------------------------------------------------------------------

VALUES = {"int": ("0", "1", "2"), "float": ("0", "1e-300", "0.5", "1", "1e30")}
SLOPPY = {
    "metric_for_best_model": ("nonsense", "eval_nonsense", "loss"),
    "lora_target_modules": ("nonsense", "(", "*", "c_attn"),
    "lora_modules_to_save": ("nonsense",),
    "optim_args": ("nonsense", "a=b", "betas=1"),
    "lr_scheduler_kwargs": ('{"x": 1}', '{"min_lr": "x"}'),
    "torch_compile_backend": ("nonsense",),
    "torch_compile_mode": ("nonsense",),
    "dataset_train_split": ("nonsense",),
    "dataset_test_split": ("nonsense",),
    "dataset_config": ("nonsense",),
    "columns": ("nonsense", "prompt=nonsense", "prompt=", "chosen=prompt", "prompt=chosen,chosen=prompt", "{"),
    "ignore_columns": ("nonsense", "chosen", ",", "prompt,chosen,rejected"),
    "dataset_name": ("/nowhere", ".", "", "/dev/null"),
    "model_name_or_path": ("/nowhere", ".", "..", "/dev/null", "/etc/passwd"),
    "model_revision": ("nonsense",),
    "output_dir": ("/dev/null", "/etc/passwd", "/proc/x", "/" + "a" * 300),
    "resume_from_checkpoint": ("/nowhere", "checkpoint-\u00b2", "checkpoint-", "/etc/passwd", "."),
    "attn_implementation": ("nonsense", "eager"),
    "gradient_checkpointing_kwargs": ('{"x": 1}',),
    "accelerator_config": ('{"x": 1}', "/nowhere"),
    "preempt_signal": ("nonsense", "SIGKILL", "9"),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay", "greedy"),
    "optim": ("sgd", "lomo", "apollo_adamw", "galore_adamw", "paged_adamw_8bit", "adamw_torch_4bit", "adafactor"),
    "loss_type": ("hinge", "sft", "bco_pair"),
    "f_divergence_type": ("js_divergence", "nonsense"),
    "report_to": ("nonsense",),
    "hub_license": ("nonsense",),
    "include_for_metrics": ("inputs", "nonsense"),
    "label_names": ("nonsense",),
    "debug": ("underflow_overflow", "nonsense"),
}
TRAINED = [(n, v) for (kind, n), type_ in FLAGS.items() if kind == "dpo" for v in VALUES.get(type_, SLOPPY.get(n, ()))]


@pytest.fixture
def defaults(tiny_gpt2, tmp_path) -> dict:
    return {
        "model_name_or_path": str(tiny_gpt2),
        "dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 12)),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "max_length": 64,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), TRAINED)
def test_a_run_with_an_odd_value_trains_or_fails_in_one_message(name, value, defaults, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapted = ["--use_peft"] if name.startswith("lora_") else []
    best = ["--load_best_model_at_end", "--eval_fraction", "0.3", "--eval_strategy", "steps", "--eval_steps", "1"]
    best += ["--save_strategy", "steps", "--save_steps", "1"]
    more = best if name == "metric_for_best_model" else []
    try:
        run = train("dpo_test", defaults, [*adapted, *more, f"--{name}={value}"])
    except DpokitError as refusal:
        assert len(str(refusal).splitlines()) < 12
    else:
        assert json.loads(run.run_json.read_text())["state"] == "finished"


# -- paths -------------------------------------------------------------------------------------------------------------

PATHS = {"nowhere": "/nowhere/run", "a file": "/etc/hostname", "a long name": "a" * 300, "a long path": "/a" * 3000}
VERBS = {
    "init": ["init", "PATH"],
    "status": ["status", "PATH"],
    "verify": ["verify", "PATH"],
    "report": ["report", "PATH"],
    "merge": ["merge", "PATH"],
    "card": ["card", "PATH", "--license", "mit"],
    "push": ["push", "PATH", "--repo-id", "a/b", "--dry-run"],
    "evaluate": ["evaluate", "PATH", "--data", "PATH"],
    "chat": ["chat", "PATH", "--prompt", "Hello"],
    "serve": ["serve", "PATH", "--port", "0"],
    "sweep": ["sweep", "PATH"],
    "plan": ["plan", "PATH"],
    "prepare": ["prepare", "PATH"],
    "submit": ["submit", "PATH"],
    "train": ["train", "PATH"],
    "data": ["data", "check", "PATH"],
}


def test_every_verb_is_tried():
    verbs = set(typer.main.get_command(app).commands) - {"env"}  # it has no arguments
    assert [f"{verb}: add its arguments to VERBS in this file" for verb in sorted(verbs - set(VERBS))] == []
    assert set(VERBS) <= verbs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "path"), [(verb, path) for verb in VERBS for path in PATHS if (verb, path) != ("init", "nowhere")]
)
def test_a_missing_path_is_one_message_and_exit_code_2(verb, path):
    """Every verb ends, also `serve` and `chat`. `init` makes a folder that does not exist."""
    done = dpokit(*(PATHS[path] if word == "PATH" else word for word in VERBS[verb]))
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
