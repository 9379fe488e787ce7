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
from dpokit.run_names import check_run_or_model
from dpokit.terminal import echo
from dpokit.verbs.common import PASS_ON, errors_without_torch

app = typer.Typer()

# The options that name the models, the same for both verbs.
Model = Annotated[
    str | None, typer.Argument(metavar="[RUN|MODEL]", help="A run folder, a model's folder, or a Hub id.")
]
Base = Annotated[str | None, typer.Option(help="The model to compare with; by default the run's base.")]
Endpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server that has the models: http://.../v1.")
]
EndpointModel = Annotated[str, typer.Option(help="The tuned model's name on that server.")]
EndpointBase = Annotated[str | None, typer.Option(help="The base model's name on that server.")]
EndpointKey = Annotated[str, typer.Option(help="The environment variable with the server's key.")]


@app.command(context_settings=PASS_ON)
def serve(
    context: typer.Context,
    model: Model = None,
    base: Base = None,
    endpoint: Endpoint = None,
    endpoint_model: EndpointModel = "",
    endpoint_base: EndpointBase = None,
    endpoint_key: EndpointKey = "OPENAI_API_KEY",
    host: Annotated[str, typer.Option(help="Any host other than this machine requires a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free port.")] = 7860,
    auth: Annotated[
        str | None, typer.Option(metavar="USER[:PASSWORD]", help="The password is safer in DPOKIT_SERVE_PASSWORD.")
    ] = None,
    forwarded_allow_ips: Annotated[
        str | None,
        typer.Option(metavar="IPS", help="Proxies, by address or network, whose X-Forwarded-For is trusted."),
    ] = None,
    votes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="By default RUN/votes.jsonl; ./votes.jsonl without a run folder."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens that a visitor may request.")] = 512,
    max_prompt_characters: Annotated[int, typer.Option(min=1, help="Most characters of a question.")] = 8_000,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most waiting questions; further ones are refused.")] = 16,
    per_minute: Annotated[int, typer.Option(min=1, help="Most questions per minute from one address.")] = 60,
) -> None:
    """Serves a page to chat with base and tuned model side by side; votes become training pairs. Prints its URL.

    Every other flag is a training flag that overrides the run's: --dtype bfloat16, --load_in_4bit, --use_cpu.
    """
    stdout = sys.stdout
    with errors_without_torch():
        check_run_or_model(model)
        check_run_or_model(base)
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
            models = build_models(model, base, context.args, remote=remote)
            with left_to_python():  # the server handles the KeyboardInterrupt of a signal and ends
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
    model: Model = None,
    base: Base = None,
    endpoint: Endpoint = None,
    endpoint_model: EndpointModel = "",
    endpoint_base: EndpointBase = None,
    endpoint_key: EndpointKey = "OPENAI_API_KEY",
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Ask only this question and exit.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the probability to sample from.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The same seed repeats an answer.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="With --prompt: print one JSON object on stdout.")] = False,
) -> None:
    """Chats with base and tuned model side by side in the terminal; with --prompt, answers one question, for scripts.

    Every other flag is a training flag that overrides the run's: --dtype bfloat16, --load_in_4bit, --use_cpu.
    """
    stdout = sys.stdout
    if as_json and prompt is None:
        raise typer.BadParameter("--json needs --prompt TEXT")
    with errors_without_torch():
        check_run_or_model(model)
        check_run_or_model(base)
    with redirect_stdout(sys.stderr):
        from dpokit.console import quiet_dependencies
        from dpokit.story import user_errors

        quiet_dependencies()
        from dpokit.serve.app import build_models
        from dpokit.serve.chat import ask_one, free_and_describe, print_answers, talk
        from dpokit.serve.request_limits import RequestLimits, SamplingSettings

        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # the question check refuses a line that is not UTF-8
        with user_errors():
            remote = (endpoint, endpoint_model, endpoint_base, endpoint_key)
            models = build_models(model, base, context.args, remote=remote)
            models.load()
            sampling, limits = SamplingSettings(temperature, top_p, max_new_tokens, seed), RequestLimits()
            if prompt is None:
                with left_to_python(), suppress(KeyboardInterrupt):  # Ctrl-C at the prompt ends the chat
                    talk(models, sampling, limits=limits, lines=sys.stdin, screen=stdout)
                return
            try:
                answers = ask_one(models, prompt, sampling, limits)
            except DpokitError:
                raise
            except Exception as failure:
                echo(free_and_describe(failure), err=True)
                raise typer.Exit(1) from None
    if as_json:
        echo(json.dumps(answers, indent=2))
    else:
        print_answers(answers, stdout)
