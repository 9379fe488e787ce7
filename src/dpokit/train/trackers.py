"""Trackers: send a run's name, group, tags, settings, metrics and final numbers to W&B, trackio or TensorBoard.

A tracker never ends a run: its error is printed in one line, and metrics.jsonl is written in any case. Only rank 0 uses
trackers.
"""

import importlib.util
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    rewrite_logs,
)

from dpokit.console import say
from dpokit.credentials import SECRET_SETTING
from dpokit.distributed.processes import is_main_process
from dpokit.errors import SettingsError
from dpokit.rundir import RunDir, read_metrics
from dpokit.settings.load import Settings

PACKAGES = {"azure_ml": ("azureml", "azureml-mlflow"), "flyte": ("flytekit", "flytekit")}  # module, pip's name
# TrackerCallback replaces these, as they may end a run (W&B's does, if wandb's process is gone).
REPLACED = (WandbCallback, TrackioCallback, TensorBoardCallback)
FINAL = ("step", "seconds", "num_tokens", "train_loss")  # in metrics.jsonl; and every eval_*


def decide_trackers(settings: Settings) -> Settings:
    """Settings with this run's trackers, and its name and project there.

    Weights & Biases is on by default if this machine has a key for it.

    Raises: SettingsError for a tracker that is unknown or not installed, or a tag that wandb does not take.
    """
    requested = "report_to" in settings.origins
    is_installed = importlib.util.find_spec("wandb") is not None
    if not requested and is_main_process() and is_installed and has_key() and not is_switched_off():
        settings = settings.with_training("this machine", report_to=[*settings.training.report_to, "wandb"])
        say("wandb: on, as this machine has a key for it (--report_to none switches it off)")
    for name in settings.training.report_to:
        check_tracker(name)
    for tag in settings.data.run_tags or []:
        if not 1 <= len(tag) <= 64:
            raise SettingsError(f"run_tags has {tag!r}", expected="1 to 64 characters a tag", do="correct --run_tags")
    folder = Path(settings.training.output_dir).resolve().name
    for name, variable, default in (("run_name", "WANDB_NAME", folder), ("project", "WANDB_PROJECT", "dpokit")):
        if name not in settings.origins:
            value = os.environ.get(variable)
            settings = settings.with_training(variable if value else "default", **{name: value or default})
    return settings


def check_tracker(name: str) -> None:
    """Raises SettingsError for a tracker that does not exist or is not installed."""
    if name not in INTEGRATION_TO_CALLBACK:
        raise SettingsError(
            f"report_to names {name}, which is not a tracker",
            expected=f"none, all, or some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
            do="correct --report_to",
        )
    module, package = PACKAGES.get(name, (name, name))
    # kubeflow is a cluster, not a package.
    if name != "kubeflow" and importlib.util.find_spec(module) is None:
        raise SettingsError(
            f"report_to names {name}, which is not installed",
            expected="an installed tracker",
            do=f"pip install {package}, or --report_to none (metrics.jsonl is always written)",
        )


@contextmanager
def track_run(run: RunDir, settings: Settings) -> Iterator["TrackerCallback"]:
    """Yields the callback that replaces those in `REPLACED`; at the end, sends the final numbers to all trackers.

    The block must end after run.json has the outcome of the run.
    """
    tracker = TrackerCallback(run, settings)
    try:
        yield tracker
    finally:
        for name in list(tracker.trackers):
            with tracker.guard(name):
                tracker.trackers[name].finish(find_final_numbers(run))


