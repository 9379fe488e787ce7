"""Supervised training on the chosen answers, and DPO that starts from its run folder."""

import json
from pathlib import Path

import pytest
import torch
from compare_runs import check_same, interrupt
from conftest import ROOT, write_pairs
from safetensors.torch import load_file
from test_launch import launch, records
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.data.prepare import prepare_data
from dpokit.errors import GateError, RunFolderError, SettingsError
from dpokit.evaluate.command import run_evaluation
from dpokit.plan.plan import build_plan
from dpokit.plan.request import load_request
from dpokit.run import train
from dpokit.rundir import RunDir, find_model, read_metrics
from dpokit.settings.flags import DataArguments
from dpokit.settings.load import load_settings

LORA = {"use_peft": True, "lora_target_modules": ["all-linear"], "lora_r": 4, "learning_rate": 1e-2}


@pytest.fixture
def defaults(tiny_gpt2, tmp_path) -> dict:
    """Settings without dropout, so that a test can compute the numbers itself."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "model")
    return {
        "kind": "sft",
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 20)),
        "output_dir": str(tmp_path / "sft"),
        "eval_fraction": 0.2,
        "gradient_checkpointing": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "max_steps": 6,
        "max_length": 96,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "eval_answers": 2,
    }


def held_out_loss(model: Path, defaults: dict, *, answers_alone: bool = True) -> float:
    """The mean loss over all trained tokens of the held-out chosen answers, by transformers alone."""
    data = DataArguments(dataset_name=defaults["dataset_name"], eval_fraction=0.2)
    prepared = prepare_data(data, AutoTokenizer.from_pretrained(model), max_length=96, with_eval=True)
    net = AutoModelForCausalLM.from_pretrained(model).eval()
    total, tokens = 0.0, 0
    for row in prepared.eval:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            logs = net(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        trained = logs[len(row["prompt_ids"]) - 1 :] if answers_alone else logs
        total, tokens = total - float(trained.sum()), tokens + len(trained)
    return total / tokens


@pytest.mark.parametrize("answers_alone", [True, False])
def test_the_eval_loss_is_the_mean_over_all_answer_tokens(answers_alone, defaults):
    flags = [] if answers_alone else ["--completion_only_loss", "false"]
    run = train("sft_test", {**defaults, "per_device_eval_batch_size": 3}, flags)
    record = run.read_run()
    best = next(r for r in read_metrics(run.metrics_jsonl) if r["step"] == record["best"]["step"])
    assert record["best"]["value"] == min(r["eval_loss"] for r in read_metrics(run.metrics_jsonl) if "eval_loss" in r)
    assert best["eval_loss"] == pytest.approx(held_out_loss(run.model, defaults, answers_alone=answers_alone), rel=1e-5)
    assert best["eval_loss"] < held_out_loss(Path(defaults["model_name_or_path"]), defaults)


def test_a_step_does_not_depend_on_its_micro_batches(defaults, tmp_path):
    """17 rows in steps of 8: the last step has a single row."""
    pairs = write_pairs(tmp_path / "21.jsonl", 21)
    ways = {"whole": (8, 1), "split": (2, 4), "uneven": (4, 2)}
    runs = {}
    for name, (size, micro_batches) in ways.items():
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        changes |= {"output_dir": defaults["output_dir"] + name, "dataset_name": str(pairs)}
        runs[name] = train("sft_test", {**defaults, **changes}, [])
    losses = {name: [r["loss"] for r in read_metrics(run.metrics_jsonl) if "loss" in r] for name, run in runs.items()}
    weights = {name: load_file(run.model / "model.safetensors") for name, run in runs.items()}
    for name in ("split", "uneven"):
        assert losses[name] == pytest.approx(losses["whole"], rel=1e-5)
        assert all(torch.allclose(w, weights["whole"][n], atol=1e-5) for n, w in weights[name].items())


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 3}, LORA],
    ids=["plain", "uneven epochs", "adapter"],
)
def test_a_resumed_supervised_run_equals_an_uninterrupted_one(changes, defaults, tiny_gpt2, tmp_path):
    """With GPT-2's own dropout."""
    settings = {**defaults, "model_name_or_path": str(tiny_gpt2), **changes}
    whole = train("sft_test", settings, [])
    cut = interrupt(whole, tmp_path / "cut", after=4)
    check_same(train("sft_test", {**settings, "output_dir": str(cut.path)}, []), whole)


def test_a_loss_that_is_not_finite_stops_the_run(defaults):
    with pytest.raises(GateError, match="is not finite at step"):
        train("sft_test", {**defaults, "learning_rate": 1e30, "max_grad_norm": 0.0}, [])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("packing", "true", "each answer is a row of its own"),
        ("eos_token", "</s>", "the tokenizer's own value is used"),
        ("beta", "0.1", "there is no setting 'beta'"),
        ("loss_type", "sigmoid", "invalid choice"),
    ],
)
def test_a_flag_that_supervised_training_ignores_is_refused(name, value, message, defaults):
    with pytest.raises(SettingsError, match=message):
        load_settings("sft_test", defaults, [f"--{name}", value])


def test_an_unknown_kind_is_refused(defaults):
    with pytest.raises(SettingsError, match="the recipe's kind is 'ppo'"):
        load_settings("sft_test", {**defaults, "kind": "ppo"}, [])


def test_a_supervised_recipe_has_no_plan(monkeypatch):
    monkeypatch.chdir(ROOT)
    request = load_request("sft_gpt2", [], None)
    with pytest.raises(SettingsError, match="is supervised"):
        build_plan(request)


