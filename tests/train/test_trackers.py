"""Trackers: the tests read real files of wandb, trackio and TensorBoard; no tracker ends a run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from dpokit.errors import DataError, SettingsError
from dpokit.run import train
from dpokit.rundir import RunDir, read_metrics
from dpokit.settings.load import load_settings
from dpokit.train.trackers import REPLACED, TRACKERS, decide_trackers, track_run

_TRACKIO = tempfile.TemporaryDirectory(prefix="dpokit-test-trackio-")  # trackio reads the variable at import
KEY = "0123456789" * 4
NAMED = ["--run_name", "first try", "--run_group", "sweep 7", "--run_tags", "gpt2", "hh"]


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path) -> Iterator[None]:
    """Removes keys, variables and wandb processes of this machine and of other tests."""
    import wandb

    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_", "TENSORBOARD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("TRACKIO_DIR", _TRACKIO.name)
    yield
    with suppress(ConnectionError):  # one test kills wandb's process
        wandb.teardown()


@pytest.fixture
def defaults(tiny_gpt2, pairs_file, tmp_path) -> dict:
    places = {"model_name_or_path": tiny_gpt2, "dataset_name": pairs_file, "output_dir": tmp_path / "run"}
    return {
        "gradient_checkpointing": False,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_fraction": 0.2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "accept_changes": ["max_steps"],
        "load_best_model_at_end": True,
        "per_device_train_batch_size": 4,
        "beta": 0.25,
        **{name: str(path) for name, path in places.items()},
    }


@pytest.fixture
def read_settings(defaults) -> Callable:
    return lambda *argv: load_settings("dpo_test", defaults, argv)


def read_wandb(run: RunDir) -> dict:
    """The records of the newest .wandb file of a run folder, as wandb prints them."""
    file = max(run.path.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records: dict = {"config": {}, "summary": {}, "history": [], "exit": None}
    for kind, record in ((line["type"], line[line["type"]]) for line in map(json.loads, lines)):
        if kind == "run":
            records["run"] = record
            records["config"] |= record["config"]["update"]
        elif kind in ("config", "summary"):
            records[kind] |= record["update"]
        elif kind == "history":
            records["history"].append(record["item"])
        elif kind == "exit":
            records["exit"] = record.get("exit_code", 0)
    return records


def check_final_numbers(run: RunDir, final: dict) -> None:
    """Asserts that the final numbers of a tracker are those of the run folder."""
    last = read_metrics(run.metrics_jsonl)[-1]
    best = run.read_run()["best"]
    assert final["final/state"] == "finished"
    assert final["final/step"] == 3
    assert final["final/num_tokens"] == last["num_tokens"] > 0
    assert final["final/seconds"] == pytest.approx(last["seconds"])
    assert final["final/eval_rewards/margins"] == pytest.approx(last["eval_rewards/margins"])
    assert final["final/best_eval_loss"] == pytest.approx(best["value"])
    assert final["final/best_step"] == best["step"]


def lines_of(screen: str, name: str) -> list[str]:
    return [line for line in screen.splitlines() if line.startswith(f"{name}:")]


def test_wandb_gets_settings_metrics_and_final_numbers(defaults, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train("dpo_test", defaults, ["--report_to", "wandb", *NAMED])
    tracked = read_wandb(run)
    assert tracked["run"]["display_name"] == "first try"
    assert tracked["run"]["run_group"] == "sweep 7"
    assert tracked["run"]["tags"] == ["gpt2", "hh"]
    assert tracked["run"]["project"] == "dpokit"
    for name in ("beta", "dataset_name", "eval_fraction", "max_steps"):
        assert tracked["config"][name] == defaults[name]
    assert tracked["run"]["config"]["update"].keys() >= run.read_run()["settings"].keys()
    for name, logged in (("loss", "train/loss"), ("eval_rewards/accuracies", "eval/rewards/accuracies")):
        assert [record[logged] for record in tracked["history"] if logged in record] == pytest.approx(
            [record[name] for record in read_metrics(run.metrics_jsonl)]
        )
    check_final_numbers(run, tracked["summary"])
    assert tracked["exit"] == 0


def test_a_failed_run_has_failed_in_wandb_too_and_has_a_reason(defaults, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        train("dpo_test", defaults, ["--report_to", "wandb", "--dataset_name", str(tmp_path / "empty.jsonl")])
    tracked = read_wandb(RunDir(defaults["output_dir"]))
    assert tracked["exit"] == 1
    assert tracked["summary"]["final/state"] == "failed"
    assert "empty.jsonl" in tracked["summary"]["final/why"]


def test_wandb_without_a_key_writes_files_and_one_line(defaults, capfd):
    run = train("dpo_test", defaults, ["--report_to", "wandb"])
    (line,) = lines_of(capfd.readouterr().err, "wandb")
    assert "no API key" in line
    folder = re.search("`wandb sync (.+)`", line)[1]
    assert list(Path(folder).glob("*.wandb"))
    assert read_wandb(run)["run"]["display_name"] == "run"  # the folder's name


@pytest.mark.parametrize("where", ["WANDB_API_KEY", "netrc", "netrc of WANDB_BASE_URL"])
def test_wandb_is_on_by_default_with_a_key(where, read_settings, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    host = "my.server:8080" if "BASE_URL" in where else "api.wandb.ai"
    if "BASE_URL" in where:
        monkeypatch.setenv("WANDB_BASE_URL", f"https://{host}")
    if where == "WANDB_API_KEY":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    settings = decide_trackers(read_settings())
    assert settings.training.report_to == ["wandb"]
    assert settings.record()["report_to"] == {"value": ["wandb"], "origin": "this machine"}
    (line,) = lines_of(capfd.readouterr().err, "wandb")
    assert "--report_to none" in line
    switched_off = decide_trackers(read_settings("--report_to", "none"))
    assert switched_off.training.report_to == []


@pytest.mark.parametrize("name, value", [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true"), ("RANK", "1")])
def test_a_key_is_ignored_if_wandb_is_off_and_on_other_ranks(name, value, read_settings, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    settings = read_settings()
    monkeypatch.setenv(name, value)
    settings = decide_trackers(settings)
    assert settings.training.report_to == []


def test_a_key_of_another_server_is_ignored(read_settings, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://my.server")
    settings = decide_trackers(read_settings())
    assert settings.training.report_to == []


def test_wandb_switched_off_leaves_no_file_and_one_line(defaults, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = train("dpo_test", defaults, ["--report_to", "wandb"])
    assert len(lines_of(capfd.readouterr().err, "wandb")) == 1
    assert not (run.path / "wandb").exists()


class WandbServer(ThreadingHTTPServer):
    """The parts of W&B's server that its client needs to start and end a run; records the requests."""

    refuses = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: list[dict] = []  # the variables of each UpsertBucket

    def answer(self, query: str, variables: dict) -> dict:
        name = variables.get("name")
        bucket = {"id": f"id-{name}", "name": name, "displayName": "", "historyLineCount": 0, "config": "{}"}
        project = {"id": "p", "name": "dpokit", "entity": {"id": "e", "name": "me"}}
        if "mutation UpsertBucket" in query:
            self.runs.append(variables)
            return {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": True}}
        if "query RunResumeStatus" in query:
            tail = {"historyTail": "[]", "eventsTail": "[]", "summaryMetrics": "{}", "wandbConfig": '{"t": 1}'}
            return {"model": project | {"bucket": bucket | tail | {"logLineCount": 0, "eventsLineCount": 0}}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": file, "uploadUrl": self.url} for file in variables["files"]]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        return {}


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        request = json.loads(body) if self.path == "/graphql" else {"query": ""}
        answer = {"data": self.server.answer(request["query"], request.get("variables") or {})}
        self.send_response(401 if self.server.refuses else 200)
        self.end_headers()
        self.wfile.write(
            json.dumps({"errors": [{"message": "who are you"}]} if self.server.refuses else answer).encode()
        )

    do_PUT = do_POST  # noqa: N815, the library's name

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        server.shutdown()


def test_a_resumed_run_continues_its_run_on_the_server(defaults, server, capfd):
    run = train("dpo_test", defaults, NAMED)
    first = server.runs[0]
    assert (first["displayName"], first["groupName"], first["tags"]) == ("first try", "sweep 7", ["gpt2", "hh"])
    assert f"wandb: {server.url}/me/dpokit/runs/{first['name']}" in capfd.readouterr().err
    assert run.read_run()["wandb_id"] == first["name"]
    train("dpo_test", defaults, [*NAMED, "--resume_from_checkpoint", "auto", "--max_steps", "4"])
    assert {variables["name"] for variables in server.runs} == {first["name"]}
    train("dpo_test", defaults, [*NAMED, "--overwrite_run"])
    assert len({variables["name"] for variables in server.runs}) == 2


@pytest.mark.parametrize("trouble", ["malformed key", "refused key", "no server"])
def test_without_wandbs_server_a_run_is_tracked_offline(trouble, defaults, server, monkeypatch, capfd):
    server.refuses = trouble == "refused key"
    if trouble == "malformed key":
        monkeypatch.setenv("WANDB_API_KEY", "abc")
    if trouble == "no server":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    run = train("dpo_test", defaults, ["--report_to", "wandb", *NAMED])
    assert run.read_run()["state"] == "finished"
    (line,) = [line for line in lines_of(capfd.readouterr().err, "wandb") if "tracked offline" in line]
    reason = {"malformed key": "40", "refused key": "who are you", "no server": "127.0.0.1:9"}[trouble]
    assert reason in line
    tracked = read_wandb(run)
    assert tracked["run"]["display_name"] == "first try"
    check_final_numbers(run, tracked["summary"])


def test_a_run_finishes_though_wandbs_server_stops_answering(defaults, server, monkeypatch):
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    answer = server.answer

    def refuse_after_the_start(query: str, variables: dict) -> dict:
        server.refuses = server.refuses or bool(server.runs)
        return answer(query, variables)

    server.answer = refuse_after_the_start
    run = train("dpo_test", defaults, [])
    assert server.refuses
    assert run.read_run()["state"] == "finished"


def test_a_run_finishes_though_wandbs_own_process_is_killed(defaults, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = RunDir(defaults["output_dir"]).metrics_jsonl
    killed = []

    def kill_after_a_step() -> None:
        while not metrics.exists() or not metrics.read_text():
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # a child may end in between
                if process.name() == "wandb-core":
                    process.kill()
                    killed.append(process.pid)

    threading.Thread(target=kill_after_a_step, daemon=True).start()
    run = train("dpo_test", defaults, ["--report_to", "wandb", "--max_steps", "8"])
    assert killed
    assert run.read_run()["state"] == "finished"
    assert len(read_metrics(run.metrics_jsonl)) == 8
    assert "the run goes on without it" in capfd.readouterr().err


def test_trackio_gets_settings_metrics_and_final_numbers(defaults):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run = train("dpo_test", defaults, ["--report_to", "trackio", *NAMED])
    (tracked,) = trackio.Api().runs("dpokit")
    assert tracked.name == "first try"
    assert tracked.config["_Group"] == "sweep 7"
    assert tracked.config["run_tags"] == ["gpt2", "hh"]
    assert tracked.config.keys() >= run.read_run()["settings"].keys()
    assert tracked.config["beta"] == 0.25
    logs = SQLiteStorage.get_logs("dpokit", "first try")
    for name, logged in (("loss", "train/loss"), ("eval_rewards/accuracies", "eval/rewards/accuracies")):
        assert {record["step"]: record[logged] for record in logs if logged in record} == pytest.approx(
            {record["step"]: record[name] for record in read_metrics(run.metrics_jsonl)}
        )
    check_final_numbers(run, logs[-1])


def test_trackio_continues_a_resumed_run_but_not_a_new_one(defaults):
    import trackio

    flags = ["--report_to", "trackio", "--project", "resumed"]
    train("dpo_test", defaults, flags)
    train("dpo_test", defaults, [*flags, "--resume_from_checkpoint", "auto", "--max_steps", "4"])
    assert [run.name for run in trackio.Api().runs("resumed")] == ["run"]
    train("dpo_test", defaults, [*flags, "--overwrite_run"])
    assert [run.name for run in trackio.Api().runs("resumed")] == ["run", "run"]


def read_tensorboard(folder: Path) -> tuple[dict[str, list], dict[str, str]]:
    """The scalars as (step, value), and the texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    return scalars, {tag.removesuffix("/text_summary"): text for tag, text in texts.items()}


def test_tensorboard_gets_settings_metrics_and_final_numbers(defaults):
    run = train("dpo_test", defaults, ["--report_to", "tensorboard", *NAMED])
    scalars, texts = read_tensorboard(run.path / "tensorboard" / "first try")
    assert texts["run"] == "first try, group: sweep 7, tags: gpt2, hh"
    settings = json.loads(texts["settings"].strip("`\n"))
    assert settings.keys() == run.read_run()["settings"].keys()
    assert settings["beta"] == 0.25
    for name, logged in (("loss", "train/loss"), ("eval_rewards/accuracies", "eval/rewards/accuracies")):
        assert dict(scalars[logged]) == pytest.approx(
            {record["step"]: record[name] for record in read_metrics(run.metrics_jsonl)}
        )
    final = {name: values[-1][1] for name, values in scalars.items() if name.startswith("final/")}
    check_final_numbers(run, final | {"final/state": texts["final/state"]})


def test_tensorboard_shows_each_step_once_after_a_resume(defaults):
    run = train("dpo_test", defaults, ["--report_to", "tensorboard"])

    def steps() -> list[int]:
        return [step for step, _ in read_tensorboard(run.path / "tensorboard" / "run")[0]["train/loss"]]

    for later in run.checkpoints()[1:]:
        shutil.rmtree(later)
    again = ["--resume_from_checkpoint", str(run.path / "checkpoint-1"), "--max_steps", "4"]
    train("dpo_test", defaults, ["--report_to", "tensorboard", *again])
    assert steps() == [1, 2, 3, 4]
    train("dpo_test", defaults, ["--report_to", "tensorboard", "--overwrite_run"])
    assert steps() == [1, 2, 3]


def test_no_tracker_gets_a_secret(defaults, monkeypatch):
    secret = "hf_averysecrettoken"
    flags = ["--report_to", "wandb", "trackio", "tensorboard", "--project", "secrets", "--hub_token", secret]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["dpo_test.py", *flags])  # wandb stores the command line
    run = train("dpo_test", defaults, flags)
    files = [run.path / "wandb", run.path / "tensorboard", Path(_TRACKIO.name)]
    contents = [path.read_bytes() for folder in files for path in folder.rglob("*") if path.is_file()]
    assert any(b"--hub_token" in content for content in contents)
    assert not any(secret.encode() in content for content in contents)
    assert sys.argv[-1] == secret


def test_a_tracker_that_cannot_write_prints_one_line(defaults, monkeypatch, capfd):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/dev/null/events")
    run = train("dpo_test", defaults, ["--report_to", "tensorboard"])
    assert run.read_run()["state"] == "finished"
    (line,) = lines_of(capfd.readouterr().err, "tensorboard")
    assert "/dev/null" in line
    assert "goes on" in line


def test_every_tracker_is_opened_and_replaces_transformers_own(read_settings, monkeypatch, tmp_path):
    from transformers import TrainerControl, TrainerState
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    for name in TRACKERS:
        monkeypatch.setitem(TRACKERS, name, MagicMock())
    settings = read_settings("--report_to", *TRACKERS)
    with track_run(RunDir(tmp_path / "run"), settings) as tracker:
        tracker.begin()
        tracker.on_train_begin(settings.training, TrainerState(), TrainerControl())
        closed = [name for name in TRACKERS if name not in tracker.trackers]
    assert [f"{name}: open it in on_train_begin of TrackerCallback" for name in closed] == []
    kept = [name for name in TRACKERS if INTEGRATION_TO_CALLBACK[name] not in REPLACED]
    assert [f"{name}: add transformers' callback to REPLACED" for name in kept] == []


def test_other_ranks_open_no_tracker(read_settings, monkeypatch, tmp_path):
    import wandb
    from transformers import TrainerControl, TrainerState

    settings = read_settings("--report_to", "wandb", "trackio", "tensorboard")
    monkeypatch.setenv("RANK", "1")
    with track_run(RunDir(tmp_path / "run"), settings) as tracker:
        tracker.on_train_begin(settings.training, TrainerState(), TrainerControl())
        assert tracker.trackers == {}
        assert wandb.run is None


@pytest.mark.parametrize(
    "flags, variables, run_name, project",
    [
        ([], {}, "run", "dpokit"),
        ([], {"WANDB_NAME": "from env", "WANDB_PROJECT": "p env"}, "from env", "p env"),
        (["--run_name", "mine", "--project", "p"], {"WANDB_NAME": "from env", "WANDB_PROJECT": "p env"}, "mine", "p"),
    ],
)
def test_a_name_is_the_flag_else_the_variable_else_the_folder(
    flags, variables, run_name, project, read_settings, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = decide_trackers(read_settings(*flags))
    assert (settings.training.run_name, settings.training.project) == (run_name, project)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--report_to", "wandbb"], ["wandbb", "tensorboard", "trackio", "wandb"]),
        (["--report_to", "mlflow"], ["mlflow", "pip install mlflow", "--report_to none"]),
        (["--run_tags", "x" * 65], ["run_tags", "64"]),
    ],
)
def test_an_unknown_tracker_or_a_long_tag_is_refused(flags, parts, read_settings):
    with pytest.raises(SettingsError) as error:
        decide_trackers(read_settings(*flags))
    assert all(part in str(error.value) for part in parts)
