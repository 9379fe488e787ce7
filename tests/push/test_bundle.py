"""What goes up, under which names, and what never does; no server is needed to know it."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from pushing import BASE, CARD, hash_tree, make_run
from safetensors.torch import load_file, save_file

from dpokit.errors import DpokitError, HubError, SettingsError
from dpokit.push.bundle import build_parcel
from dpokit.push.leak_scan import LeakFinder
from dpokit.rundir import RunDir

MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ALWAYS = {"README.md", "figures/loss.png"}


@pytest.fixture
def run(tmp_path, tiny_gpt2):
    """An adapter with the merged model beside it."""
    return make_run(tmp_path / "run", tiny_gpt2, adapter=True, merged=True)


def paths(parcel):
    return {file.path for file in parcel.files}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


@pytest.mark.parametrize(
    ("what", "sent"),
    [
        (None, MODEL | {"merge.json"}),
        ("merged", MODEL | {"merge.json"}),
        ("adapter", ADAPTER),
        ("both", MODEL | {"merge.json"} | {f"adapter/{name}" for name in ADAPTER}),
    ],
)
def test_the_layout_is_that_of_a_repository_others_can_load(run, what, sent):
    assert paths(build_parcel(run, what=what)) == ALWAYS | sent


@pytest.mark.parametrize("adapter", [False, True])
def test_without_a_merged_model_what_was_trained_goes(tmp_path, tiny_gpt2, adapter):
    run = make_run(tmp_path / "run", tiny_gpt2, adapter=adapter)
    parcel = build_parcel(run)
    assert (parcel.what, paths(parcel)) == (("adapter", ALWAYS | ADAPTER) if adapter else ("merged", ALWAYS | MODEL))


@pytest.mark.parametrize(
    ("adapter", "what", "says"),
    [
        (True, "merged", "an adapter that is not merged"),
        (True, "both", "an adapter that is not merged"),
        (False, "adapter", "the whole model was trained"),
        (False, "weights", "is nothing that can be pushed"),
    ],
)
def test_what_a_run_does_not_have_is_said(tmp_path, tiny_gpt2, adapter, what, says):
    with pytest.raises(SettingsError, match=says):
        build_parcel(make_run(tmp_path / "run", tiny_gpt2, adapter=adapter), what=what)


def test_a_dry_look_names_path_size_and_origin_of_each_file_and_the_total(run):
    parcel = build_parcel(run)
    text = parcel.describe()
    assert text.startswith(f"the whole model, of {run.merged}\n")
    for file in parcel.files:
        line = next(line for line in text.splitlines() if line.startswith(f"{file.path} "))
        assert f"{file.source.stat().st_size:,} bytes" in line
        assert line.endswith(f"from {file.source}")
    assert f"{len(parcel.files)} files" in text
    assert f"{sum(file.source.stat().st_size for file in parcel.files):,} bytes" in text


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "x.pkl",
        "trainer_state.json",
        ".env",
        "model.py",
        "a.ckpt",
    ],
)
def test_nothing_but_weights_configurations_and_tokenizers_goes(run, name):
    (run.merged / name).write_bytes(pickle.dumps({"a": 1}))
    (run.merged / "checkpoint-3").mkdir()
    shutil.copy(run.merged / "model.safetensors", run.merged / "checkpoint-3" / "model.safetensors")
    parcel = build_parcel(run)
    assert paths(parcel) == ALWAYS | MODEL | {"merge.json"}
    left = {path.relative_to(run.merged).as_posix(): why for path, why in parcel.left}
    assert set(left) == {name, "checkpoint-3/model.safetensors"}
    assert ("a pickle" in left[name]) is name.endswith((".bin", ".pt", ".pkl", ".ckpt"))
    assert f"stays here: {run.merged / name}" in parcel.describe()


def test_a_model_that_is_a_pickle_alone_is_refused(run):
    (run.merged / "model.safetensors").rename(run.merged / "pytorch_model.bin")
    with pytest.raises(HubError, match=r"has no \*\.safetensors"):
        build_parcel(run)


def test_a_shard_that_is_missing_is_named(run):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (run.merged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match=r"has no model-00001-of-00002\.safetensors"):
        build_parcel(run)


@pytest.mark.parametrize("name", ["README.md", "figures/loss.png"])
def test_a_card_and_the_pictures_it_shows_must_be_there(run, name):
    (run.path / name).unlink()
    with pytest.raises(HubError, match=name):
        build_parcel(run)


SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 11,
    "a Hugging Face token of OAuth": "hf_oauth_" + "aB3" * 11,
    "an API key": "sk-proj-" + "x9" * 12,
    "a Weights & Biases key": "0123456789abcdef" * 2 + "deadbeef",
    "a GitHub token": "ghp_" + "k2" * 18,
    "an AWS key": "AKIA" + "ABCD" * 4,
}


@pytest.mark.parametrize("what", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "merged/merge.json", "merged/generation_config.json"])
def test_a_token_is_refused_by_file_and_line_and_not_shown(run, what, name):
    path = run.path / name
    if name.endswith("json"):
        edit(path, zz=f"key {SECRETS[what]}")
    else:
        path.write_text(f"{CARD}key: {SECRETS[what]}\n")
    line = len(path.read_text().splitlines()) - name.endswith("json")
    with pytest.raises(HubError) as error:
        build_parcel(run)
    assert f"{path}, line {line} holds {what.removesuffix(' of OAuth')}" in error.value.seen
    assert SECRETS[what] not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "/home/alice/models/base",
        "file:///home/alice",
        "file:///srv/alice/x",
        "/Users/alice/x",
        r"C:\Users\alice",
        "C:/Users/alice/x",
        "first\n/home/alice",
        "{run}",
        "{run}/adapter",
        "{home}/models",
        "{cwd}/data.jsonl",
        "{existing}",
    ],
)
@pytest.mark.parametrize("name", ["README.md", "merged/merge.json", "merged/tokenizer_config.json"])
def test_a_local_path_is_refused_wherever_it_stands(run, tmp_path, name, text):
    (tmp_path / "elsewhere").mkdir()
    known = {"run": run.path, "home": Path.home(), "cwd": Path.cwd(), "existing": tmp_path / "elsewhere"}
    text = text.format(**known) if "{" in text else text
    path = run.path / name
    if name.endswith("json"):
        edit(path, zz=text)
    else:
        path.write_text(f"{CARD}from `{text}`.\n")
    with pytest.raises(HubError, match=r"line \d+ holds the local path"):
        build_parcel(run)


@pytest.mark.parametrize(
    "text",
    [
        "See https://huggingface.co/home/models and [the paper](https://arxiv.org/abs/2305.18290).",
        "base: org/base, revision 0123456789abcdef0123456789abcdef01234567",
        "#!/usr/bin/env python, /dev/null",
        "a task-specific-optimization-of-2-models; hf_hub_download; sk-learn",
        "and/or, 1/2, docs/home/page",
        "sha256 " + "ab" * 32,
    ],
)
def test_what_only_looks_alike_goes(run, text):
    (run.path / "README.md").write_text(f"{CARD}{text}\n")
    assert "README.md" in paths(build_parcel(run))


@pytest.mark.parametrize(
    "path", ["/scratch/alice/llama", "~/models/llama", r"\\server\share\llama", "D:/models/llama", "D:\\models"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_value_of_a_configuration_that_is_a_path_of_another_machine_is_refused(run, name, path):
    edit(run.merged / name, zz={"from": [path]})
    with pytest.raises(HubError, match=rf"{name}, line \d+ holds the local path"):
        build_parcel(run)


@pytest.mark.parametrize("value", ["/", "//", "~", "org/base", "a /b/c in words", "s:", "https://a.org/resolve/main/x"])
def test_a_value_of_a_configuration_that_only_looks_like_a_path_goes(run, value):
    edit(run.merged / "tokenizer_config.json", zz=value)
    assert "tokenizer_config.json" in paths(build_parcel(run))


def test_a_key_is_found_on_a_line_that_names_a_version_too(run):
    path, key = run.merged / "generation_config.json", SECRETS["a Weights & Biases key"]
    path.write_text(json.dumps({"_commit_hash": key, "version": "1"}))
    assert "generation_config.json" in paths(build_parcel(run))
    path.write_text(json.dumps({"_commit_hash": key, "version": "1", "key": key}))
    with pytest.raises(HubError, match="line 1 holds a Weights & Biases key"):
        build_parcel(run)


def test_a_secret_of_this_machine_is_found_in_a_vocabulary_too(run, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery-staple")
    path = run.merged / "tokenizer.json"
    path.write_text(path.read_text().replace('"version"', '"note": "correct-horse-battery-staple", "version"', 1))
    with pytest.raises(HubError, match=r"tokenizer\.json holds the value of SOME_API_KEY"):
        build_parcel(run)


def test_a_path_in_the_header_of_weights_is_found(run):
    path = run.merged / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "from": "/home/alice/base"})
    with pytest.raises(HubError, match=r"model\.safetensors's header holds the local path /home/alice"):
        build_parcel(run)


def test_the_user_of_this_machine_is_found_in_a_path_that_is_not_here(monkeypatch):
    monkeypatch.setenv("USER", "wilhelmina")
    found = list(LeakFinder([]).in_text("trained on /scratch/wilhelmina/hh, by wilhelmina\n"))
    assert found == [(1, "the local path /scratch/wilhelmina/hh")]


def test_a_local_name_in_a_configuration_is_left_out_of_what_is_sent_and_stays_on_disk(run):
    edit(run.merged / "config.json", _name_or_path=str(run.merged))
    edit(run.merged / "tokenizer_config.json", name_or_path="org/base")
    before = hash_tree(run.path)
    sent = {file.path: file for file in build_parcel(run).files}
    local = json.loads((run.merged / "config.json").read_text())
    assert json.loads(sent["config.json"].content) == {k: v for k, v in local.items() if k != "_name_or_path"}
    assert sent["config.json"].changed == "without _name_or_path, a local path"
    assert json.loads(sent["tokenizer_config.json"].content)["name_or_path"] == "org/base"
    assert hash_tree(run.path) == before


def test_an_adapter_of_a_local_base_needs_the_base_on_the_hub(run, tiny_gpt2):
    edit(run.adapter / "adapter_config.json", base_model_name_or_path=str(tiny_gpt2))
    with pytest.raises(HubError, match="a folder of this machine") as error:
        build_parcel(run, what="adapter")
    assert "--base-model ID" in error.value.do
    before = hash_tree(run.path)
    sent = {file.path: file for file in build_parcel(run, what="both", base_model=BASE).files}
    assert json.loads(sent["adapter/adapter_config.json"].content)["base_model_name_or_path"] == BASE
    assert hash_tree(run.path) == before


@pytest.mark.parametrize(
    ("what", "base_model", "says"),
    [("adapter", "/models/base", "is a local folder"), ("merged", BASE, "would have no effect")],
)
def test_a_base_that_is_none_is_refused(run, what, base_model, says):
    with pytest.raises(SettingsError, match=says):
        build_parcel(run, what=what, base_model=base_model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_named(run, name):
    (run.merged / name).write_bytes(b"\x10\x00broken")
    with pytest.raises(HubError, match=name):
        build_parcel(run)


def test_a_folder_without_weights_is_no_run(tmp_path):
    with pytest.raises(DpokitError, match="holds no final weights"):
        build_parcel(RunDir(tmp_path))
