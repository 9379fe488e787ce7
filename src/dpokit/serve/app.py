"""`dpokit serve`: serves the page until Ctrl+C or SIGTERM."""

import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpokit.apikey import read_api_key
from dpokit.console import say
from dpokit.data.messages import Messages, is_plain
from dpokit.data.prepare import prepare_held_out
from dpokit.data.transcripts import parse_prompt
from dpokit.errors import DpokitError, MachineError, SettingsError
from dpokit.model.load import load_tokenizer, name_model
from dpokit.rundir import RunDir
from dpokit.serve.failures import OnceAMinute
from dpokit.serve.guard import Credentials, Guard
from dpokit.serve.models import LocalModels, Models
from dpokit.serve.question_queue import QuestionQueue
from dpokit.serve.remote import RemoteModels
from dpokit.serve.request_limits import Network, RateLimit, RequestLimits, SamplingSettings
from dpokit.serve.votes import check_votes

PASSWORD_VARIABLE = "DPOKIT_SERVE_PASSWORD"
EXAMPLES = 24
USER = "dpokit"
SEND_BYTES = 2**16


@dataclass(frozen=True)
class Address:
    """The address of the page, and its access control.

    Attributes:
        auth: USER:PASSWORD, or USER with the password in the environment; None requires neither.
        proxies: the proxies whose X-Forwarded-For header is trusted.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: str | None = None
    proxies: tuple[Network, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the page."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def name(self) -> str:
        """The host as a URL has it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def find_hosts(self, credentials: Credentials | None) -> set[str] | None:
        """The allowed values of the Host header; None allows any.

        A page without a password allows only local names. With a password any name is safe: a foreign page whose name
        points to this machine (DNS rebinding) has no password to send.
        """
        return {"127.0.0.1", "localhost", "[::1]", self.name} if self.is_local and credentials is None else None

    def read_credentials(self) -> Credentials | None:
        """User and password. Raises: SettingsError if other machines can reach the page and no password is set."""
        user, _, password = (self.auth or USER).partition(":")
        password = password or os.environ.get(PASSWORD_VARIABLE, "")
        if user and password:
            return Credentials(user, password)
        if self.auth is None and self.is_local:
            return None
        raise SettingsError(
            f"--host {self.host} is reachable from other machines, and there is no password"
            if not self.is_local
            else "--auth has no password",
            expected=f"a user and a password: {PASSWORD_VARIABLE} in the environment (the user is {USER}, or --auth "
            "USER), or --auth USER:PASSWORD, which other users of this machine can read",
            do=f"export {PASSWORD_VARIABLE}=..., or leave out --host and use ssh -L 7860:127.0.0.1:7860",
        )


def run_server(
    models: Models,
    *,
    address: Address,
    votes: Path | None,
    limits: RequestLimits,
    sampling: SamplingSettings,
    on_ready: Callable[[str], None],
) -> None:
    """Serves the page until the process gets Ctrl+C or SIGTERM.

    Args:
        models: the models that answer; they are loaded while the page is already served.
        address: the address of the page, and its access control.
        votes: the file that votes are appended to; None disables votes.
        limits: the limits of requests.
        sampling: the sampling settings that the page starts with.
        on_ready: called with the page's URL once the server accepts connections.

    Raises:
        SettingsError: the port is in use, or other machines can reach the page and no password is set.
        ModelError: weights are missing; any other error of loading is shown on the page.
        MachineError: Gradio is not installed.
    """
    credentials = address.read_credentials()
    try:
        from dpokit.serve.page import build_application
        from dpokit.serve.widgets import Site
    except ImportError as error:
        raise MachineError(
            f"the page needs Gradio, which cannot be imported ({error})",
            expected="the extra `serve` (dpokit chat does not need it)",
            do="pip install 'dpokit[serve]'",
        ) from error
    if isinstance(models, LocalModels):
        models.check_files()
    listener = _listen(address)
    queue = QuestionQueue(models, limits)
    site = Site(queue, votes, find_examples(models), RateLimit(limits.per_minute), find_run_token(models))
    application, forms = build_application(site, defaults=sampling)
    guard = Guard(
        application,
        hosts=address.find_hosts(credentials),
        credentials=credentials,
        per_minute=limits.per_minute,
        forms=forms,
        sessions=site.sessions,
    )
    queue.open()
    try:
        _run(guard, listener, address, on_ready)
    finally:
        queue.close()


