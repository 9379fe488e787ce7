"""`dpokit serve`: from names to a page that answers, until it is told to end."""

import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpokit.apikey import read_api_key
from dpokit.console import say
from dpokit.data.formats import Messages, parse_transcript
from dpokit.data.prepare import prepare_held_out
from dpokit.errors import DpokitError, MachineError, SettingsError
from dpokit.model.load import load_tokenizer, name_model
from dpokit.rundir import RunDir
from dpokit.serve.failures import OnceAMinute
from dpokit.serve.guard import Credentials, Guard
from dpokit.serve.models import LocalModels, Models
from dpokit.serve.question_queue import Desk
from dpokit.serve.remote import RemoteModels
from dpokit.serve.request_limits import Limits, Network, Rate, Sampling
from dpokit.serve.votes import check_votes

PASSWORD_VARIABLE = "DPOKIT_SERVE_PASSWORD"
EXAMPLES = 24
USER = "dpokit"
SEND_BYTES = 2**16


@dataclass(frozen=True)
class Address:
    """Where the page is, and who may come in.

    Attributes:
        auth: USER:PASSWORD, or USER with the password in the environment; None asks for neither.
        proxies: whose X-Forwarded-For counts.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: str | None = None
    proxies: tuple[Network, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether nobody on another machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def name(self) -> str:
        """As a URL has it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def find_hosts(self, credentials: Credentials | None) -> set[str] | None:
        """Names by which the page may be asked for; None for any.

        A page elsewhere that has its own name point to this machine has no password to send.
        """
        return {"127.0.0.1", "localhost", "[::1]", self.name} if self.is_local and credentials is None else None

    def read_credentials(self) -> Credentials | None:
        """User and password. Raises: SettingsError where others can reach the page and there is no password."""
        user, _, password = (self.auth or USER).partition(":")
        password = password or os.environ.get(PASSWORD_VARIABLE, "")
        if user and password:
            return Credentials(user, password)
        if self.auth is None and self.is_local:
            return None
        raise SettingsError(
            f"--host {self.host} can be reached by others, and there is no password"
            if not self.is_local
            else "--auth has no password",
            expected=f"a user and a password: {PASSWORD_VARIABLE} in the environment (the user is {USER}, or --auth "
            "USER), or --auth USER:PASSWORD, which other users of this machine can read",
            do=f"export {PASSWORD_VARIABLE}=..., or leave out --host and reach the page by ssh -L 7860:127.0.0.1:7860",
        )


def serve(
    models: Models,
    *,
    address: Address,
    votes: Path | None,
    limits: Limits,
    sampling: Sampling,
    on_ready: Callable[[str], None],
) -> None:
    """Shows the page until the process is told to end (Ctrl+C, SIGTERM).

    Args:
        models: who answers; loaded while the page is already there.
        address: where, and for whom.
        votes: the file that votes are added to; None takes none.
        limits: the most of everything.
        sampling: what the page begins with.
        on_ready: gets the page's URL once it is there.

    Raises:
        SettingsError: a port that is taken, or a page for others without a password.
        ModelError: weights that are not there; what cannot be loaded for another reason is said on the page.
        MachineError: Gradio is not installed.
    """
    credentials = address.read_credentials()
    try:
        from dpokit.serve.page import build_application
        from dpokit.serve.widgets import Site
    except ImportError as error:
        raise MachineError(
            f"the page needs Gradio, which cannot be imported ({error})",
            expected="the extra `serve`; dpokit chat needs none",
            do="pip install 'dpokit[serve]'",
        ) from error
    if isinstance(models, LocalModels):
        models.check_files()
    listening = _listen(address)
    desk = Desk(models, limits)
    site = Site(desk, votes, find_examples(models), Rate(limits.per_minute), find_token(models))
    application, forms = build_application(site, defaults=sampling)
    guard = Guard(
        application,
        hosts=address.find_hosts(credentials),
        credentials=credentials,
        per_minute=limits.per_minute,
        forms=forms,
        sessions=site.sessions,
    )
    desk.open()
    try:
        _run(guard, listening, address, on_ready)
    finally:
        desk.close()


