"""The verb that searches over settings: sweep."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dpokit.run_names import check_file_name
from dpokit.terminal import echo
from dpokit.verbs.common import errors_without_torch

app = typer.Typer()


@app.command()
def sweep(
    space: Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="The search space: see recipes/spaces/.")],
    output_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="By default sweeps/NAME.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at a time, which share the GPUs; by default 1, under Slurm all (tpe: 4 trials)."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Optuna's storage, for workers on many nodes; by default a file in FOLDER."),
    ] = None,
    trial_timeout: Annotated[
        float, typer.Option(help="Seconds; a run that writes nothing for longer is ended.")
    ] = 3600,
    watch: Annotated[bool, typer.Option("--watch", help="Show the search's progress; start no trials.")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Queue each run as a job; the trials of a round are one array.")
    ] = False,
    nodes: Annotated[int, typer.Option(help="Slurm: nodes of each run.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="Slurm: GPUs of each node; 0 trains on CPUs.")] = 0,
    processes_per_node: Annotated[
        int | None, typer.Option(help="Slurm: by default one per GPU, or the number in the placement's file.")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Slurm: any other option: --sbatch=--partition=gpu.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of sweep.json on stdout.")] = False,
) -> None:
    """Trains and ranks many runs of a recipe: grid, list, random or TPE. The same command resumes or joins a search.

    Ctrl-C makes the running trials save and ends the command; jobs in Slurm's queue continue. The exit code is 75 if
    the search is not complete, and 1 if no trial has finished.
    """
    with errors_without_torch():
        check_file_name(space, "SPACE.yaml")
    with redirect_stdout(sys.stderr):
        from dpokit.cluster.slurm import SlurmJob
        from dpokit.console import quiet_dependencies
        from dpokit.story import user_errors
        from dpokit.sweep.command import run_sweep

        quiet_dependencies()
        job = SlurmJob(
            recipe=space,  # the space names recipe and placement
            config_file=space,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            processes_per_node=processes_per_node,
            sbatch=tuple(sbatch or ()),
        )
        with user_errors():
            outcome = run_sweep(
                space,
                output_dir=output_dir,
                storage=storage,
                jobs=jobs,
                timeout_seconds=trial_timeout,
                watch_only=watch,
                job=job if slurm else None,
            )
    if outcome is None:
        raise typer.Exit(75)
    if as_json:
        echo(json.dumps(outcome, indent=2))
    else:
        from dpokit.sweep.live_table import print_outcome

        print_outcome(outcome)
    raise typer.Exit(0 if outcome["best"] else 1)
