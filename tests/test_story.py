"""A whole run: its folder, its refusals and their messages."""

import json
from pathlib import Path

import pytest
from small_disk import small_disk

from dpokit.checkpoint.store import find_checkpoints
from dpokit.errors import DataError, ModelError, RunFolderError, SettingsError
from dpokit.run import train
from dpokit.rundir import RunDir

BASE = {
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
}


@pytest.fixture
def defaults(tiny_gpt2, pairs_file, tmp_path) -> dict:
    places = {"model_name_or_path": tiny_gpt2, "dataset_name": pairs_file, "output_dir": tmp_path / "run"}
    return {**BASE, **{name: str(path) for name, path in places.items()}}


def test_a_run_leaves_record_metrics_data_and_weights(defaults, capfd):
    run = train("dpo_test", defaults, [])
    record = run.read_run()
    assert record["state"] == "finished"
    assert record["world_size"] == 1
    assert record["settings"]["max_steps"] == {"value": 3, "origin": "recipe dpo_test"}
    assert len(record["data_fingerprint"]) == 64
    data = json.loads(run.data_json.read_text())
    assert (data["train"]["rows"], data["train"]["kept"], data["train"]["dropped"]) == (40, 40, {})
    assert {path.suffix for path in run.model.iterdir()} == {".safetensors", ".json"}
    screen = capfd.readouterr()
    assert "Warning" not in screen.err + screen.out


def test_a_finished_run_changes_only_on_request(defaults):
    run = train("dpo_test", defaults, [])
    before = run.metrics_jsonl.read_text()
    with pytest.raises(RunFolderError, match="holds a finished run"):
        train("dpo_test", defaults, [])
    assert run.metrics_jsonl.read_text() == before
    assert run.read_run()["state"] == "finished"
    train(
        "dpo_test", defaults, ["--resume_from_checkpoint", "auto", "--max_steps", "4", "--accept_changes", "max_steps"]
    )
    assert [json.loads(line)["step"] for line in run.metrics_jsonl.read_text().splitlines()][-1] == 4
    train("dpo_test", defaults, ["--overwrite_run"])
    assert run.read_run()["state"] == "finished"


def test_a_folder_of_another_recipe_is_refused(defaults):
    train("dpo_test", defaults, [])
    with pytest.raises(RunFolderError, match="another run"):
        train("dpo_other", defaults, ["--resume_from_checkpoint", "auto"])


def test_a_folder_of_another_program_is_refused_and_kept(defaults):
    foreign = Path(defaults["output_dir"]) / "checkpoint-7"
    foreign.mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"no run\.json"):
        train("dpo_test", defaults, [])
    assert foreign.is_dir()


def test_resuming_from_a_path_without_a_checkpoint_is_refused(defaults, tmp_path):
    with pytest.raises(SettingsError, match="there is no checkpoint"):
        train("dpo_test", defaults, ["--resume_from_checkpoint", str(tmp_path)])


def test_a_failed_run_says_why_in_its_record(defaults, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        train("dpo_test", defaults, ["--dataset_name", str(tmp_path / "empty.jsonl")])
    record = RunDir(defaults["output_dir"]).read_run()
    assert record["state"] == "failed"
    assert "empty" in record["why"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_missing_model_is_named(defaults):
    with pytest.raises(ModelError, match="/no/such/model"):
        train("dpo_test", defaults, ["--model_name_or_path", "/no/such/model"])


def test_a_tokenizer_without_eos_is_refused(defaults, tiny_gpt2, tmp_path):
    import shutil

    folder = tmp_path / "no_eos"
    shutil.copytree(tiny_gpt2, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("eos_token", "pad_token", "bos_token"):
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no EOS"):
        train("dpo_test", defaults, ["--model_name_or_path", str(folder)])


def test_more_tokens_than_the_model_has_positions_is_refused(defaults):
    with pytest.raises(SettingsError, match="256 positions"):
        train("dpo_test", defaults, ["--max_length", "257"])


@pytest.mark.parametrize("folder", ["/proc/dpokit", "/dev/null/run"])
def test_an_output_folder_that_cannot_be_written_is_refused(folder, defaults):
    with pytest.raises(RunFolderError, match="--output_dir"):
        train("dpo_test", defaults, ["--output_dir", folder])


def test_a_full_disk_ends_in_one_message_and_no_partial_model(defaults, tmp_path):
    small = tmp_path / "small"
    with small_disk(small, "96k"):
        with pytest.raises(RunFolderError, match="no space is left"):
            train("dpo_test", defaults, ["--output_dir", str(small / "run"), "--save_strategy", "no"])
        assert not (small / "run" / "model").exists()
        assert not list((small / "run").glob(".model*"))


def causes(error: BaseException) -> list[type]:
    kinds = []
    while (cause := error.__cause__ or error.__context__) is not None:
        kinds.append(type(error := cause))
    return kinds


def test_a_save_that_fills_the_disk_frees_its_space(defaults, tmp_path):
    """The disk sizes cover every file of a save, also tokenizer.json, where tokenizers raises a bare Exception."""
    small, kinds = tmp_path / "small", set()
    for size in range(64, 640, 16):
        with small_disk(small, f"{size}k"):
            run = RunDir(small / "run")
            message = ""
            try:
                train("dpo_test", defaults, ["--output_dir", str(run.path), "--save_steps", "1"])
            except RunFolderError as error:
                message = error.seen
                kinds |= set(causes(error))
            assert not message or "no space is left" in message
            if run.run_json.exists():
                assert run.read_run()["state"] == ("failed" if message else "finished")
            assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]
            assert not any(checkpoint.resume_problem for checkpoint in find_checkpoints(run, deep=True))
        small.rmdir()
    assert Exception in kinds


def test_a_stream_trains_like_a_file(defaults):
    run = train("dpo_test", defaults, ["--dataset_streaming"])
    data = json.loads(run.data_json.read_text())
    assert data["train"]["kept"] == 40
    assert data["fingerprint"] is None


def test_the_best_checkpoint_by_eval_loss_is_kept(defaults):
    flags = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end"]
    # This learning rate ruins the model, so the first evaluation is the best.
    run = train("dpo_test", defaults, [*flags, "--eval_fraction", "0.2", "--learning_rate", "0.3", "--max_steps", "4"])
    losses = {
        record["step"]: record["eval_loss"]
        for record in map(json.loads, run.metrics_jsonl.read_text().splitlines())
        if "eval_loss" in record
    }
    best = run.read_run()["best"]
    assert best["value"] == min(losses.values())
    assert losses[best["step"]] == best["value"]


def test_a_chat_model_trains_with_its_template(defaults, tiny_qwen2):
    run = train("dpo_test", defaults, ["--model_name_or_path", str(tiny_qwen2)])
    assert run.read_run()["state"] == "finished"
