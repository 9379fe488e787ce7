"""`dpokit push` with the real client against a Hub on this machine: transfers, retries and refusals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from local_hub import FINE, READ, Fault, serve
from pushing import (
    BASE,
    CARD,
    QUICK,
    REPO,
    client_environment,
    connect,
    hash_tree,
    make_run,
    start_push,
)
from transformers import AutoModelForCausalLM

from dpokit.errors import HubError, SettingsError
from dpokit.push.hub import PushTarget
from dpokit.push.permissions import check_push
from dpokit.push.push import push_run
from dpokit.push.retry import RetryPolicy

PRIVATE = PushTarget(REPO)
SENT_BY_A_MODEL = {"README.md", "figures/loss.png", "config.json", "generation_config.json", "model.safetensors"}
SENT_BY_A_MODEL |= {"tokenizer.json", "tokenizer_config.json"}
PULL = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, local, adapter = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(local)
tokenizer = AutoTokenizer.from_pretrained(repo)
ids = tokenizer("The sky is blue.", return_tensors="pt").input_ids
with torch.no_grad():
    if adapter:
        far = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(local), repo, subfolder="adapter")
        near = PeftModel.from_pretrained(base, adapter)
        print(float((far(ids).logits - near(ids).logits).abs().max()))
    print(float((AutoModelForCausalLM.from_pretrained(repo)(ids).logits
                 - AutoModelForCausalLM.from_pretrained(local)(ids).logits).abs().max()))
"""


@pytest.fixture
def hub(tmp_path):
    with serve(tmp_path / "hub") as server:
        yield server


@pytest.fixture(params=["lfs", "xet"])
def xet(request):
    """The client's two ways of sending weights."""
    return request.param == "xet"


@pytest.fixture
def run(tmp_path, tiny_gpt2):
    return make_run(tmp_path / "run", tiny_gpt2)