class TrackerCallback(TrainerCallback):
    """Starts trackers and passes the trainer's events to them; a tracker that fails is dropped."""

    def __init__(self, run: RunDir, settings: Settings) -> None:
        self.run = run
        self.settings = settings
        self.trackers: dict[str, Wandb | Trackio | TensorBoard] = {}

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Prints any error of the tracker in one line and drops the tracker: training matters more."""
        try:
            yield
        except Exception as error:
            self.trackers.pop(name, None)
            say(f"{name}: {first_line(error)}; the run goes on without it (metrics.jsonl has every number)")

    def begin(self) -> None:
        """Opens the run in W&B, before the data is read."""
        if is_main_process() and "wandb" in self.settings.training.report_to:
            self.start("wandb")

    def start(self, name: str, after_step: int = 0) -> None:
        """Opens the run in the tracker. `after_step`: the step that a run is resumed from, else 0."""
        with self.guard(name):
            self.trackers[name] = TRACKERS[name](self.run, self.settings, after_step)

    def _pass_on(self, event: str, *arguments: Any, **more: Any) -> None:
        for name in list(self.trackers):
            with self.guard(name):
                getattr(self.trackers[name], event)(*arguments, **more)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        for name in ("trackio", "tensorboard"):
            if is_main_process() and name in self.settings.training.report_to:
                self.start(name, state.global_step)
        self._pass_on("on_train_begin", args, state, control, **more)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._pass_on("on_log", args, state, control, **more)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._pass_on("on_save", args, state, control, **more)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if "wandb" in self.trackers:  # TensorBoard's method would close its writer before the final numbers
            with self.guard("wandb"):
                self.trackers["wandb"].on_train_end(args, state, control, **more)


class Trackio(TrainerCallback):
    """A trackio run, in TRACKIO_DIR on this machine. transformers' callback sends no group and no steps."""

    def __init__(self, run: RunDir, settings: Settings, after_step: int) -> None:
        import trackio

        training = settings.training
        self.trackio: Any = trackio
        with redirect_stdout(io.StringIO()):
            self.trackio.init(
                project=training.project,
                name=training.run_name,
                group=settings.data.run_group,
                config=read_recorded_settings(run),
                space_id=training.trackio_space_id,
                bucket_id=training.trackio_bucket_id,
                private=training.hub_private_repo,
                resume="allow" if after_step else "never",  # by name only: a new run may share it
            )
        say(f'trackio: `trackio show --project "{training.project}"` shows this run, {training.run_name}')

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        self.trackio.log(rewrite_logs(logs), step=state.global_step)

    def finish(self, final: dict[str, Any]) -> None:
        self.trackio.log(final, step=final.get("final/step", 0))
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


