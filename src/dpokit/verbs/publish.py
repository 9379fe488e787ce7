"""Verbs that publish a model: merge, card, push."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import typer

from dpokit.run_names import check_run_name
from dpokit.terminal import echo, one_line
from dpokit.verbs.common import PASS_ON, complete_run, errors_without_torch

app = typer.Typer()

# The choice of weights, the same for both verbs.
Weights = Annotated[
    Literal["model", "adapter", "both"] | None,
    typer.Option(help="The weights to publish; by default the whole model if it exists, else the adapter."),
]


@app.command(context_settings=PASS_ON)
def merge(
    context: typer.Context,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder. It comes first.", autocompletion=complete_run)
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default the run's --dtype, or that of its base."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of a weights file.")] = "5GB",
    dequantized_base: Annotated[
        bool,
        typer.Option(
            "--dequantized-base", help="QLoRA: merge into the dequantised 4-bit base that the adapter was trained on."
        ),
    ] = False,
    accept_drift: Annotated[
        bool,
        typer.Option("--accept-drift", help="Keep the merge although it scores differently from the trained model."),
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Number of held-out pairs to score before and after.")] = 100,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Merge checkpoint-STEP instead of the final weights.")
    ] = None,
    proof: Annotated[bool, typer.Option("--proof/--no-proof", help="Score held-out pairs before and after.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of merge.json on stdout.")] = False,
) -> None:
    """Merges a run's adapter into its base, as safetensors in RUN/merged, with the measured drift in merge.json.

    Every other flag is a training flag that overrides the run's: --model_name_or_path NEW/PLACE/OF/THE/BASE.
    """
    with errors_without_torch():
        check_run_name(run)
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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=complete_run)],
    license: Annotated[str, typer.Option(help="The Hub's identifier of the licence (apache-2.0, mit), or other.")] = "",
    license_name: Annotated[str | None, typer.Option(help="The licence's name, with --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="The licence's URL, or LICENSE.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="Language of the data; may be repeated.")
    ] = None,
    repo_id: Annotated[str | None, typer.Option(metavar="USER/NAME", help="The model's repository on the Hub.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="The base's id on the Hub, if the run used a local folder.")
    ] = None,
    contact: Annotated[str | None, typer.Option(help="The person or address for questions.")] = None,
    weights: Weights = None,
    evaluation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The folder in RUN/eval; by default the largest of the run's own pairs."),
    ] = None,
) -> None:
    """Writes the model card, RUN/README.md, from the run folder alone, without the network."""
    with errors_without_torch():
        check_run_name(run)
        from dpokit.card.card import write_card
        from dpokit.rundir import RunDir

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
            evaluation=evaluation,
        )
    echo(one_line(written))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=complete_run)],
    repo_id: Annotated[
        str, typer.Option(metavar="USER/NAME", help="The repository on the Hub; it is created if it does not exist.")
    ],
    weights: Weights = None,
    old_weights: Annotated[Literal["merged", "adapter", "both"] | None, typer.Option("--what", hidden=True)] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="The base's id on the Hub, if the run used a local folder.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Write the card again, with this licence; by default dpokit card's is uploaded.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository; by default private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="By default the main branch.")] = None,
    commit_message: Annotated[str | None, typer.Option(metavar="TEXT", help="By default a generated one.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be uploaded; needs no network and no token.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking for confirmation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the uploaded (or planned) files as JSON.")] = False,
) -> None:
    """Uploads a run's model, card and curves to the Hub: private, searched for secrets, and only missing files."""
    if old_weights is not None and weights is not None:
        raise typer.BadParameter("--what is the old name of --weights: give --weights alone")
    with redirect_stdout(sys.stderr), errors_without_torch():
        check_run_name(run)
        from dpokit.push.hub import PushTarget
        from dpokit.push.push import push_run

        if old_weights is not None:  # the name in 0.1; delete it in 0.3
            echo("--what is now --weights, and its value merged is now model", err=True)
            weights = "model" if old_weights == "merged" else old_weights
        target = PushTarget(repo_id, public=public, revision=revision, message=commit_message)
        outcome = push_run(
            run, target, weights=weights, base_model=base_model, license=license, dry_run=dry_run, yes=yes
        )
    echo(json.dumps(outcome.record(), indent=2) if as_json else outcome.describe())