def _run(guard: Guard, listener: socket.socket, address: Address, on_ready: Callable[[str], None]) -> None:
    """Serves until a signal stops the server."""
    import uvicorn  # installed with Gradio

    from dpokit.serve.connections import Connections, build_protocol

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready(f"http://{address.name}:{listener.getsockname()[1]}")

    config = uvicorn.Config(
        guard,
        http=build_protocol(Connections(address.proxies)),
        ws="none",
        timeout_graceful_shutdown=3,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(address.proxies),
        forwarded_allow_ips=[str(network) for network in address.proxies],
    )
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(OnceAMinute())
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])


def _listen(address: Address) -> socket.socket:
    """A bound and listening socket. Raises: SettingsError if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit this size: with a small buffer, a client that does not read is noticed soon.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        listener.bind((address.host, address.port))
        listener.listen()  # reserves the port from now on
    except (OSError, OverflowError, TypeError, UnicodeError) as error:  # the last two: not a host name
        listener.close()
        raise SettingsError(
            f"--host {address.host} --port {address.port}: {error.strerror if isinstance(error, OSError) else error}",
            expected="an address of this machine, and a free port",
            do="--port 0 for any free port, or end the program that uses this one",
        ) from error
    return listener


def read_proxies(text: str | None) -> tuple[Network, ...]:
    """The networks of a comma-separated list. Raises: SettingsError for anything else, also for `*`."""
    try:
        return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise SettingsError(
            f"--forwarded-allow-ips {text}: {error}",
            expected="addresses or networks of proxies, separated by commas",
            do="name the proxy: --forwarded-allow-ips 127.0.0.1",
        ) from error


def build_models(
    name: str | None, base: str | None, argv: Sequence[str], *, remote: tuple[str | None, str, str | None, str]
) -> Models:
    """The models to talk to: loaded here later, or served by an endpoint.

    Args:
        name, base, argv: as for `LocalModels`.
        remote: the endpoint's URL, the names of its tuned and base model, and the environment variable with its key.

    Raises: DpokitError: an error that the user can correct.
    """
    url, tuned, remote_base, variable = remote
    if url is None:
        if name is None:
            raise SettingsError("no run or model is named", expected="a run or a model", do="name RUN or MODEL")
        return LocalModels(name, base, argv)
    if name is not None or base is not None or argv:
        local_arguments = " ".join([*filter(None, (name, base)), *argv])
        raise SettingsError(
            f"--endpoint has the models, and {local_arguments} would load other models here",
            expected="one of the two",
            do="name the server's models with --endpoint-model and --endpoint-base",
        )
    if not tuned:
        raise SettingsError(
            "--endpoint without a model", expected="the model's name on the server", do="--endpoint-model NAME"
        )
    return RemoteModels(url, tuned=tuned, base=remote_base, api_key=read_api_key(variable))


def find_run_token(models: Models) -> str | None:
    """The token of the run's first start, which identifies the run; None without a run."""
    starts = models.record.get("generations", []) if isinstance(models, LocalModels) else []
    return starts[0].get("token") if starts else None


def find_examples(models: Models) -> list[Messages]:
    """The first EXAMPLES distinct held-out questions of a run; empty if its data is unavailable.

    Raises nothing: the page works without examples, so an error is only printed.
    """
    if not isinstance(models, LocalModels) or models.run is None:
        return []
    settings = models.settings
    if not settings.data.sources() or settings.data.dataset_streaming:
        return []
    try:
        tokenizer = load_tokenizer(name_model(settings, models.names["tuned"]))
        held_out = prepare_held_out(settings.data, tokenizer, max_length=settings.training.max_length)
    except Exception as error:
        cause = error.seen if isinstance(error, DpokitError) else f"{type(error).__name__}: {error}"
        say(f"no held-out questions are shown: {' '.join(cause.split())[:300]}")
        return []
    examples: dict[str, Messages] = {}
    is_raw = settings.data.prompt_format == "raw"
    for prompt in held_out.prompts:
        messages = parse_prompt(prompt, is_raw=is_raw)
        if not messages or not all(map(is_plain, messages)):  # the page shows texts, not tool calls
            continue
        if messages[-1]["role"] == "user" and messages[-1]["content"].strip():
            examples.setdefault(str(messages), messages)
        if len(examples) == EXAMPLES:
            break
    return list(examples.values())


def find_votes(run: RunDir | None, votes_file: Path | None) -> Path:
    """The file of votes. Raises: SettingsError if its folder is missing, RunFolderError if the file holds no votes."""
    path = votes_file or (run.votes_jsonl if run is not None else Path("votes.jsonl"))
    if not path.parent.is_dir() or path.is_dir():
        raise SettingsError(
            f"--votes {path} cannot be written", expected="a file in an existing folder", do="create the folder"
        )
    check_votes(path)
    return path
