"""A space is read, or refused with one message, before a run starts."""

from pathlib import Path

import pytest
from conftest import ROOT

from dpokit.errors import SettingsError
from dpokit.sweep.space import Range, load_space

ACCURACY, HELD = "eval_rewards/accuracies", "{eval_fraction: 0.3}"
STAND_IN = Path(__file__).parent / "stand_in_recipe.py"


@pytest.fixture
def read(tmp_path):
    def read_text(text: str):
        path = tmp_path / "space.yaml"
        path.write_text(f"recipe: {STAND_IN}\n{text}" if "recipe:" not in text else text)
        return load_space(path)

    return read_text


def test_a_grid_has_every_combination(read):
    space = read("parameters: {learning_rate: [1e-5, 2e-5], beta: [0.1, 0.2, 0.3]}")
    assert space.trials == len(space.configurations) == 6
    assert space.configurations[0] == {"learning_rate": 1e-5, "beta": 0.1}


def test_the_number_of_trials_is_no_part_of_the_identity(read):
    recipe = f"recipe: {ROOT / 'recipes' / 'dpo_gpt2.py'}\nsearch: tpe\nparameters: {{beta: {{low: 0.1, high: 0.5}}}}"
    first, second = (read(f"{recipe}\ntrials: {number}") for number in (1, 2))
    assert first.settings != second.settings
    assert first.identity() == second.identity()


def test_a_range_has_the_type_of_its_flag(read):
    text = "search: tpe\ntrials: 5\nparameters: {weight_decay: {low: 0, high: 1}, lora_r: {low: 5, high: 9}}"
    assert [values.is_whole for values in read(text).parameters.values()] == [False, True]


def test_a_range_with_whole_ends_has_whole_numbers(read):
    space = read(
        "search: tpe\ntrials: 5\nparameters: {lora_r: {low: 4, high: 64}, beta: {low: 0.05, high: 1, log: true}}"
    )
    assert space.parameters == {"lora_r": Range(4, 64), "beta": Range(0.05, 1, log=True)}
    assert [values.is_whole for values in space.parameters.values()] == [True, False]


def test_the_published_search_has_three_configurations(monkeypatch):
    monkeypatch.chdir(ROOT)
    space = load_space(Path("recipes/spaces/gpt2_hh_512.yaml"))
    names = ("learning_rate", "per_device_train_batch_size", "weight_decay")
    assert [tuple(configuration[name] for name in names) for configuration in space.configurations] == [
        (5e-5, 3, 0.01),
        (1e-4, 3, 0.01),
        (5e-5, 4, 0.005),
    ]
    assert (space.settings["num_train_epochs"], space.settings["max_length"], space.metric) == (2, 512, "eval_loss")
    assert "output_dir" not in space.settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameter: {beta: [0.1]}", "there is no key 'parameter'"),
        ("parameters: {betta: [0.1, 0.2]}", "there is no setting 'betta'"),
        ("parameters: {beta: [0.1, high]}", "invalid float value"),
        ("settings: {learning_rat: 1e-5}\nparameters: {beta: [0.1]}", "there is no setting 'learning_rat'"),
        ("parameters: {}", "the space is empty"),
        ("search: listed\nconfigurations: []", "the space is empty"),
        ("parameters: {beta: []}", "beta has no values to choose from"),
        ("search: bayes\nparameters: {beta: [0.1]}", "search is 'bayes'"),
        ("search: tpe\nparameters: {beta: [0.1, 0.2]}", "trials is None"),
        ("parameters: {beta: {low: 0.1, high: 0.2}}", "a range in a grid"),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0.3, high: 0.2}}", "the range of beta is"),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0, high: 0.2, log: true}}", "the range of beta is"),
        (
            "parameters: {beta: [0.1]}\nconfigurations: [{beta: 0.2}]",
            "both configurations and parameters are set",
        ),
        ("search: tpe\ntrials: 2\nparameters: {lora_r: {low: 1, high: 9, step: 0}}", "step \\(above 0"),
        ("search: tpe\ntrials: 2\nparameters: {lora_r: {low: 1, high: 9, step: 10}}", "within the range"),
        ("search: tpe\ntrials: 2\nparameters: {lora_r: {low: 1, high: 9, step: 0.5}}", "lora_r is a whole number"),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0.1, high: .inf}}", "the range of beta is"),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0.1, high: 0.2, log: often}}", "log of beta is 'often'"),
        ("prune: never\nparameters: {beta: [0.1, 0.2]}", "prune is 'never'"),
        ("trials: 2\nparameters: {beta: [0.1, 0.2]}", "trials is 2, but search is grid"),
        ("parameters: {output_dir: [a, b]}", "it sets output_dir"),
        ("seeds: 2\nparameters: {seed: [1, 2]}", "seed varies, and seeds is above 1"),
        ("seeds: 0\nparameters: {beta: [0.1]}", "seeds is 0"),
        ("settings: {eval_strategy: 'no'}\nparameters: {beta: [0.1]}", "eval_loss is never measured"),
        ("settings: {config: nowhere.yaml}\nparameters: {beta: [0.1]}", "nowhere.yaml"),
        ("config_file: nowhere.yaml\nparameters: {beta: [0.1]}", "config_file nowhere.yaml is no file"),
        ("recipe: nowhere\nparameters: {beta: [0.1]}", "there is no recipe 'nowhere'"),
        ("[beta]", "space.yaml: while scanning"),
        ("- recipe: x", "holds no settings"),
    ],
)
def test_an_invalid_space_is_refused(text, message, read):
    with pytest.raises(SettingsError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("switch", "pruned"), [("no", False), ("off", False), ("false", False), ("yes", True), ("on", True), ("true", True)]
)
def test_a_switch_takes_every_boolean_of_yaml(switch, pruned, read):
    assert read(f"prune: {switch}\nparameters: {{beta: [0.1, 0.2]}}").prune is pruned
    drawn = read(f"search: random\ntrials: 2\nparameters: {{beta: {{low: 0.1, high: 0.2, log: {switch}}}}}")
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
def test_trials_share_reference_log_probs_if_possible(text, shared, read):
    recipe = f"recipe: {ROOT / 'recipes' / 'dpo_gpt2.py'}\n"
    assert read(recipe + text).settings.get("precompute_ref_log_probs") == shared


