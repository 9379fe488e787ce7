"""The files of a push and their names, and the files that are never sent. No server is needed."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from pushing import BASE, CARD, hash_tree, make_run
from safetensors.torch import load_file, save_file

from dpokit.errors import DpokitError, HubError, SettingsError
from dpokit.push.bundle import build_bundle
from dpokit.push.leak_scan import LeakFinder
from dpokit.rundir import RunDir

MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ALWAYS = {"README.md", "figures/loss.png"}


@pytest.fixture
def run(tmp_path, tiny_gpt2):
    """A run with an adapter and its merged model."""
    return make_run(tmp_path / "run", tiny_gpt2, adapter=True, merged=True)


def paths(bundle):
    return {file.path for file in bundle.files}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


@pytest.mark.parametrize(
    ("weights", "sent"),
    [
        (None, MODEL | {"merge.json"}),
        ("model", MODEL | {"merge.json"}),
        ("adapter", ADAPTER),
        ("both", MODEL | {"merge.json"} | {f"adapter/{name}" for name in ADAPTER}),
    ],
)
def test_the_layout_is_that_of_a_loadable_repository(run, weights, sent):
    assert paths(build_bundle(run, weights=weights)) == ALWAYS | sent


@pytest.mark.parametrize("adapter", [False, True])
def test_without_a_merged_model_the_trained_weights_are_sent(tmp_path, tiny_gpt2, adapter):
    run = make_run(tmp_path / "run", tiny_gpt2, adapter=adapter)
    bundle = build_bundle(run)
    assert (bundle.weights, paths(bundle)) == (("adapter", ALWAYS | ADAPTER) if adapter else ("model", ALWAYS | MODEL))


@pytest.mark.parametrize(
    ("adapter", "weights", "says"),
    [
        (True, "model", "an adapter that is not merged"),
        (True, "both", "an adapter that is not merged"),
        (False, "adapter", "the whole model was trained"),
        (False, "weights", "--weights weights is unknown"),
    ],
)
def test_weights_that_a_run_lacks_are_refused(tmp_path, tiny_gpt2, adapter, weights, says):
    with pytest.raises(SettingsError, match=says):
        build_bundle(make_run(tmp_path / "run", tiny_gpt2, adapter=adapter), weights=weights)


def test_the_description_has_each_file_and_the_total(run):
    bundle = build_bundle(run)
    text = bundle.describe()
    assert text.startswith(f"the whole model, of {run.merged}\n")
    for file in bundle.files:
        line = next(line for line in text.splitlines() if line.startswith(f"{file.path} "))
        assert f"{file.source.stat().st_size:,} bytes" in line
        assert line.endswith(f"from {file.source}")
    assert f"{len(bundle.files)} files" in text
    assert f"{sum(file.source.stat().st_size for file in bundle.files):,} bytes" in text


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
def test_only_weights_configs_and_tokenizers_are_sent(run, name):
    (run.merged / name).write_bytes(pickle.dumps({"a": 1}))
    (run.merged / "checkpoint-3").mkdir()
    shutil.copy(run.merged / "model.safetensors", run.merged / "checkpoint-3" / "model.safetensors")
    bundle = build_bundle(run)
    assert paths(bundle) == ALWAYS | MODEL | {"merge.json"}
    left = {path.relative_to(run.merged).as_posix(): why for path, why in bundle.left}
    assert set(left) == {name, "checkpoint-3/model.safetensors"}
    assert ("a pickle" in left[name]) is name.endswith((".bin", ".pt", ".pkl", ".ckpt"))
    assert f"not sent: {run.merged / name}" in bundle.describe()


def test_a_model_saved_only_as_a_pickle_is_refused(run):
    (run.merged / "model.safetensors").rename(run.merged / "pytorch_model.bin")
    with pytest.raises(HubError, match=r"has no \*\.safetensors"):
        build_bundle(run)


def test_a_missing_shard_is_named(run):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (run.merged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match=r"has no model-00001-of-00002\.safetensors"):
        build_bundle(run)


@pytest.mark.parametrize("name", ["README.md", "figures/loss.png"])
def test_a_missing_card_or_picture_is_refused(run, name):
    (run.path / name).unlink()
    with pytest.raises(HubError, match=name):
        build_bundle(run)


SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 11,
    "a Hugging Face token of OAuth": "hf_oauth_" + "aB3" * 11,
    "an API key": "sk-proj-" + "x9" * 12,
    "a Weights & Biases key": "0123456789abcdef" * 2 + "deadbeef",
    "a GitHub token": "ghp_" + "k2" * 18,
    "an AWS key": "AKIA" + "ABCD" * 4,
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "merged/merge.json", "merged/generation_config.json"])
def test_a_secret_is_refused_by_file_and_line_but_not_shown(run, kind, name):
    path = run.path / name
    if name.endswith("json"):
        edit(path, zz=f"key {SECRETS[kind]}")
    else:
        path.write_text(f"{CARD}key: {SECRETS[kind]}\n")
    line = len(path.read_text().splitlines()) - name.endswith("json")
    with pytest.raises(HubError) as error:
        build_bundle(run)
    assert f"{path}, line {line} holds {kind.removesuffix(' of OAuth')}" in error.value.seen
    assert SECRETS[kind] not in str(error.value)


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
def test_a_local_path_is_refused_in_every_file(run, tmp_path, name, text):
    (tmp_path / "elsewhere").mkdir()
    folders = {"run": run.path, "home": Path.home(), "cwd": Path.cwd(), "existing": tmp_path / "elsewhere"}
    text = text.format(**folders) if "{" in text else text
    path = run.path / name
    if name.endswith("json"):
        edit(path, zz=text)
    else:
        path.write_text(f"{CARD}from `{text}`.\n")
    with pytest.raises(HubError, match=r"line \d+ holds the local path"):
        build_bundle(run)


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
def test_text_that_only_resembles_a_secret_is_sent(run, text):
    (run.path / "README.md").write_text(f"{CARD}{text}\n")
    assert "README.md" in paths(build_bundle(run))


@pytest.mark.parametrize(
    "path", ["/scratch/alice/llama", "~/models/llama", r"\\server\share\llama", "D:/models/llama", "D:\\models"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_config_value_that_is_a_foreign_path_is_refused(run, name, path):
    edit(run.merged / name, zz={"from": [path]})
    with pytest.raises(HubError, match=rf"{name}, line \d+ holds the local path"):
        build_bundle(run)


@pytest.mark.parametrize("value", ["/", "//", "~", "org/base", "a /b/c in words", "s:", "https://a.org/resolve/main/x"])
def test_a_config_value_that_only_resembles_a_path_is_sent(run, value):
    edit(run.merged / "tokenizer_config.json", zz=value)
    assert "tokenizer_config.json" in paths(build_bundle(run))


def test_a_key_on_a_line_with_a_commit_hash_is_found(run):
    path, key = run.merged / "generation_config.json", SECRETS["a Weights & Biases key"]
    path.write_text(json.dumps({"_commit_hash": key, "version": "1"}))
    assert "generation_config.json" in paths(build_bundle(run))
    path.write_text(json.dumps({"_commit_hash": key, "version": "1", "key": key}))
    with pytest.raises(HubError, match="line 1 holds a Weights & Biases key"):
        build_bundle(run)


def test_a_secret_of_this_machine_is_found_in_a_vocabulary(run, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery-staple")
    path = run.merged / "tokenizer.json"
    path.write_text(path.read_text().replace('"version"', '"note": "correct-horse-battery-staple", "version"', 1))
    with pytest.raises(HubError, match=r"tokenizer\.json holds the value of SOME_API_KEY"):
        build_bundle(run)


def test_a_path_in_the_header_of_weights_is_found(run):
    path = run.merged / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "from": "/home/alice/base"})
    with pytest.raises(HubError, match=r"model\.safetensors's header holds the local path /home/alice"):
        build_bundle(run)


def test_a_missing_path_that_holds_the_user_name_is_found(monkeypatch):
    monkeypatch.setenv("USER", "wilhelmina")
    leaks = list(LeakFinder([]).search_text("trained on /scratch/wilhelmina/hh, by wilhelmina\n"))
    assert leaks == [(1, "the local path /scratch/wilhelmina/hh")]


def test_a_local_path_in_a_config_is_removed_in_the_sent_copy(run):
    edit(run.merged / "config.json", _name_or_path=str(run.merged))
    edit(run.merged / "tokenizer_config.json", name_or_path="org/base")
    before = hash_tree(run.path)
    sent = {file.path: file for file in build_bundle(run).files}
    local = json.loads((run.merged / "config.json").read_text())
    assert json.loads(sent["config.json"].content) == {k: v for k, v in local.items() if k != "_name_or_path"}
    assert sent["config.json"].changed == "without _name_or_path, a local path"
    assert json.loads(sent["tokenizer_config.json"].content)["name_or_path"] == "org/base"
    assert hash_tree(run.path) == before


def test_an_adapter_of_a_local_base_needs_the_base_on_the_hub(run, tiny_gpt2):
    edit(run.adapter / "adapter_config.json", base_model_name_or_path=str(tiny_gpt2))
    with pytest.raises(HubError, match="a folder or file of this machine") as error:
        build_bundle(run, weights="adapter")
    assert "--base-model ID" in error.value.do
    before = hash_tree(run.path)
    sent = {file.path: file for file in build_bundle(run, weights="both", base_model=BASE).files}
    assert json.loads(sent["adapter/adapter_config.json"].content)["base_model_name_or_path"] == BASE
    assert hash_tree(run.path) == before


@pytest.mark.parametrize(
    ("weights", "base_model", "says"),
    [("adapter", "/models/base", "is a local folder"), ("model", BASE, "has no effect")],
)
def test_an_unusable_base_model_is_refused(run, weights, base_model, says):
    with pytest.raises(SettingsError, match=says):
        build_bundle(run, weights=weights, base_model=base_model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_named(run, name):
    (run.merged / name).write_bytes(b"\x10\x00broken")
    with pytest.raises(HubError, match=name):
        build_bundle(run)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(DpokitError, match="holds no final weights"):
        build_bundle(RunDir(tmp_path))