# -- a run folder as a model -------------------------------------------------------------------------------------------


def to_dpo(defaults: dict, run: Path) -> dict:
    """The settings of DPO that starts from the run, on the same pairs."""
    names = ("kind", "load_best_model_at_end", "metric_for_best_model")
    kept = {name: value for name, value in defaults.items() if name not in names}
    return {**kept, "model_name_or_path": str(run), "output_dir": f"{run}_dpo", "max_steps": 2, "eval_strategy": "no"}


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "adapter"])
def test_a_supervised_run_is_start_and_reference_of_dpo(changes, defaults):
    sft = train("sft_test", {**defaults, **changes}, [])
    dpo = train("dpo_test", {**to_dpo(defaults, sft.path), **changes}, [])
    first = read_metrics(dpo.metrics_jsonl)[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
    before = train("dpo_test", {**to_dpo(defaults, Path(defaults["model_name_or_path"])), **changes}, [])
    assert first["logps/chosen"] > read_metrics(before.metrics_jsonl)[0]["logps/chosen"] + 1
    model = dpo.read_run()["settings"]["model_name_or_path"]
    assert model == {"value": str(sft.adapter if changes else sft.model), "origin": "recipe dpo_test"}


def test_a_resumed_run_uses_the_same_model_of_a_run_folder(defaults, tmp_path):
    sft = train("sft_test", defaults, [])
    settings = {**to_dpo(defaults, sft.path), "max_steps": 4}
    whole = train("dpo_test", settings, [])
    cut = interrupt(whole, tmp_path / "cut", after=2)
    check_same(train("dpo_test", {**settings, "output_dir": str(cut.path)}, []), whole)


def test_the_merged_model_of_a_run_comes_before_its_adapter(tmp_path):
    run = RunDir(tmp_path / "run")
    for folder in (run.adapter, run.merged):
        folder.mkdir(parents=True)
        (run.path / "run.json").write_text("{}")
        assert find_model(str(run.path)) == str(folder)


def test_an_outdated_merge_is_skipped(tmp_path):
    run = RunDir(tmp_path / "run")
    for folder in (run.merged, run.adapter):
        folder.mkdir(parents=True)
    for end, folder in (("t0", run.merged), ("t1", run.adapter)):
        run.run_json.write_text(json.dumps({"state": "finished", "generations": [{"token": end}]}))
        run.merge_json.write_text('{"end": "t0"}')
        assert find_model(str(run.path)) == str(folder)


@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
def test_the_outdated_model_of_an_unfinished_run_is_refused(state, tmp_path):
    run = RunDir(tmp_path)
    run.model.mkdir()
    run.run_json.write_text(json.dumps({"state": state}))
    with pytest.raises(RunFolderError, match=f"that is {state}") as error:
        find_model(str(tmp_path))
    assert error.value.do.endswith(f"name that model: {run.model}")


def test_a_name_that_is_not_a_run_folder_is_unchanged(tmp_path):
    assert find_model("openai-community/gpt2") == "openai-community/gpt2"
    assert find_model(str(tmp_path)) == str(tmp_path)


def test_a_run_without_a_trained_model_names_its_checkpoint(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"state": "preempted"}))
    with pytest.raises(RunFolderError, match="without a trained model \\(it is preempted\\)"):
        find_model(str(tmp_path))
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(RunFolderError, match="checkpoint-10"):
        find_model(str(tmp_path))


def test_a_supervised_run_is_evaluated_on_pairs(defaults):
    run = train("sft_test", defaults, [])
    result = run_evaluation(str(run.path), base=None, data=None, split=None, limit=4, argv=["--use_cpu"])
    assert result["tuned"]["model"] == str(run.model)
    assert result["beta"] == 0.1


# -- placements --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_cpu", "zero2_cpu", "zero3_cpu", "fsdp2_cpu"])
def test_two_processes_train_as_one_does(config, defaults, tmp_path):
    """17 and 3 rows: in an epoch's last step and in the evaluation one process has no row."""
    data = tmp_path / "data"
    data.mkdir()
    write_pairs(data / "train.jsonl", 17)
    write_pairs(data / "test.jsonl", 3)
    flags = [
        *("--model_name_or_path", defaults["model_name_or_path"], "--dataset_name", str(data)),
        *("--learning_rate", "1e-3", "--warmup_steps", "0", "--logging_steps", "1", "--num_train_epochs", "2"),
        *("--eval_steps", "2", "--save_steps", "2", "--max_length", "96", "--bf16", "false"),
        *("--gradient_accumulation_steps", "2", "--per_device_eval_batch_size", "2"),
    ]
    runs = {}
    for name, per_device in {config: 2, "single_gpu": 4}.items():
        runs[name] = tmp_path / name
        more = ["--output_dir", str(runs[name]), "--per_device_train_batch_size", str(per_device)]
        config_file = str(ROOT / "accelerate_configs" / f"{name}.yaml")
        done = launch(["--config_file", config_file], *flags, *more, recipe="sft_gpt2")
        assert done.returncode == 0, done.stderr[-3000:]
    pairs = list(zip(records(runs[config]), records(runs["single_gpu"]), strict=True))
    assert [line["step"] for line, _ in pairs] == [1, 2, 3, 4, 5, 6]
    for line, expected in pairs:
        for name in {"loss", "eval_loss", "mean_token_accuracy", "num_tokens"} & expected.keys():
            assert line[name] == pytest.approx(expected[name], rel=2e-4), name
    ends = [AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in runs.values()]
    assert all(torch.allclose(weight, ends[1][name], atol=1e-4) for name, weight in ends[0].items())
