"""Verbs that talk to a model: serve, chat."""

import json
import sys
from contextlib import redirect_stdout, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from dpokit.errors import DpokitError
from dpokit.interrupts import left_to_python
from dpokit.terminal import echo
from dpokit.verbs.common import PASS_ON

app = typer.Typer()

# Who is talked to: the same for both verbs.
What = Annotated[str | None, typer.Argument(metavar="[RUN|MODEL]", help="A run folder, a model's folder, or a Hub id.")]
Base = Annotated[str | None, typer.Option(help="What stands beside it; without it the run's own base.")]
Endpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server that has the models: http://.../v1.")
]
EndpointModel = Annotated[str, typer.Option(help="Which model there is talked to.")]
EndpointBase = Annotated[str | None, typer.Option(help="Which one there stands beside it.")]
EndpointKey = Annotated[str, typer.Option(help="The environment variable with its key.")]


@app.command(context_settings=PASS_ON)
def serve(
    context: typer.Context,
    what: What = None,
    base: Base = None,
    endpoint: Endpoint = None,
    endpoint_model: EndpointModel = "",
    endpoint_base: EndpointBase = None,
    endpoint_key: EndpointKey = "OPENAI_API_KEY",
    host: Annotated[str, typer.Option(help="Any other than this machine's own asks for a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 7860,
    auth: Annotated[
        str | None, typer.Option(metavar="USER[:PASSWORD]", help="The password better in DPOKIT_SERVE_PASSWORD.")
    ] = None,
    forwarded_allow_ips: Annotated[
        str | None, typer.Option(metavar="IPS", help="Proxies, by address or network, whose X-Forwarded-For counts.")
    ] = None,
    votes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Without it RUN/votes.jsonl; ./votes.jsonl of named models.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most that an answer may be asked to have.")] = 512,
    max_prompt_characters: Annotated[int, typer.Option(min=1, help="Of a question.")] = 8_000,
    max_waiting: Annotated[int, typer.Option(min=1, help="Questions that wait; one more is told: busy.")] = 16,
    per_minute: Annotated[int, typer.Option(min=1, help="Questions from one address.")] = 60,
) -> None:
    """A page to talk to base and tuned side by side; votes become pairs to train on. It prints its URL.

    Every other flag is a training flag, over the run's own: --dtype bfloat16, --load_in_4bit, --use_cpu.
    """
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        from dpokit.console import quiet_dependencies
        from dpokit.story import user_errors

        quiet_dependencies()
        from dpokit.serve.app import Address, build_models, find_votes, read_proxies, run_server
        from dpokit.serve.request_limits import RequestLimits, SamplingSettings

        with user_errors():
            address = Address(host, port, auth, read_proxies(forwarded_allow_ips))
            address.read_credentials()
            remote = (endpoint, endpoint_model, endpoint_base, endpoint_key)
            models = build_models(what, base, context.args, remote=remote)
            with left_to_python():  # a signal is how a server is ended
                run_server(
                    models,
                    address=address,
                    votes=find_votes(models.run, votes),
                    limits=RequestLimits(
                        max_prompt_characters, new_tokens=max_new_tokens, waiting=max_waiting, per_minute=per_minute
                    ),
                    sampling=SamplingSettings(),
                    on_ready=lambda url: typer.echo(url, file=stdout),
                )


@app.command(context_settings=PASS_ON)
def chat(
    context: typer.Context,
    what: What = None,
    base: Base = None,
    endpoint: Endpoint = None,
    endpoint_model: EndpointModel = "",
    endpoint_base: EndpointBase = None,
    endpoint_key: EndpointKey = "OPENAI_API_KEY",
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Ask this alone, and end.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the probability sampled from.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Repeats an answer.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="With --prompt: one JSON object on stdout.")] = False,
) -> None:
    """Base and tuned side by side in the terminal; with --prompt one question, for scripts.

    Every other flag is a training flag, over the run's own: --dtype bfloat16, --load_in_4bit, --use_cpu.
    """
    stdout = sys.stdout
    if as_json and prompt is None:
        raise typer.BadParameter("--json goes with --prompt TEXT")
    with redirect_stdout(sys.stderr):
        from dpokit.console import quiet_dependencies
        from dpokit.story import user_errors

        quiet_dependencies()
        from dpokit.serve.app import build_models
        from dpokit.serve.chat import ask_one, free_and_describe, print_answers, talk
        from dpokit.serve.request_limits import RequestLimits, SamplingSettings

        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused as a question is
        with user_errors():
            remote = (endpoint, endpoint_model, endpoint_base, endpoint_key)
            models = build_models(what, base, context.args, remote=remote)
            models.load()
            sampling, limits = SamplingSettings(temperature, top_p, max_new_tokens, seed), RequestLimits()
            if prompt is None:
                with left_to_python(), suppress(KeyboardInterrupt):  # at the prompt it ends the talk
                    talk(models, sampling, limits=limits, lines=sys.stdin, screen=stdout)
                return
            try:
                found = ask_one(models, prompt, sampling, limits)
            except DpokitError:
                raise
            except Exception as failure:
                echo(free_and_describe(failure), err=True)
                raise typer.Exit(1) from None
    if as_json:
        echo(json.dumps(found, indent=2))
    else:
        print_answers(found, stdout)
