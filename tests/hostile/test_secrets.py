"""Secrets in settings, spaces, jobs and environment variables appear in no file and on no screen."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, write_pairs
from run_folders import make_run, make_steps

from dpokit.card.card import write_card
from dpokit.cluster.slurm import SlurmJob, render_job
from dpokit.credentials import find_secrets, hide_secrets
from dpokit.errors import DataError, SettingsError
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings

SECRET = "s3cr3t" + "A" * 24
# Forms in which a text may hold the secret.
FORMS = {
    "a Hub token": f"hf_{SECRET}",
    "an API key": f"sk-proj-{SECRET}",
    "a GitHub token": f"ghp_{SECRET}",
    "a new Weights & Biases key": f"wandb_v1_{SECRET}",
    "user and password": f"https://user:{SECRET}@host/data.jsonl",
    "a user alone": f"https://{SECRET}@host/data.jsonl",
    "an empty user": f"https://:{SECRET}@host/data.jsonl",
    "an escaped colon": f"https://user%3A{SECRET}@host/data.jsonl",
    "a password with an at": f"https://user:{SECRET}@more@host/data.jsonl",
    "in capitals": f"HTTPS://user:{SECRET}@host/data.jsonl",
    "a port": f"http://user:{SECRET}@host:8080/data.jsonl",
    "a database": f"postgresql+psycopg2://user:{SECRET}@host/db",
    "a cache": f"redis://:{SECRET}@host:6379/0",
    "a bucket": f"s3://key:{SECRET}@bucket/data.jsonl",
    "a parameter": f"https://host/data.jsonl?token={SECRET}",
    "a later parameter": f"https://host/data.jsonl?download=1&access_token={SECRET}",
    "a parameter in capitals": f"https://host/data.jsonl?API_KEY={SECRET}",
    "a signed URL of Amazon": f"https://host/data.jsonl?X-Amz-Expires=9&X-Amz-Signature={SECRET}",
    "an old signed URL of Amazon": f"https://host/data.jsonl?AWSAccessKeyId={SECRET}",
    "a signed URL of Azure": f"https://host/data.jsonl?sv=2022&sig={SECRET}",
    "a signed URL of Google": f"https://host/data.jsonl?X-Goog-Credential={SECRET}",
    "a fragment": f"https://host/data.jsonl#access_token={SECRET}",
    "within a sentence": f"see https://user:{SECRET}@host/x, or not",
}
HONEST = (
    *(
        "hf://datasets/user/name@main/data.jsonl",
        "https://host/data.jsonl?download=true&monkey=1",
        "git@github.com:a/b",
    ),
    *("ssh://git@github.com/a/b", "abfs://container@account.dfs.core.windows.net/x", "sqlite:////tmp/study.db"),
    *("Anthropic/hh-rlhf", "/data/pairs.jsonl", "https://host:8080/v1", "0123456789abcdef" * 2 + "01234567"),
    "a user@host and a key: value",
)


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_found_and_hidden_in_every_form(form):
    text = FORMS[form]
    assert find_secrets(text)
    assert SECRET not in hide_secrets(text)
    assert not find_secrets(hide_secrets(text).replace("***", ""))


@pytest.mark.parametrize("text", HONEST)
def test_a_text_without_a_secret_is_left_as_it_is(text):
    assert not find_secrets(text)
    assert hide_secrets(text) == text


def test_the_value_of_a_secret_variable_is_a_secret(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    assert find_secrets(f"run {SECRET}") == ["the value of JUDGE_API_KEY"]
    assert hide_secrets(f"run {SECRET}") == "run ***"


@pytest.mark.parametrize("form", FORMS)
def test_an_error_shows_no_secret(form):
    error = DataError(f"{FORMS[form]} cannot be read", expected="a file", do=f"download {FORMS[form]}")
    assert SECRET not in str(error) + error.seen + error.do


@pytest.mark.parametrize(
    ("name", "form"),
    [("dataset_name", form) for form in FORMS]
    + [(name, "user and password") for name in ("model_name_or_path", "run_name", "hub_model_id", "run_tags")],
)
def test_a_setting_with_a_secret_is_refused_in_every_layer(name, form, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({name: FORMS[form]}))
    for defaults, argv in (({name: FORMS[form]}, []), ({}, [f"--{name}={FORMS[form]}"]), ({}, ["--config", str(file)])):
        with pytest.raises(SettingsError, match=f"sets {name}, whose value holds a") as refusal:
            load_settings("test", {"output_dir": str(tmp_path), "use_cpu": True, **defaults}, argv)
        assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    ("place", "form"),
    [("more", form) for form in FORMS]
    + [(place, "user and password") for place in ("settings: {{run_name: {}}}", "settings: {{run_tags: [{}]}}")],
)
def test_a_space_with_a_secret_is_refused(place, form, tmp_path):
    pytest.importorskip("optuna")
    from dpokit.sweep.space import load_space

    secret = yaml.safe_dump(FORMS[form], width=1000).splitlines()[0].replace("'", '"')
    secret = secret if secret.startswith('"') else f'"{secret}"'
    space = f"recipe: {ROOT / 'recipes' / 'dpo_gpt2.py'}\n"
    if place == "more":
        space += f"parameters: {{dataset_name: [a, {secret}]}}\n"
    else:
        space += f"parameters: {{beta: [0.1, 0.2]}}\n{place.format(secret)}\n"
    path = tmp_path / "space.yaml"
    path.write_text(space)
    with pytest.raises(SettingsError, match="it holds a secret") as refusal:
        load_space(path)
    assert SECRET not in str(refusal.value)
    assert "HF_TOKEN" in refusal.value.do


@pytest.mark.parametrize("place", ["settings", "a parameter", "a configuration", "a preset"])
def test_a_space_that_sets_a_token_is_refused(place, tmp_path):
    pytest.importorskip("optuna")
    from dpokit.sweep.space import load_space

    preset = tmp_path / "preset.yaml"
    preset.write_text("hub_token: short\n")
    text = {
        "settings": "settings: {hub_token: short}\nparameters: {beta: [0.1]}\n",
        "a parameter": "parameters: {beta: [0.1], hub_token: [short]}\n",
        "a configuration": "configurations: [{hub_token: short}]\n",
        "a preset": f"settings: {{config: {preset}}}\nparameters: {{beta: [0.1]}}\n",
    }[place]
    path = tmp_path / "space.yaml"
    path.write_text(f"recipe: {ROOT / 'recipes' / 'dpo_gpt2.py'}\n{text}")
    with pytest.raises(SettingsError, match=r"it holds a secret \(hub_token\)"):
        load_space(path)


JOBS = {
    "a flag": {"flags": ("--hub_token", "short")},
    "a flag with dashes": {"flags": ("--hub-token=short",)},
    "an exported variable": {"sbatch": ("--export=ALL,HF_TOKEN=short",)},
    **{f"a flag: {form}": {"flags": ("--dataset_name", text)} for form, text in FORMS.items()},
    **{f"an option: {form}": {"sbatch": (f"--comment={text}",)} for form, text in FORMS.items()},
}


@pytest.mark.parametrize("case", JOBS)
def test_a_job_whose_text_would_hold_a_secret_is_refused(case):
    job = SlurmJob(ROOT / "recipes" / "dpo_gpt2.py", ROOT / "accelerate_configs" / "ddp.yaml", **JOBS[case])
    with pytest.raises(SettingsError, match="the job script would hold a secret") as refusal:
        render_job(job)
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize("option", ["contact", "license_link"])
@pytest.mark.parametrize("form", FORMS)
def test_a_card_shows_no_secret(form, option, tmp_path):
    run = RunDir(make_run(tmp_path / "run", make_steps(3, every=1)))
    more = {option: FORMS[form]} | ({"license_name": "mine"} if option == "license_link" else {})
    with pytest.raises(SettingsError, match=f"--{option.replace('_', '-')} holds"):
        write_card(run, license="other" if option == "license_link" else "mit", **more)
    assert not run.card.exists()


@pytest.mark.slow
@pytest.mark.long
def test_no_output_of_a_run_or_its_verbs_shows_a_secret(tiny_gpt2, tmp_path):
    """A run with a token as a flag and keys in its environment, then every verb and failing starts."""
    planted = {
        "HF_TOKEN": f"hf_env{SECRET}",
        "WANDB_API_KEY": "f" * 30 + "0123456789",
        "OPENAI_API_KEY": f"sk-1{SECRET}",
    }
    flag, out = f"hf_flag{SECRET}", tmp_path / "out"
    out.mkdir()
    environment = (
        os.environ | planted | {"DPOKIT_CACHE": str(out / "cache"), "TMPDIR": str(out), "WANDB_MODE": "offline"}
    )
    data = write_pairs(tmp_path / "pairs.jsonl", 20)
    recipe, run = str(ROOT / "recipes" / "dpo_gpt2.py"), str(out / "run")
    common = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(data), "--use_cpu"]
    training = [*common, "--hub_token", flag, "--output_dir", run, "--eval_fraction", "0.2", "--max_steps", "2"]
    training += ["--save_steps", "1", "--eval_steps", "1", "--max_length", "64", "--report_to", "wandb", "tensorboard"]
    train, dpokit = [sys.executable, recipe], [sys.executable, "-m", "dpokit.cli"]
    commands = {
        "train": [*train, *training],
        "train again": [*train, *training],
        "a wrong value": [*train, *training, "--beta", "x"],
        "a wrong name": [*train, *training, "--hub_tokn", flag],
        "a model that is not there": [
            *train,
            *training,
            "--model_name_or_path",
            "/nowhere",
            "--output_dir",
            f"{run}-2",
        ],
        **{verb: [*dpokit, verb, run] for verb in ("status", "verify", "report", "merge", "evaluate")},
        "card": [*dpokit, "card", run, "--license", "mit"],
        "push": [*dpokit, "push", run, "--repo-id", "tester/tiny", "--dry-run"],
        "chat": [*dpokit, "chat", run, "--prompt", "Hello", "--max-new-tokens", "2"],
        "plan": [*dpokit, "plan", recipe, *common, "--hub_token", flag],
        "prepare": [*dpokit, "prepare", recipe, *common, "--hub_token", flag, "--max_length", "64"],
        "submit": [*dpokit, "submit", recipe, *common, "--hub_token", flag, "--output_dir", run, "--dry-run"],
    }
    secrets = [secret.encode() for secret in (flag, *planted.values())]
    for name, command in commands.items():
        done = subprocess.run(
            command, env=environment, capture_output=True, cwd=out, stdin=subprocess.DEVNULL, timeout=300
        )
        assert b"Traceback" not in done.stderr, (name, done.stderr[-2000:])
        assert not [secret for secret in secrets if secret in done.stdout + done.stderr], name
        if name == "train":
            assert done.returncode == 0, done.stderr[-2000:]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    assert any("checkpoint-2" in path.parts for path in files)
    assert not [path for path in files if any(secret in path.read_bytes() for secret in secrets)]