def _run(guard: Guard, listening: socket.socket, address: Address, on_ready: Callable[[str], None]) -> None:
    """Serves until a signal ends it."""
    import uvicorn  # comes with Gradio

    from dpokit.serve.connections import Connections, build_protocol

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready(f"http://{address.name}:{listening.getsockname()[1]}")

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
        Server(config).run(sockets=[listening])


def _listen(address: Address) -> socket.socket:
    """A socket that is bound. Raises: SettingsError where it cannot be."""
    kind = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listening = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: the system holds little for one who reads nothing, and that is soon noticed.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        listening.bind((address.host, address.port))
        listening.listen()  # from now on nobody else gets the port
    except (OSError, OverflowError, TypeError, UnicodeError) as error:  # the last two: no name of a host
        listening.close()
        raise SettingsError(
            f"--host {address.host} --port {address.port}: {error.strerror if isinstance(error, OSError) else error}",
            expected="an address of this machine, and a free port",
            do="--port 0 for any free one, or end what listens there",
        ) from error
    return listening


def read_proxies(text: str | None) -> tuple[Network, ...]:
    """Addresses and networks with commas between them. Raises: SettingsError for anything else, `*` too."""
    try:
        return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise SettingsError(
            f"--forwarded-allow-ips {text}: {error}",
            expected="addresses or networks of proxies, with commas between them",
            do="name the proxy: --forwarded-allow-ips 127.0.0.1",
        ) from error


def build_models(
    what: str | None, base: str | None, argv: Sequence[str], *, remote: tuple[str | None, str, str | None, str]
) -> Models:
    """Models that are loaded here, or kept by a server; nothing is loaded yet.

    Args:
        what, base, argv: as for `LocalModels`.
        remote: the server's URL, which models there are tuned and base, and the variable with its key.

    Raises: DpokitError: what the user can mend.
    """
    url, tuned, beside, variable = remote
    if url is None:
        if what is None:
            raise SettingsError("nothing to talk to was named", expected="a run or a model", do="name RUN or MODEL")
        return LocalModels(what, base, argv)
    if what is not None or base is not None or argv:
        seen = " ".join([*filter(None, (what, base)), *argv])
        raise SettingsError(
            f"--endpoint has the models, and {seen} would load others here",
            expected="one of the two",
            do="name the server's models with --endpoint-model and --endpoint-base",
        )
    if not tuned:
        raise SettingsError("--endpoint without a model", expected="its name there", do="--endpoint-model NAME")
    return RemoteModels(url, tuned=tuned, base=beside, api_key=read_api_key(variable))


def find_token(models: Models) -> str | None:
    """Of the run's first start, which no other run in the same folder shares; None without a run."""
    starts = models.record.get("generations", []) if isinstance(models, LocalModels) else []
    return starts[0].get("token") if starts else None


def find_examples(models: Models) -> list[Messages]:
    """The first held-out questions of a run, each once; none where its data is not at hand, which is said.

    Raises nothing: they are a nicety.
    """
    if not isinstance(models, LocalModels) or models.run is None:
        return []
    settings = models.settings
    if not settings.data.dataset_name or settings.data.dataset_streaming:
        return []
    try:
        tokenizer = load_tokenizer(name_model(settings, models.names["tuned"]))
        held_out = prepare_held_out(settings.data, tokenizer, max_length=settings.training.max_length)
    except Exception as error:
        seen = error.seen if isinstance(error, DpokitError) else f"{type(error).__name__}: {error}"
        say(f"no held-out questions are shown: {' '.join(seen.split())[:300]}")
        return []
    found: dict[str, Messages] = {}
    for prompt in held_out.prompts:
        messages: Any = parse_transcript(prompt) if isinstance(prompt, str) else prompt
        if messages and messages[-1]["role"] == "user" and messages[-1]["content"].strip():
            found.setdefault(str(messages), messages)
        if len(found) == EXAMPLES:
            break
    return list(found.values())


def find_votes(run: RunDir | None, asked: Path | None) -> Path:
    """The file of votes. Raises: SettingsError where its folder is not there, RunFolderError where it is another."""
    path = asked or (run.votes_jsonl if run is not None else Path("votes.jsonl"))
    if not path.parent.is_dir() or path.is_dir():
        raise SettingsError(
            f"--votes {path} cannot be written", expected="a file in a folder that is there", do="mkdir"
        )
    check_votes(path)
    return path