@pytest.mark.parametrize(
    ("text", "metric", "obstacles"),
    [
        ("parameters: {learning_rate: [1e-5, 2e-5]}", "eval_loss", []),
        ("parameters: {learning_rate: [1e-5, 2e-5], beta: [0.1, 0.1]}", "eval_loss", []),
        ("parameters: {beta: [0.1, 0.3]}", "eval_rewards/accuracies", []),
        ("search: tpe\ntrials: 2\nparameters: {beta: {low: 0.1, high: 0.3}}", "eval_rewards/accuracies", []),
        ("configurations: [{loss_type: [ipo]}, {learning_rate: 1e-5}]", "eval_rewards/accuracies", []),
        ("configurations: [{max_length: 128}, {max_length: 256}]", "eval_rewards/accuracies", ["max_length"]),
        ("metric: eval_loss\nparameters: {beta: [0.1, 0.3], seed: [1, 2]}", "eval_loss", ["beta"]),
        ("metric: eval_rewards/margins\nparameters: {loss_type: [[ipo], [hinge]]}", "eval_rewards/margins", []),
        ("metric: eval_rewards/margins\nparameters: {beta: [0.1, 0.3]}", "eval_rewards/margins", ["beta"]),
        (f"settings: {HELD}\nparameters: {{max_train_samples: [20, 40]}}", ACCURACY, ["max_train_samples"]),
        (f"settings: {HELD}\nparameters: {{dataset_train_split: [a, b]}}", ACCURACY, ["dataset_train_split"]),
        ("settings: {dataset_test_split: x}\nparameters: {max_train_samples: [20, 40]}", "eval_loss", []),
        ("metric: loss\nparameters: {max_train_samples: [20, 40]}", "loss", ["max_train_samples"]),
        ("parameters: {skip_bad_rows: [true, false]}", ACCURACY, ["skip_bad_rows"]),
        ("parameters: {model_name_or_path: [a, b]}", ACCURACY, ["model_name_or_path"]),
        ("parameters: {model_revision: [a, b]}", ACCURACY, ["model_revision"]),
        ("parameters: {drop_duplicates: [true, false]}", ACCURACY, ["drop_duplicates"]),
        ("parameters: {mixture_seed: [1, 2]}", ACCURACY, ["mixture_seed"]),
        ("metric: tokens_per_second\nparameters: {max_length: [64, 128]}", "tokens_per_second", []),
    ],
)
def test_trials_are_ranked_by_values_that_can_be_compared(text, metric, obstacles, read):
    space = read(text)
    assert (space.metric, space.find_obstacles()) == (metric, obstacles)
    assert read(f"prune: true\n{text}").prune is not bool(obstacles)
