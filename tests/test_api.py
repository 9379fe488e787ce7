"""The public Python API: lazy imports, one call each, and errors that leave the process alive."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, write_pairs

import dpokit

SETTINGS = {
    "eval_fraction": 0.3,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "max_length": 64,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
}


@pytest.fixture
def settings(tiny_gpt2, tmp_path) -> dict:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    return SETTINGS | {
        "model_name_or_path": str(tiny_gpt2),
        "dataset_name": str(pairs),
        "output_dir": str(tmp_path / "run"),
    }


@pytest.mark.cold
def test_the_import_is_light():
    heavy = {"torch", "transformers", "datasets", "yaml"}
    code = f"import sys, dpokit; print(sorted({heavy!r} & set(sys.modules)), dir(dpokit))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("[] ")
    assert all(name in shown for name in dpokit.__all__)


@pytest.mark.parametrize("name", dpokit.__all__)
def test_every_name_is_there_and_documented(name):
    assert getattr(dpokit, name).__doc__
    assert f"| `{name}" in (ROOT / "docs" / "python.md").read_text()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'train_modle'"):
        dpokit.train_modle  # noqa: B018


LAYOUTS = {
    "text": {"prompt": "Hi", "chosen": " a", "rejected": " b"},
    "messages": {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_read_and_written_back(layout, tmp_path):
    rows = [LAYOUTS[layout]] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = dpokit.load_pairs(str(tmp_path / "pairs.jsonl"))
    assert list(pairs) == rows
    pairs.to_json(tmp_path / "again.jsonl")
    assert list(dpokit.load_pairs(str(tmp_path / "again.jsonl"), max_samples=2)) == rows[:2]


def test_rows_without_a_pair_are_counted(tmp_path, capsys):
    rows = [LAYOUTS["text"], LAYOUTS["text"], {**LAYOUTS["text"], "chosen": None}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(dpokit.load_pairs(str(tmp_path / "pairs.jsonl"))) == 2
    assert (
        "2 pairs of layout 'explicit, plain', 1 rows left out (missing_text (chosen is null))"
        in capsys.readouterr().err
    )


def test_a_run_is_trained_evaluated_and_merged(settings):
    run = dpokit.train_model(settings | {"use_peft": True})
    assert [record["step"] for record in dpokit.read_metrics(run.metrics_jsonl) if "loss" in record]
    assert run.read_run()["recipe"] == "notebook"
    assert dpokit.evaluate_model(run)["tuned"]["accuracy"]["value"] is not None
    assert dpokit.merge_model(run, limit=2)["files"]
    assert (run.merged / "model.safetensors").is_file()


def test_settings_override_a_recipe(settings, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("DEFAULTS = {'beta': 0.3, 'max_steps': 1, 'learning_rate': 1e-4}\n")
    record = dpokit.train_model(settings, recipe=recipe).read_run()
    recorded = {name: tuple(record["settings"][name].values()) for name in ("beta", "max_steps", "learning_rate")}
    assert recorded == {"beta": (0.3, "recipe mine"), "max_steps": (2, "call"), "learning_rate": (1e-4, "recipe mine")}


WRONG = {
    "an unknown setting": {"learning_rat": 1e-5},
    "a wrong type": {"learning_rate": "fast"},
    "a number out of range": {"beta": -1},
    "settings that contradict": {"load_in_4bit": True},
    "no such file": {"dataset_name": "/nowhere.jsonl"},
    "a file of settings": {"config": "other.yaml"},
    "a value of no type": {"beta": object()},
    "an unknown kind": {"kind": "ppo"},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_raises_and_the_process_goes_on(case, settings):
    with pytest.raises(dpokit.DpokitError):
        dpokit.train_model(settings | WRONG[case])


def test_a_wrong_recipe_raises(settings):
    with pytest.raises(dpokit.DpokitError, match="there is no recipe 'nonsense'"):
        dpokit.train_model(settings, recipe="nonsense")


def test_the_page_has_every_signature():
    """docs/python.md shows each function with the parameters that it has."""
    import inspect

    table = (ROOT / "docs" / "python.md").read_text()
    for name in ("load_pairs", "train_model", "evaluate_model", "merge_model"):
        parameters = inspect.signature(getattr(dpokit, name)).parameters
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}("))
        assert all(parameter in row for parameter in parameters)


def test_the_stored_notebook_shows_what_its_cells_print():
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run from the top"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= 8 and not any(output["output_type"] == "error" for output in outputs)
    text = json.dumps(outputs)
    assert "Better than its base" in text and not re.search(r"/(home|root|tmp|Users)/", text)


@pytest.mark.slow
def test_the_notebook_runs_in_a_real_kernel(tiny_qwen2, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    first.source = f"model = {str(tiny_qwen2)!r}\nfolder = 'runs/notebook'\nsteps = 2"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = "\n".join(output.get("text", "") for output in outputs)
    assert "there is no setting 'learning_rat'" in shown
    assert (tmp_path / "runs" / "notebook" / "merged" / "model.safetensors").is_file()
