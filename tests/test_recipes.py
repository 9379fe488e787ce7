"""Reads every recipe, preset, accelerate config and documented command; each recipe and preset trains two steps."""

import json
import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from documentation import join_lines, read_pages

from dpokit.run import train
from dpokit.settings.load import load_settings

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
PRESETS = sorted((ROOT / "recipes" / "presets").glob("*.yaml"))
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
ON_CPU = ["--fp16", "false", "--bf16", "false"]


def defaults_of(recipe: Path) -> dict:
    return runpy.run_path(str(recipe))["DEFAULTS"]


def recipe_of(preset: Path) -> Path:
    return ROOT / "recipes" / ("dpo_qwen2.py" if preset.stem.startswith("qwen2") else "dpo_gpt2.py")


@pytest.fixture
def stand_in_data(tmp_path: Path) -> Path:
    """A folder with the splits that the recipes name, as transcripts in HH's layout."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(24):
                before = f"\n\nHuman: How do I bake bread number {i} of {split}?\n\nAssistant:"
                row = {"chosen": before + " Mix flour and water.", "rejected": before + " No, not again."}
                file.write(json.dumps(row) + "\n")
    return folder


def stand_ins(recipe: Path, data: Path, gpt2: Path, qwen2: Path, output: Path) -> list[str]:
    model = qwen2 if "qwen2" in recipe.stem else gpt2
    return [
        *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)),
        *("--dataset_train_split", "train", "--dataset_test_split", "test", "--max_steps", "2"),
        *ON_CPU,
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps_with_its_own_settings(recipe, stand_in_data, tiny_gpt2, tiny_qwen2, tmp_path):
    flags = stand_ins(recipe, stand_in_data, tiny_gpt2, tiny_qwen2, tmp_path / "run")
    defaults = defaults_of(recipe)
    run = train(str(recipe), defaults, [*flags, "--max_length", "96"])
    check_run(run, {k: v for k, v in defaults.items() if f"--{k}" not in flags and k != "max_length"})


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains_two_steps_with_its_own_settings(preset, stand_in_data, tiny_gpt2, tiny_qwen2, tmp_path):
    recipe = recipe_of(preset)
    flags = stand_ins(recipe, stand_in_data, tiny_gpt2, tiny_qwen2, tmp_path / "run")
    published = yaml.safe_load(preset.read_text())
    length = min(published.get("max_length", 256), 256)  # the tiny models have 256 positions
    run = train(str(recipe), defaults_of(recipe), ["--config", str(preset), *flags, "--max_length", str(length)])
    check_run(run, {k: v for k, v in published.items() if f"--{k}" not in flags and k != "max_length"})


def check_run(run, expected: dict) -> None:
    record = run.read_run()
    assert record["state"] == "finished"
    weights = run.adapter / "adapter_model.safetensors" if expected.get("use_peft") else run.model / "model.safetensors"
    assert weights.is_file()
    steps = [json.loads(line)["step"] for line in run.metrics_jsonl.read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 2
    for name, value in expected.items():
        recorded = record["settings"][name]["value"]
        value = [value] if isinstance(value, str) and name in ("loss_type", "report_to") else value
        value = "all-linear" if value == ["all-linear"] else value  # TRL turns a list of one name into the name
        assert recorded == value, name


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_line_of_a_preset_says_whether_it_was_published(preset):
    lines = [line for line in preset.read_text().splitlines() if line and not line.startswith("#")]
    bare = [line for line in lines if not re.search(r"# (published|our choice)", line)]
    assert bare == [], "each line ends with `# published` or `# our choice`"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_an_accelerate_config_is_short_and_read_by_accelerate(config):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(config)).num_machines == 1
    assert len(config.read_text().splitlines()) <= 12


def documented_commands() -> list[str]:
    text = "\n".join([read_pages(), *(join_lines(recipe.read_text()) for recipe in RECIPES)])
    commands = re.findall(r"^\s*(accelerate launch [^\n#]*recipes/[^\n#]*|bash launch/[^\n#]*)", text, re.M)
    return sorted({command.strip() for command in commands})


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_names_existing_files(command):
    argv = shlex.split(command)
    if argv[0] == "bash":
        assert (ROOT / argv[1]).is_file()
        assert all((ROOT / word).exists() for word in argv[2:] if word.startswith("tests/"))
        return
    position = next(i for i, word in enumerate(argv) if word.startswith("recipes/"))
    for launcher_flag, value in pairwise(argv[2:position]):
        if launcher_flag == "--config_file":
            assert (ROOT / value).is_file()
    flags = [str(ROOT / w) if w.startswith("recipes/presets") else w for w in argv[position + 1 :]]
    if "--help" not in flags:
        load_settings(argv[position], defaults_of(ROOT / argv[position]), [*flags, *ON_CPU])
