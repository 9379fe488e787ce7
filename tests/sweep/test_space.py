"""A space is read whole or refused in one message, before anything is started."""

from pathlib import Path

import pytest
from conftest import ROOT

from dpokit.errors import SettingsError
from dpokit.sweep.space import Range, load_space

STAND_IN = Path(__file__).parent / "stand_in_recipe.py"


@pytest.fixture
def read(tmp_path):
    def go(text: str):
        path = tmp_path / "space.yaml"
        path.write_text(f"recipe: {STAND_IN}\n{text}" if "recipe:" not in text else text)
        return load_space(path)

    return go


def test_a_grid_is_every_combination(read):
    space = read("parameters: {learning_rate: [1e-5, 2e-5], beta: [0.1, 0.2, 0.3]}")
    assert space.trials == len(space.configurations) == 6
    assert space.configurations[0] == {"learning_rate": 1e-5, "beta": 0.1}


def test_more_trials_are_the_same_space_also_where_they_then_share_the_reference(read):
    recipe = f"recipe: {ROOT / 'recipes' / 'dpo_gpt2.py'}\nsearch: tpe\nparameters: {{beta: {{low: 0.1, high: 0.5}}}}"
    one, two = (read(f"{recipe}\ntrials: {number}") for number in (1, 2))
    assert one.settings != two.settings
    assert one.identity() == two.identity()


def test_a_range_is_of_whole_numbers_where_its_flag_is(read):
    text = "search: tpe\ntrials: 5\nparameters: {weight_decay: {low: 0, high: 1}, lora_r: {low: 5, high: 9}}"
    assert [values.is_whole for values in read(text).parameters.values()] == [False, True]


def test_ranges_are_whole_numbers_where_both_ends_are(read):
    space = read(
        "search: tpe\ntrials: 5\nparameters: {lora_r: {low: 4, high: 64}, beta: {low: 0.05, high: 1, log: true}}"
    )
    assert space.parameters == {"lora_r": Range(4, 64), "beta": Range(0.05, 1, log=True)}
    assert [values.is_whole for values in space.parameters.values()] == [True, False]


def test_the_published_search_has_its_three_configurations(monkeypatch):
    monkeypatch.chdir(ROOT)
    space = load_space(Path("recipes/spaces/gpt2_hh_512.yaml"))
    names = ("learning_rate", "per_device_train_batch_size", "weight_decay")
    assert [tuple(one[name] for name in names) for one in space.configurations] == [
        (5e-5, 3, 0.01),
        (1e-4, 3, 0.01),
        (5e-5, 4, 0.005),
    ]
    assert (space.settings["num_train_epochs"], space.settings["max_length"], space.metric) == (2, 512, "eval_loss")
    assert "output_dir" not in space.settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parameter: {beta: [0.1]}", "there is no key 'parameter'"),
        ("parameters: {betta: [0.1, 0.2]}", "there is no setting 'betta'"),
        ("parameters: {beta: [0.1, high]}", "invalid float value"),
        ("settings: {learning_rat: 1e-5}\nparameters: {beta: [0.1]}", "there is no setting 'learning_rat'"),
        ("parameters: {}", "the space is empty"),
        ("search: listed\nconfigurations: []", "the space is empty"),
        ("parameters: {beta: []}", "beta has nothing to choose from"),
        ("search: bayes\nparameters: {beta: [0.1]}", "search is 'bayes'"),
        ("search: tpe\nparameters: {beta: [0.1, 0.2]}", "trials is None"),
        ("parameters: {beta: {low: 0.1, high: 0.2}}", "a grid has no ranges"),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0.3, high: 0.2}}", "the range of beta is"),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0, high: 0.2, log: true}}", "the range of beta is"),
        (
            "parameters: {beta: [0.1]}\nconfigurations: [{beta: 0.2}]",
            "configurations are listed, and parameters besides",
        ),
        ("search: tpe\ntrials: 2\nparameters: {lora_r: {low: 1, high: 9, step: 0}}", "step \\(above 0"),
        ("search: tpe\ntrials: 2\nparameters: {lora_r: {low: 1, high: 9, step: 10}}", "within the range"),
        ("search: tpe\ntrials: 2\nparameters: {lora_r: {low: 1, high: 9, step: 0.5}}", "lora_r is a whole number"),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0.1, high: .inf}}", "the range of beta is"),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0.1, high: 0.2, log: often}}", "log of beta is 'often'"),
        ("prune: never\nparameters: {beta: [0.1, 0.2]}", "prune is 'never'"),
        ("trials: 2\nparameters: {beta: [0.1, 0.2]}", "trials is 2, and search is grid"),
        ("parameters: {output_dir: [a, b]}", "it sets output_dir"),
        ("seeds: 2\nparameters: {seed: [1, 2]}", "seed is varied, and seeds besides"),
        ("seeds: 0\nparameters: {beta: [0.1]}", "seeds is 0"),
        ("settings: {eval_strategy: 'no'}\nparameters: {beta: [0.1]}", "eval_loss is never measured"),
        ("settings: {config: nowhere.yaml}\nparameters: {beta: [0.1]}", "nowhere.yaml"),
        ("config_file: nowhere.yaml\nparameters: {beta: [0.1]}", "config_file nowhere.yaml is no file"),
        ("recipe: nowhere\nparameters: {beta: [0.1]}", "there is no recipe 'nowhere'"),
        ("[beta]", "space.yaml: while scanning"),
        ("- recipe: x", "holds no settings"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_message(text, words, read):
    with pytest.raises(SettingsError, match=words):
        read(text)


@pytest.mark.parametrize(
    ("word", "pruned"), [("no", False), ("off", False), ("false", False), ("yes", True), ("on", True), ("true", True)]
)
def test_a_switch_may_be_any_of_yamls_words(word, pruned, read):
    assert read(f"prune: {word}\nparameters: {{beta: [0.1, 0.2]}}").prune is pruned
    drawn = read(f"search: random\ntrials: 2\nparameters: {{beta: {{low: 0.1, high: 0.2, log: {word}}}}}")
    assert drawn.parameters["beta"].log is pruned


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("parameters: {learning_rate: [1e-5, 2e-5]}", True),
        ("parameters: {learning_rate: [1e-5]}", None),
        ("settings: {max_steps: 10}\nparameters: {learning_rate: [1e-5, 2e-5]}", None),
        ("parameters: {precompute_ref_log_probs: [true, false]}", None),
        ("settings: {sync_ref_model: true}\nparameters: {beta: [0.1, 0.2]}", None),
        ("settings: {disable_dropout: false}\nparameters: {beta: [0.1, 0.2]}", None),
        (f"config_file: {ROOT}/accelerate_configs/fsdp2.yaml\nparameters: {{beta: [0.1, 0.2]}}", None),
    ],
)
def test_trials_share_the_references_log_probs_where_they_can(text, shared, read):
    recipe = f"recipe: {ROOT / 'recipes' / 'dpo_gpt2.py'}\n"
    assert read(recipe + text).settings.get("precompute_ref_log_probs") == shared
