"""Names that do not exist: one message that names those that do, before torch is imported; and a Hub out of reach."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, find_free_port
from huggingface_hub import constants

from dpokit import reachable_hub
from dpokit.errors import RunFolderError, SettingsError
from dpokit.reachable_hub import use_cache_without_hub
from dpokit.run_names import check_file_name, check_run_name, check_run_or_model


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, file in (("runs/smol", "run.json"), ("runs/dpo", "run.json"), ("models/m", "config.json")):
        Path(name).mkdir(parents=True)
        Path(name, file).write_text("{}")
    Path("runs/notes").mkdir()
    Path("spaces").mkdir()
    Path("spaces/lr.yaml").write_text("")
    return tmp_path


# the check, a name that does not exist, and what the message says
RUN, MODEL = check_run_name, check_run_or_model
MISSING = [
    (RUN, "runs/smoll", "runs/ holds dpo, smol", "did you mean runs/smol?"),
    (RUN, "smol", "runs/ holds dpo, smol", "did you mean runs/smol?"),
    (RUN, "run/smol", "runs/ holds dpo, smol", "did you mean runs/smol?"),
    (RUN, "runs/entirely-else", "runs/ holds dpo, smol", "name one that exists"),
    (RUN, "models/m2", "runs/ holds dpo, smol", "name one that exists"),
    (RUN, "runs/" + "x" * 300, "runs/ holds dpo, smol", "name one that exists"),
    (MODEL, "models/mm", "models/ holds m", "did you mean models/m?"),
    (MODEL, "runs/smoll", "runs/ holds dpo, smol", "did you mean runs/smol?"),
    (MODEL, "./smol", "runs/ holds dpo, smol", "did you mean runs/smol?"),
    (MODEL, "/nowhere/at/all", "runs/ holds dpo, smol", "name one that exists"),
    (MODEL, "~/no such folder", "runs/ holds dpo, smol", "name one that exists"),
]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("check", "name", "expected", "do"), MISSING)
def test_a_name_that_does_not_exist_names_those_that_do(check, name, expected, do):
    with pytest.raises(RunFolderError, match="there is no such run") as error:
        check(name)
    assert expected in error.value.expected
    assert do in error.value.do


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", ["runs/smol", "models/m", "gpt2", "Qwen/Qwen2.5-0.5B", "smol", "org/smol", None])
def test_a_folder_or_a_name_on_the_hub_passes(name):
    check_run_or_model(name)


def test_without_any_run_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match="there is no such run: runs/smol") as error:
        check_run_name("runs/smol")
    assert "there is no folder runs" in error.value.expected


@pytest.mark.usefixtures("runs")
def test_a_file_that_does_not_exist_names_those_beside_it():
    with pytest.raises(SettingsError, match=r"SPACE.yaml: there is no such file: spaces/rl.yaml") as error:
        check_file_name("spaces/rl.yaml", "SPACE.yaml")
    assert error.value.do == "did you mean spaces/lr.yaml?"


VERBS = {
    **{verb: [verb, "runs/smoll"] for verb in ("evaluate", "merge", "verify", "chat", "serve", "status", "card")},
    "report": ["report", "runs/smol", "runs/smoll"],
    "push": ["push", "runs/smoll", "--repo-id", "me/model"],
    "chat --base": ["chat", "runs/smol", "--base", "runs/smoll"],
    **{verb: [verb, "recipes/smoll"] for verb in ("plan", "prepare", "submit")},
    "sweep": ["sweep", "smoll.yaml"],
}
# `dpokit` in this process and without the modules that take seconds to import
PROGRAM = """
import sys
for name in ("torch", "transformers", "datasets", "gradio", "optuna"):
    sys.modules[name] = None
from dpokit.cli import main
main()
"""


@pytest.mark.cold
@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_checks_names_before_heavy_imports(verb):
    command = [sys.executable, "-c", PROGRAM, *VERBS[verb]]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 2, done.stderr
    assert "smoll" in done.stderr
    assert done.stderr.count("\n  do this: ") == 1
    assert "Traceback" not in done.stderr


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_at(monkeypatch):
    """Sets the Hub's address; the client is online until a test's own call decides otherwise."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reachable_hub, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(reachable_hub, "CONNECT_SECONDS", 0.5)
    reachable_hub._use_cache_without_hub.cache_clear()
    yield lambda port: monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    reachable_hub._use_cache_without_hub.cache_clear()


def test_a_hub_out_of_reach_is_asked_once(hub_at, capfd):
    hub_at(find_free_port())
    for _ in range(2):
        use_cache_without_hub("me/model")
        assert constants.HF_HUB_OFFLINE
    assert capfd.readouterr().err.count("cannot be reached") == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", b"no HTTP at all\r\n\r\n", b""])
def test_a_hub_that_answers_slowly_or_badly_is_reachable(answer, hub_at):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection = server.accept()[0]
            connection.sendall(answer)
            connections.append(connection)  # stays open: without an answer the client waits

        connections: list[socket.socket] = []
        thread = threading.Thread(target=serve)
        thread.start()
        hub_at(server.getsockname()[1])
        use_cache_without_hub("me/model")
        thread.join()
        connections[0].close()
    assert not constants.HF_HUB_OFFLINE


def test_a_local_model_asks_no_hub(hub_at, tmp_path):
    hub_at(find_free_port())
    use_cache_without_hub(str(tmp_path))
    use_cache_without_hub(None)
    assert not constants.HF_HUB_OFFLINE