def shard(model):
    """Saves the weights again in several files; returns their number."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="60KB")
    return len(list(model.glob("*.safetensors")))


def wait_until(is_so, *, seconds=30):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def push(run, target=PRIVATE, **options):
    return push_run(run.path, target, yes=True, **{"retry": QUICK} | options)


def test_a_run_arrives_private_and_the_local_folder_is_unchanged(hub, run, xet, monkeypatch):
    connect(monkeypatch, hub, xet=xet)
    before = hash_tree(run.path)
    outcome = push(run)
    assert set(outcome.pushed.sent) == SENT_BY_A_MODEL
    assert set(hub.files(REPO)) == SENT_BY_A_MODEL | {".gitattributes"}
    assert hub.repos[REPO]["private"]
    assert outcome.pushed.url == f"{hub.url}/{REPO}"
    assert outcome.pushed.commit == hub.repos[REPO]["refs"]["main"]
    assert bool(hub.asked("PUT /_lfs")) is not xet
    for path, file in hub.files(REPO).items():
        local = run.path / path if path.startswith(("README", "figures")) else run.model / path
        assert path == ".gitattributes" or file["size"] == local.stat().st_size
    assert hash_tree(run.path) == before


@pytest.mark.parametrize(("xet", "merged"), [(False, True), (True, False)])
def test_a_pulled_model_computes_the_same_logits(hub, tmp_path, tiny_gpt2, xet, merged, monkeypatch):
    connect(monkeypatch, hub, xet=xet)
    run = make_run(tmp_path / "run", tiny_gpt2, adapter=merged, merged=merged)
    push(run, weights="both" if merged else None)
    command = [sys.executable, "-c", PULL, REPO, str(tiny_gpt2), str(run.adapter) if merged else ""]
    environment = client_environment(hub, xet=xet)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == [0.0] * (2 if merged else 1)


def test_an_unchanged_folder_sends_nothing_again(hub, run, xet, monkeypatch):
    connect(monkeypatch, hub, xet=xet)
    first = push(run)
    hub.requests.clear()
    second = push(run)
    assert not hub.asked("PUT|/commit/|preupload|objects/batch|xet-write-token")
    assert second.pushed.sent == second.pushed.removed == ()
    assert second.pushed.commit == first.pushed.commit
    assert "nothing to send" in second.describe()


def test_weights_sent_in_parts_arrive_complete(tmp_path, run, monkeypatch):
    with serve(tmp_path / "parts", part_bytes=50_000) as hub:
        connect(monkeypatch, hub)
        hub.faults += [Fault("PUT /_lfs/part/.*/2$", status=503), Fault("POST /_lfs/complete", cut_bytes=1)]
        push(run)
        assert len(hub.asked("PUT /_lfs/part/.*/")) >= 5
        assert hub.read(REPO, "model.safetensors") == (run.model / "model.safetensors").read_bytes()


def test_only_changed_files_are_sent_again(hub, run, monkeypatch):
    connect(monkeypatch, hub)
    push(run)
    (run.path / "README.md").write_text(f"{CARD}\nmore\n")
    hub.requests.clear()
    assert push(run).pushed.sent == ("README.md",)
    assert not hub.asked("PUT|objects/batch")
    assert hub.read(REPO, "README.md").endswith(b"\nmore\n")


def test_stale_weights_of_an_earlier_push_are_removed(hub, tmp_path, tiny_gpt2, monkeypatch):
    connect(monkeypatch, hub)
    run = make_run(tmp_path / "run", tiny_gpt2, adapter=True, merged=True)
    push(run, weights="adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files(REPO))
    outcome = push(run, weights="model")
    assert outcome.pushed.removed == ("adapter_config.json", "adapter_model.safetensors")
    assert set(hub.files(REPO)) == SENT_BY_A_MODEL | {".gitattributes", "merge.json"}


def test_a_branch_is_made_and_the_main_one_left_alone(hub, run, monkeypatch):
    connect(monkeypatch, hub)
    target = PushTarget(REPO, revision="beta-0.3", message="with beta 0.3")
    outcome = push(run, target)
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert set(hub.files(REPO, "beta-0.3")) >= SENT_BY_A_MODEL
    assert outcome.pushed.url.endswith("/tree/beta-0.3")
    assert push(run, target).pushed.sent == ()


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_of_the_other_visibility_is_refused(hub, run, public, monkeypatch):
    connect(monkeypatch, hub)
    push(run, PushTarget(REPO, public=not public))
    assert hub.repos[REPO]["private"] is public
    (run.path / "README.md").write_text(f"{CARD}\nmore\n")
    with pytest.raises(HubError, match="is private" if public else "is public: everybody would see"):
        push(run, PushTarget(REPO, public=public))
    assert not hub.read(REPO, "README.md").endswith(b"\nmore\n")


@pytest.mark.parametrize("status", [500, 503, 429])
@pytest.mark.parametrize(
    "call",
    [
        "GET /api/whoami-v2",
        "POST /api/repos/create",
        "GET /api/models/tester/tiny$",
        "GET /api/models/tester/tiny/tree/main",
        "POST /api/validate-yaml",
        "POST .*/preupload/",
        "POST .*/objects/batch",
        "PUT /_lfs",
        "GET .*/xet-write-token/",
        "POST .*/commit/",
    ],
)
def test_a_temporary_failure_of_any_call_is_retried(hub, run, call, status, monkeypatch, capsys, caplog):
    connect(monkeypatch, hub, xet="xet" in call)
    hub.faults.append(Fault(call, status=status, headers={"Retry-After": "0"}))
    push(run)
    assert hub.faults[0].times == 0
    assert set(hub.files(REPO)) >= SENT_BY_A_MODEL
    output = capsys.readouterr().err + caplog.text
    assert "Signature" not in output
    if any(word in call for word in ("tree", "preupload", "batch", "PUT")):
        assert f"HTTP Error {status} thrown while requesting" in output  # huggingface_hub itself retries
    elif "validate" in call:  # huggingface_hub parses this answer before it checks the status
        assert "the Hub gave an answer that is not its own; trying again in 0.01 s (2 of 3)" in output
    elif "xet" not in call:
        where = call.rstrip("/$").replace(".*", "/api/models/tester/tiny")
        assert f"the Hub answered {status} to {where}" in output
        assert "trying again in 0.01 s (2 of 3)" in output


@pytest.mark.parametrize("call", ["create", "PUT", "xet-write-token", "/commit/"])
def test_a_cut_connection_is_retried(hub, run, call, monkeypatch):
    connect(monkeypatch, hub, xet="xet" in call)
    hub.faults.append(Fault(call, cut_bytes=10_000))
    push(run)
    assert hub.faults[0].times == 0
    assert set(hub.files(REPO)) >= SENT_BY_A_MODEL


def test_a_silent_connection_is_closed_and_retried(hub, run, monkeypatch, capsys):
    connect(monkeypatch, hub)
    hub.faults.append(Fault("POST /api/repos/create", hold=threading.Event()))
    push(run, retry=RetryPolicy(tries=3, first_wait_seconds=0.01, silence_seconds=2.0))
    hub.faults[0].hold.set()
    assert "create_repo: the Hub gave no answer in time; trying again" in capsys.readouterr().err


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, run, xet, monkeypatch):
    connect(monkeypatch, hub, xet=xet)
    hub.faults.append(Fault("/commit/", lost=True))
    assert set(push(run).pushed.sent) == SENT_BY_A_MODEL
    assert len(hub.asked("/commit/")) == 1
    assert len(hub.repos[REPO]["commits"]) == 2
    assert set(hub.files(REPO)) >= SENT_BY_A_MODEL


@pytest.mark.parametrize("call", ["create", "xet-write-token", "/commit/"])
def test_a_hub_that_keeps_failing_names_the_command_to_repeat(hub, run, call, monkeypatch, capsys):
    connect(monkeypatch, hub, xet=True)
    hub.faults.append(Fault(call, times=100, status=503))
    before = hash_tree(run.path)
    with pytest.raises(HubError, match=r"answered 503 to .*, 3 times in a row") as error:
        push(run, PushTarget(REPO, message="it's mine"))
    command = f"dpokit push {run.path} --repo-id {REPO} --weights model --commit-message 'it'\"'\"'s mine'"
    assert str(error.value).endswith(command)
    assert "trying again in 0.02 s (3 of 3)" in capsys.readouterr().err
    assert hash_tree(run.path) == before
    hub.faults.clear()
    push(run)
    assert set(hub.files(REPO)) >= SENT_BY_A_MODEL


@pytest.mark.slow
@pytest.mark.parametrize("call", ["preupload", "objects/batch", "PUT /_lfs"])
def test_a_call_that_huggingface_hub_gives_up_names_the_command(hub, run, call, monkeypatch):
    connect(monkeypatch, hub)
    hub.faults.append(Fault(call, times=100, status=503))
    with pytest.raises(HubError, match=r"sending: the Hub answered 503 to P[A-Z]+ /") as error:
        push(run, retry=RetryPolicy(tries=1))
    assert "Signature" not in str(error.value)
    assert str(error.value).endswith(f"dpokit push {run.path} --repo-id {REPO} --weights model")


def test_a_push_waits_as_long_as_the_hub_asks(hub, run, monkeypatch, capsys):
    connect(monkeypatch, hub)
    hub.faults.append(Fault("create", status=429, headers={"Retry-After": "1"}))
    push(run)
    assert "answered 429 to POST /api/repos/create; trying again in 1 s (2 of 3)" in capsys.readouterr().err


def test_a_wrong_token_is_refused_at_once(hub, run, monkeypatch):
    connect(monkeypatch, hub, token="hf_nobodysToken123456789")
    with pytest.raises(HubError, match="Invalid user token") as error:
        push(run)
    assert len(hub.requests) == 1
    assert "hf_nobodys" not in str(error.value)


def test_a_read_only_token_is_refused_before_anything_is_sent(hub, run, monkeypatch):
    connect(monkeypatch, hub, token=READ)
    with pytest.raises(HubError, match="may read, and not write"):
        push(run)
    assert hub.requests == ["GET /api/whoami-v2"]


@pytest.mark.parametrize("call", ["create", "preupload", "xet-write-token", "/commit/"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_right_lost_during_a_push_is_not_tried_again(hub, run, call, status, monkeypatch):
    connect(monkeypatch, hub, xet=True)
    hub.faults.append(Fault(call, times=9, status=status))
    with pytest.raises(HubError, match=rf"the Hub refuses: .*{status}"):
        push(run)
    assert hub.faults[0].times == 8


def test_a_card_that_the_hub_refuses_stops_before_the_weights(hub, run, monkeypatch):
    connect(monkeypatch, hub)
    (run.path / "README.md").write_text("---\nlicense: placeholder\n---\n")
    with pytest.raises(HubError, match='"license" must be one of the known'):
        push(run)
    assert not hub.asked("PUT|objects/batch|/commit/")


@pytest.mark.parametrize(
    ("point", "xet", "end"),
    [
        ("PUT /_lfs", False, "SIGKILL"),
        ("PUT /_lfs", False, "SIGTERM"),
        ("/commit/", True, "SIGKILL"),
        ("/commit/", True, "SIGINT"),
        pytest.param("/commit/", False, "SIGKILL", marks=pytest.mark.slow),
        pytest.param("xet-write-token", True, "SIGKILL", marks=pytest.mark.slow),
        pytest.param("xet-write-token", True, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_push_continues_with_the_missing_files(hub, tmp_path, tiny_gpt2, point, xet, end):
    run = make_run(tmp_path / "run", tiny_gpt2)
    shards = shard(run.model)
    hub.faults.append(Fault(point, hold=threading.Event()))
    before = hash_tree(run.path)
    client = start_push(run, hub, "--yes", xet=xet)
    assert hub.faults[0].seen.wait(60)
    large = 0 if xet else shards + 1  # the picture is one, too
    arrived = large - 1 if point.startswith("PUT") else large
    wait_until(lambda: hub.count_blobs() == arrived + 1)  # beside .gitattributes
    client.send_signal(signal.Signals[end])
    _, err = client.communicate(timeout=60)
    if end != "SIGKILL":
        assert client.returncode == 75
        assert [line for line in err.splitlines() if "interrupted by" in line] == err.splitlines()[-1:], err
    hub.faults[0].hold.set()
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert hash_tree(run.path) == before
    hub.requests.clear()
    again = start_push(run, hub, "--yes", "--json", xet=xet)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert json.loads(out)["commit"] == hub.repos[REPO]["refs"]["main"]
    assert len(hub.asked("PUT /_lfs")) == large - arrived
    assert sum(path.endswith(".safetensors") for path in hub.files(REPO)) == shards


def test_without_consent_and_terminal_nothing_is_sent(hub, run):
    client = start_push(run, hub)
    out, err = client.communicate(timeout=60)
    assert (client.returncode, out) == (2, "")
    assert "there is no terminal to ask on" in err
    assert "--yes" in err
    assert hub.requests == []


@pytest.mark.parametrize(("answer", "sent"), [("y", True), ("", False), ("no", False)])
def test_a_terminal_shows_the_files_and_asks_for_consent(hub, run, answer, sent, monkeypatch, capsys):
    connect(monkeypatch, hub)
    keyboard, terminal = os.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        if sent:
            assert push_run(run.path, PRIVATE, retry=QUICK).pushed.sent
        else:
            with pytest.raises(SettingsError, match="nothing was sent"):
                push_run(run.path, PRIVATE, retry=QUICK)
    os.close(keyboard)
    output = capsys.readouterr().err
    assert output.index("model.safetensors") < output.index(f"send 7 files to {REPO}? [y/N]")
    assert bool(hub.requests) is sent


def test_a_dry_run_sends_no_request_and_lists_all_files(hub, run):
    client = start_push(run, hub, "--dry-run", "--json")
    record = json.loads(client.communicate(timeout=60)[0])
    assert hub.requests == []
    assert (record["repo_id"], record["private"], record["weights"]) == (REPO, True, "model")
    named = {file["path"]: file for file in record["files"]}
    assert set(named) == SENT_BY_A_MODEL
    assert named["config.json"]["from"] == str(run.model / "config.json")
    assert record["total_bytes"] == sum(file["bytes"] for file in record["files"])
    assert "commit" not in record


def test_a_push_without_a_token_or_a_network_is_refused(hub, run, monkeypatch):
    connect(monkeypatch, hub, token=None)
    with pytest.raises(SettingsError, match="there is no token"):
        push(run)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match="HF_HUB_OFFLINE"):
        push(run)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "says"),
    [
        ("tiny", "names no user"),
        ("a/b/c", "Repo id must be"),
        ("tester/no spaces", "alphanumeric"),
        ("somebody/tiny", "somebody is neither tester nor one of their organisations"),
        ("guests/tiny", "may read, and not write, in guests"),
    ],
)
def test_a_repository_without_write_access_is_refused(hub, repo_id, says, monkeypatch):
    connect(monkeypatch, hub)
    with pytest.raises((HubError, SettingsError), match=says):
        check_push(repo_id, retry=QUICK)
    check_push("crew/tiny", retry=QUICK)


@pytest.mark.parametrize(
    ("entity", "permissions", "may"),
    [
        ("tester", ["repo.content.read", "repo.write"], True),
        (REPO, ["repo.write"], True),
        ("tester", ["repo.content.read"], False),
        ("crew", ["repo.write"], False),
    ],
)
def test_a_fine_grained_token_needs_write_permission(hub, entity, permissions, may, monkeypatch):
    connect(monkeypatch, hub, token=FINE)
    grants = {"global": [], "scoped": [{"entity": {"type": "user", "name": entity}, "permissions": permissions}]}
    hub.whoami[FINE]["auth"]["accessToken"]["fineGrained"] = grants
    if may:
        return check_push(REPO, retry=QUICK)
    with pytest.raises(HubError, match=f"may not write to {REPO}"):
        check_push(REPO, retry=QUICK)
    return None


def test_a_lone_adapter_is_at_the_root_and_names_its_base(hub, tmp_path, tiny_gpt2, monkeypatch):
    connect(monkeypatch, hub)
    run = make_run(tmp_path / "run", tiny_gpt2, adapter=True)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    (run.adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tiny_gpt2)}))
    push(run, base_model=BASE)
    sent = json.loads(hub.read(REPO, "adapter_config.json"))
    assert sent == config | {"base_model_name_or_path": BASE}
    assert "adapter_model.safetensors" in hub.files(REPO)
