"""The verb of many runs: sweep."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dpokit.terminal import echo

app = typer.Typer()


@app.command()
def sweep(
    space: Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="What is varied: see recipes/spaces/.")],
    output_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Without it sweeps/NAME.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs side by side, which share the GPUs; without it 1, under Slurm all (tpe: 4 trials)."),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Optuna's, for workers on many nodes; else a file in the folder.")
    ] = None,
    trial_timeout: Annotated[
        float, typer.Option(help="Seconds; a run that writes nothing for so long is ended.")
    ] = 3600,
    watch: Annotated[bool, typer.Option("--watch", help="Show what others work on, start nothing.")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Each run a job; the trials of a round are one array.")
    ] = False,
    nodes: Annotated[int, typer.Option(help="Slurm: nodes of each run.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="Slurm: 0 trains on processors.")] = 0,
    processes_per_node: Annotated[int | None, typer.Option(help="Slurm: instead of the placement's.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Slurm: any other: --sbatch=--partition=gpu.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What sweep.json holds, on stdout.")] = False,
) -> None:
    """Many runs of a recipe, ranked: grid, listed, random or TPE. The same command goes on with a search, or joins it.

    Ctrl-C asks the running trials to save, and leaves (those in Slurm's queue go on). Exit code 75 where the search is
    not over then, 1 where no trial has finished.
    """
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
