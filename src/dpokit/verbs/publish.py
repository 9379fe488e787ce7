"""Verbs that let a model out: merge, card, push."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import typer

from dpokit.terminal import echo, one_line
from dpokit.verbs.common import PASS_ON, errors_without_torch

app = typer.Typer()


@app.command(context_settings=PASS_ON)
def merge(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder. It comes first.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it, what the model was loaded in.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a weights file.")] = "5GB",
    dequantized_base: Annotated[
        bool,
        typer.Option(
            "--dequantized-base", help="QLoRA: into what 4 bits left of the base, which the adapter was trained on."
        ),
    ] = False,
    accept_drift: Annotated[
        bool, typer.Option("--accept-drift", help="Go on where the merged model is not quite the trained one.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Held-out pairs scored before and after.")] = 100,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Instead of the final weights, those of checkpoint-STEP.")
    ] = None,
    proof: Annotated[bool, typer.Option("--proof/--no-proof", help="Score held-out pairs before and after.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="What merge.json holds, on stdout.")] = False,
) -> None:
    """One safetensors model of what a run trained, in RUN/merged, with the measured drift in merge.json beside it.

    Every other flag is a training flag, over the run's own: --model_name_or_path NEW/PLACE/OF/THE/BASE.
    """
    with redirect_stdout(sys.stderr):
        from dpokit.merge.merge import MergeOptions, describe_merge, merge_run
        from dpokit.rundir import RunDir
        from dpokit.story import user_errors

        with user_errors():
            options = MergeOptions(dtype, max_shard_size, dequantized_base, accept_drift, limit, checkpoint, proof)
            record = merge_run(RunDir(run), options, argv=context.args)
    echo(json.dumps(record, indent=2) if as_json else describe_merge(record))


@app.command()
def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    license: Annotated[str, typer.Option(help="One that the Hub knows (apache-2.0, mit), or other.")] = "",
    license_name: Annotated[str | None, typer.Option(help="With --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="An address, or LICENSE.")] = None,
    language: Annotated[list[str] | None, typer.Option(metavar="CODE", help="Of the data; may be repeated.")] = None,
    repo_id: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Where the model goes.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="On the Hub, where the run was given a folder.")
    ] = None,
    contact: Annotated[str | None, typer.Option(help="Whom to ask.")] = None,
    weights: Annotated[
        Literal["model", "adapter", "both"] | None, typer.Option(help="What is published; else a whole model, if any.")
    ] = None,
) -> None:
    """The model card, RUN/README.md, from the run folder alone: nothing is asked of the Hub."""
    from dpokit.card.card import write_card
    from dpokit.rundir import RunDir

    with errors_without_torch():
        written = write_card(
            RunDir(run),
            license=license,
            license_name=license_name,
            license_link=license_link,
            language=language or (),
            repo_id=repo_id,
            base_model=base_model,
            contact=contact,
            weights=weights,
        )
    echo(one_line(written))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    repo_id: Annotated[str, typer.Option(metavar="USER/NAME", help="Where to; it is made where it is missing.")],
    what: Annotated[
        str | None,
        typer.Option(metavar="merged|adapter|both", help="Without it the whole model, else the adapter."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="The base's id on the Hub, where the run used a folder.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Writes the card anew; without it the card goes that dpokit card wrote.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; else private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Without it the main branch.")] = None,
    commit_message: Annotated[str | None, typer.Option(metavar="TEXT", help="Without it a plain one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; no network, no token.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What went, or would go, as one JSON object.")] = False,
) -> None:
    """A run's model, card and curves on the Hub: private, searched for secrets, and only what is not there yet."""
    with redirect_stdout(sys.stderr), errors_without_torch():
        from dpokit.push.hub import PushTarget
        from dpokit.push.push import push_run

        target = PushTarget(repo_id, public=public, revision=revision, message=commit_message)
        outcome = push_run(run, target, weights=what, base_model=base_model, license=license, dry_run=dry_run, yes=yes)
    echo(json.dumps(outcome.record(), indent=2) if as_json else outcome.describe())
