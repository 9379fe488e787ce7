"""`--help` of a recipe: quick, complete, and true to what a run would do."""

import dataclasses
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from dpokit.settings.flag_facts import REFUSED
from dpokit.settings.flag_help import GROUPS, HELP, MEANT, OF_LAUNCHER, find_default, is_shown
from dpokit.settings.flags import KINDS, RETIRED, DataArguments, FlagParser
from dpokit.settings.help_page import find_values_in_force, format_value, read_command_line, render_help
from dpokit.settings.layers import read_defaults
from dpokit.settings.load import read_layers
from dpokit.settings.yielding import yield_defaults

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
GPT2 = ROOT / "recipes" / "dpo_gpt2.py"


@pytest.mark.pinned("trl")  # an older one has other defaults
@pytest.mark.parametrize("kind", KINDS)
def test_a_shown_default_is_the_one_that_holds(kind):
    from trl import ModelConfig

    groups = (DataArguments, KINDS[kind], ModelConfig)
    fields = {field.name: field for group in groups for field in dataclasses.fields(group)}
    wrong = {}
    for name in filter(lambda name: is_shown(name, kind), HELP):
        field = fields[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(default, "value", default) != find_default(name, kind):
            wrong[name] = default
    assert wrong == {}


@pytest.mark.parametrize("kind", KINDS)
def test_each_shown_flag_exists_and_each_own_one_is_shown(kind):
    shown = {name for name in HELP if is_shown(name, kind)}
    assert shown <= set(FlagParser(kind).names())
    own = {name for name, row in HELP.items() if row.is_own}
    trl = {field.name for field in dataclasses.fields(DataArguments.__mro__[1])}
    assert own == {field.name for field in dataclasses.fields(DataArguments)} - trl
    assert not shown & REFUSED.keys()


CASES = [
    [],
    ["--use_peft", "--learning_rate", "1e-4"],
    ["--loss_type", "sigmoid", "--save_steps", "100"],
    ["--loss_type", "ipo", "sft", "--loss_weights", "1.0", "0.5"],
    ["--eval_strategy", "no"],
    ["--dataset_name", "pairs.jsonl", "--eval_fraction=0.1"],
    ["--max_steps", "30", "--run_name", "two words"],
    ["--no_shared_prefix", "--bf16", "false"],
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_shown_values_are_those_of_a_run(recipe, tmp_path):
    """As `load_settings` merges the layers, with the origins that it records."""
    config = tmp_path / "settings.yaml"
    config.write_text("learning_rate: 5e-5\nsave_total_limit: 7\n")
    defaults = read_defaults(recipe)
    names = {f"recipe {recipe.stem}": "recipe", config.name: "file", "command line": "flag"}
    for argv in [*CASES, ["--config", str(config), "--max_length", "64"]]:
        if defaults.get("kind") == "sft" and "loss_type" in " ".join(argv):
            continue
        kind, layers = read_layers(recipe.stem, defaults, argv)
        expected, origins, _ = yield_defaults(layers)
        values, shown_origins = find_values_in_force(defaults, argv)
        for name in (name for name in HELP if is_shown(name, kind)):
            shown = values.get(name, find_default(name, kind))
            real = expected.get(name, find_default(name, kind))
            real = getattr(real, "value", real)
            if isinstance(real, list) and not isinstance(shown, list):
                shown = [shown]
            assert (shown == real) or (float(shown) == float(real)), (name, argv)
            assert shown_origins.get(name) == (names[origins[name]] if name in origins else None), (name, argv)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_page_fits_the_width(recipe, width):
    text = render_help(str(recipe), read_defaults(recipe), [], width=width)
    assert max(map(len, text.splitlines())) <= min(120, max(width, 80))
    assert all(f"\n\n{group}\n" in text for group in GROUPS)


def test_a_value_that_the_machine_decides_is_shown_so():
    unset, given = (render_help(str(GPT2), {}, argv, width=80) for argv in ([], ["--bf16", "false", "--use_cpu"]))
    assert all(f"--{name} by machine " in unset for name in ("bf16", "use_cpu"))
    assert all(text in given for text in ("--bf16 false ", "--use_cpu true "))


@pytest.mark.parametrize(
    "argv",
    [["--max_steps", "abc"], ["--save_steps", "x", "--eval_steps", "[1"], ["--eval_strategy"], ["stray"], ["--=", "é"]],
)
def test_a_wrong_value_still_shows_the_page(argv):
    text = render_help(str(GPT2), read_defaults(GPT2), argv, width=80)
    assert "--learning_rate 1e-05           recipe" in text


@pytest.mark.parametrize("defaults", [{"kind": "ppo"}, {"nonsense": 3, "learning_rate": "abc", "columns": {"a": "b"}}])
def test_wrong_defaults_of_a_recipe_still_show_the_page(defaults, tmp_path):
    text = render_help(str(tmp_path / "no_docstring.py"), defaults, [], width=80)
    assert "\n\n\n" not in text
    assert f"--learning_rate {defaults.get('learning_rate', '1e-06')} " in text


@pytest.mark.cold
@pytest.mark.parametrize("flags", [["--help"], ["-h", "--beta", "0.3"], ["--config", "nowhere.yaml", "--help"]])
def test_help_needs_no_torch_and_no_run(flags, tmp_path):
    code = (
        "import runpy, sys\ntry:\n    runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "except SystemExit as ended:\n    print('ended with', ended.code)\n"
        "print(sorted({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    code = f"import sys\nsys.argv = sys.argv[1:]\n{code.replace('sys.argv[1]', 'sys.argv[0]')}"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80"}
    command = [sys.executable, "-c", code, str(GPT2), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.endswith("[]\n"), done.stderr
    if "nowhere.yaml" in flags:
        assert "ended with 2" in done.stdout
        assert done.stderr.count("do this:") == 1
    else:
        assert "--help-all shows every flag" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_all_shows_every_supported_flag(capsys):
    parser = FlagParser("dpo", prog="dpo_gpt2.py")
    parser.print_all_flags()
    text = capsys.readouterr().out
    assert [name for name in parser.names() if (f"--{name} " in text) is (name in REFUSED)] == []


@pytest.mark.parametrize("name", MEANT)
def test_a_name_that_people_type_leads_to_the_flag(name):
    parser = FlagParser("dpo")
    assert name not in parser.names()
    assert name not in RETIRED
    error = parser._unknown(f"--{name}", "the command line")
    assert error.do == f"did you mean --{MEANT[name]}?"
    assert parser._unknown(f"--{name}", "a.yaml", written=name).do == f"did you mean {MEANT[name]}?"
    assert MEANT[name] in parser.names()


@pytest.mark.parametrize("name", OF_LAUNCHER)
def test_a_flag_of_the_launcher_is_named_as_one(name):
    error = FlagParser("dpo")._unknown(f"--{name.replace('_', '-')}=8", "the command line")
    assert "before the recipe" in error.do


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--a", "1e-5", "--b=x y", "--c"], {"a": 1e-5, "b": "x y", "c": True}),
        (["--a-b", "1", "2", "--a-b", "no"], {"a_b": "no"}),
        (["--no_shared_prefix"], {"shared_prefix": False}),
        (["--a", "[1"], {"a": "[1"}),
        (["--help", "--a="], {"a": None}),
    ],
)
def test_the_command_line_is_read_as_flags(argv, values):
    assert read_command_line(argv) == values


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (True, "true"), ([1.0, "sft"], "1.0 sft"), (1e-6, "1e-06"), ("a b", "a b")]
)
def test_a_value_is_shown_as_one_would_type_it(value, text):
    assert format_value(value) == text