class TensorBoard(TensorBoardCallback):
    """transformers' callback, writing event files that are opened here; group and tags are a text.

    The files are in OUTPUT_DIR/tensorboard/RUN_NAME, or in TENSORBOARD_LOGGING_DIR/RUN_NAME.
    """

    def __init__(self, run: RunDir, settings: Settings, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        name, group, tags = settings.training.run_name, settings.data.run_group, settings.data.run_tags or []
        parent = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or run.path / "tensorboard").expanduser()
        # Hides the records that an interrupted run logged after its checkpoint, or all of them if the run starts again.
        super().__init__(SummaryWriter(str(parent / name), purge_step=after_step + 1 if after_step else 0))
        self._write({"run": f"{name}, group: {group}, tags: {', '.join(tags)}"}, after_step)
        self._write({"settings": f"```\n{json.dumps(read_recorded_settings(run), indent=2)}\n```"}, after_step)

    def _write(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            add = self.tb_writer.add_scalar if isinstance(value, int | float) else self.tb_writer.add_text
            add(name, value, step)
        self.tb_writer.flush()

    def finish(self, final: dict[str, Any]) -> None:
        self._write(final, final.get("final/step", 0))
        self.tb_writer.close()


def read_recorded_settings(run: RunDir) -> dict[str, Any]:
    """The settings in run.json, by name: with the run's own decisions, and secrets masked."""
    return {name: entry["value"] for name, entry in (run.read_run() or {}).get("settings", {}).items()}


def find_final_numbers(run: RunDir) -> dict[str, Any]:
    """The numbers `final/*` of a run, from its folder: state, step, seconds, tokens, last and best evaluation."""
    record = run.read_run() or {}
    newest: dict[str, Any] = {}
    for logged in read_metrics(run.metrics_jsonl) if run.metrics_jsonl.is_file() else ():
        newest |= logged
    state, best = record.get("state"), record.get("best")
    final: dict[str, Any] = {"state": state if state in ("finished", "preempted") else "failed"}
    if final["state"] != "finished":
        final["why"] = str(record.get("why"))
    measured = [name for name in newest if name.startswith("eval_") and not name.endswith(("runtime", "_per_second"))]
    final |= {name: newest[name] for name in (*FINAL, *measured) if name in newest}
    if best:
        final |= {"best_step": best["step"], f"best_eval_{best['metric'].removeprefix('eval_')}": best["value"]}
    return {f"final/{name}": value for name, value in final.items()}


HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # whose keys `wandb login` writes to ~/.netrc
# dpokit prints one line in place of wandb's many, and wandb does not wait for its server for ever while GPUs idle. The
# user's own WANDB_SILENT, WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT win.
SETTINGS = {"silent": True, "init_timeout": 20.0, "finish_timeout": 300.0}


class Wandb(WandbCallback):
    """transformers' callback, logging to a W&B run that is opened here, with its files in the run folder."""

    def __init__(self, run: RunDir, settings: Settings, after_step: int) -> None:
        import wandb

        super().__init__()
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # wandb's telemetry warns about its server
        first_mode, why = find_mode()
        arguments: dict[str, Any] = {
            "project": settings.training.project,
            "name": settings.training.run_name,
            "group": settings.data.run_group,
            "tags": settings.data.run_tags,
            "config": read_recorded_settings(run),
            "dir": os.environ.get("WANDB_DIR") or str(run.path),
            "settings": {k: v for k, v in SETTINGS.items() if f"WANDB_{k.upper()}" not in os.environ},
        }
        earlier_id = (run.read_run() or {}).get("wandb_id")
        with _without_secrets(settings):
            for mode in dict.fromkeys((first_mode, "offline", "disabled")):
                # An offline run cannot be resumed: each start is a run of its own, with the same name and group.
                resume = {"id": earlier_id, "resume": "allow"} if earlier_id and mode == "online" else {}
                try:
                    self.run: Any = wandb.init(mode=mode, **arguments, **resume)
                    break
                except Exception as error:  # a refused key, or a server that cannot be reached
                    why = first_line(error)
        if mode == "online":
            run.write_run(wandb_id=self.run.id)
            say(f"wandb: {self.run.url}")
        elif mode == "offline":
            say(f"wandb: {why}: tracked offline; `wandb sync {Path(self.run.dir).parent}` uploads it")
        else:
            say(f"wandb: {why}: this run is not tracked there")

    def finish(self, final: dict[str, Any]) -> None:
        self.run.summary.update(final)
        if final["final/state"] == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if final["final/state"] == "finished" else 1)


def find_mode() -> tuple[Any, str]:
    """The mode of wandb (online, offline or disabled) and its reason."""
    import wandb

    if is_switched_off():
        return "disabled", "switched off by WANDB_MODE or WANDB_DISABLED"
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return "offline", "WANDB_MODE is offline"
    if has_key() or wandb.login(prompt=False, verify=False):
        return "online", ""
    # Without a key and a terminal, wandb would end the run.
    return "offline", "no API key found (`wandb login` keeps one)"


def is_switched_off() -> bool:
    """Whether an environment variable switches wandb off."""
    return os.environ.get("WANDB_MODE") == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true")


def has_key() -> bool:
    """Whether this machine has a key for the wandb server in use."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = {urlsplit(server).netloc} if server else set(HOSTS)
    try:
        return not hosts.isdisjoint(netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts)
    except (OSError, NetrcParseError):
        return False


@contextmanager
def _without_secrets(settings: Settings) -> Iterator[None]:
    """Inside, secrets on the command line are masked: wandb stores the command line with the run."""
    arguments = sys.argv
    values = {**vars(settings.data), **vars(settings.training), **vars(settings.model)}
    secrets = [str(value) for name, value in values.items() if name.endswith(SECRET_SETTING) and value]
    sys.argv = ["***" if any(secret in argument for secret in secrets) else argument for argument in arguments]
    try:
        yield
    finally:
        sys.argv = arguments


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


TRACKERS: dict[str, type[Wandb] | type[Trackio] | type[TensorBoard]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
}
