"""Verbs before and during a run: train, plan, prepare, submit, status, verify."""

import json
import os
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dpokit.run_names import check_file_name, check_run_name
from dpokit.settings.layers import find_recipe
from dpokit.terminal import echo, one_line
from dpokit.verbs.common import PASS_ON, Recipe, TrainingCommand, complete_run, errors_without_torch

app = typer.Typer()
CTRL_C = 130  # the exit code of a shell's own command that Ctrl-C ended


@app.command(cls=TrainingCommand, context_settings=PASS_ON | {"help_option_names": []})
def train(
    context: typer.Context,
    recipe: Recipe,
    config_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="accelerate's config file of a placement.")
    ] = None,
) -> None:
    """Starts a run as `accelerate launch` does, without its warnings; the exit code is the run's own.

    Every other flag is a training flag: dpokit train dpo_gpt2 --beta 0.2. RECIPE --help shows those of a recipe.
    """
    from dpokit.settings.layers import find_recipe
    from dpokit.start_run import build_run_command

    if recipe in ("--help", "-h"):
        echo(context.get_help())
        return
    with errors_without_torch():
        command = build_run_command(find_recipe(recipe), context.args, config_file)
    sys.stdout.flush()
    os.execv(command[0], command)  # signals then reach the run or its launcher, and the exit code is theirs


@app.command(cls=TrainingCommand, context_settings=PASS_ON)
def plan(
    context: typer.Context,
    recipe: Recipe,
    gpus: Annotated[
        str | None, typer.Option(metavar="NxGIB", help="Plan for these GPUs: 8x80. By default for this machine.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Train the longest rows for two steps here, and compare the peak memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Predicts memory, steps and tokens of a run without loading weights; names a placement that fits, and its command.

    Every other flag is a training flag that overrides the recipe's: dpokit plan recipes/dpo_qlora.py --lora_r 32.
    """
    with errors_without_torch():
        find_recipe(recipe)
    with redirect_stdout(sys.stderr):  # output of libraries is no part of the result
        from dpokit.console import quiet_dependencies
        from dpokit.story import user_errors

        quiet_dependencies()
        from dpokit.plan.check import check_plan
        from dpokit.plan.plan import build_plan
        from dpokit.plan.request import load_request
        from dpokit.plan.table import print_plan

        with user_errors():
            made = build_plan(load_request(recipe, context.args, gpus))
            checked = check_plan(made) if check else None
    if as_json:
        echo(json.dumps(made.record() | {"check": checked}, indent=2))
    else:
        print_plan(made, checked)


@app.command(cls=TrainingCommand, context_settings=PASS_ON)
def prepare(
    context: typer.Context,
    recipe: Recipe,
    as_json: Annotated[bool, typer.Option("--json", help="Print the future content of data.json on stdout.")] = False,
) -> None:
    """Computes tokens and reference log-probs of a run in advance; the run then finds them in the caches.

    Every other flag is a training flag; give those of the run: dpokit prepare recipes/dpo_gpt2.py --max_length 512.
    """
    with errors_without_torch():
        path = find_recipe(recipe)
    with redirect_stdout(sys.stderr):
        from dpokit.run import prepare_run
        from dpokit.settings.layers import read_defaults
        from dpokit.story import user_errors

        with user_errors():
            record = prepare_run(str(path), read_defaults(path), context.args)
    if as_json:
        echo(json.dumps(record, indent=2))


@app.command(cls=TrainingCommand, context_settings=PASS_ON)
def submit(
    context: typer.Context,
    recipe: Recipe,
    config_file: Annotated[Path, typer.Option(metavar="FILE", help="accelerate's config file of a placement.")] = Path(
        "accelerate_configs/single_gpu.yaml"
    ),
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node; 0 trains on CPUs.")] = 0,
    processes_per_node: Annotated[
        int | None, typer.Option(help="By default one per GPU, or the number in the placement's file.")
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(help="CPUs of each node; sbatch's default may be one, too few to load data.")
    ] = None,
    mem: Annotated[str | None, typer.Option(metavar="64G", help="Memory of each node; 0 for all of it.")] = None,
    partition: Annotated[str | None, typer.Option(help="Passed to sbatch.")] = None,
    account: Annotated[str | None, typer.Option(help="Passed to sbatch.")] = None,
    qos: Annotated[str | None, typer.Option(help="Passed to sbatch.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, passed to sbatch: 8:00:00.")] = None,
    array: Annotated[str | None, typer.Option(help="Passed to sbatch: 0-7; %a in a flag is the index.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Use whole nodes.")] = False,
    job_name: Annotated[str | None, typer.Option(help="By default the recipe's name.")] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="The job's log; by default slurm-JOB.out in the run folder.")
    ] = None,
    setup: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Shell commands before all else: module load, conda activate.")
    ] = None,
    signal_seconds: Annotated[int, typer.Option(help="Save this many seconds before the limit, then requeue.")] = 300,
    max_restarts: Annotated[int, typer.Option(help="Most restarts after crashes.")] = 3,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Any other option of sbatch: --sbatch=--constraint=h100.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script; queue nothing.")] = False,
) -> None:
    """Queues a run on a Slurm cluster: it checks the run first, saves before the time limit, requeues after preemption.

    Every other flag is a training flag: dpokit submit recipes/dpo_8b.py --nodes 2 --gpus-per-node 8 --beta 0.2.
    """
    with errors_without_torch():
        path = find_recipe(recipe)
        check_file_name(config_file, "--config-file")
    with redirect_stdout(sys.stderr):
        from dpokit.cluster.job_files import describe_log, list_log_folders, log_folders, with_log
        from dpokit.cluster.slurm import SlurmJob, check_job, render_job, submit_text
        from dpokit.console import quiet_dependencies
        from dpokit.story import user_errors

        quiet_dependencies()
        from dpokit.plan.request import load_request

        with user_errors():
            job = SlurmJob(
                recipe=path,
                flags=tuple(context.args),
                config_file=config_file,
                nodes=nodes,
                gpus_per_node=gpus_per_node,
                processes_per_node=processes_per_node,
                cpus_per_task=cpus_per_task,
                mem=mem,
                partition=partition,
                account=account,
                qos=qos,
                time=time,
                array=array,
                exclusive=exclusive,
                job_name=job_name,
                output=output,
                setup=setup,
                signal_seconds=signal_seconds,
                max_restarts=max_restarts,
                sbatch=tuple(sbatch or ()),
            )
            check_job(job)
            # Checks the flags as a run would, for GPUs that this machine may lack; their memory does not matter here.
            gpus = f"{nodes * gpus_per_node}x80" if gpus_per_node else None
            load_request(str(job.recipe), job.command().flags, gpus)
            job = with_log(job)
            list_log_folders(job)  # a dry run refuses what the submission would
            text = render_job(job)
            if not dry_run:
                with log_folders(job):
                    job_id = submit_text(text)
    if dry_run:
        typer.echo(text, nl=False)
        return
    typer.echo(job_id)
    if job.output is not None:
        echo(f"log: {one_line(describe_log(job.output, job_id))}", err=True)
    if job.array is None:
        echo(f"dpokit status {shlex.quote(str(job.command().run_folder().path))} --watch shows its progress", err=True)


@app.command()
def status(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN [RUN ...]", help="Run folders: their --output_dir.", autocompletion=complete_run),
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the runs until all have ended; exit code 1 if one has not finished.")
    ] = False,
    max_restarts: Annotated[int, typer.Option(help="Most restarts after crashes.")] = 3,
    since: Annotated[
        int | None,
        typer.Option(help="Judge the start on this host that came after this number of starts (launch/train.sbatch)."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print a JSON object, or a list for several; a folder without a run is no error."),
    ] = False,
) -> None:
    """Shows state, progress, last good checkpoint and restarts of runs, and what to do with them next."""
    if watch and as_json:
        raise typer.BadParameter("--watch shows a table; --json prints the status once")
    with errors_without_torch():
        for run in [] if as_json else runs:
            check_run_name(run)
        from dpokit.cluster.status import Status, describe_status, find_attempt, read_status
        from dpokit.cluster.watch import print_runs, watch_runs
        from dpokit.interrupts import left_to_python
        from dpokit.rundir import RunDir

        folders = [RunDir(run) for run in runs]

        def read() -> list[Status]:
            attempt = None if since is None else find_attempt(since)
            return [read_status(folder, max_restarts=max_restarts, attempt=attempt) for folder in folders]

        if watch:
            try:
                with left_to_python():
                    are_finished = watch_runs(read)
            except KeyboardInterrupt:  # watching has nothing to save and nothing to go on with
                raise typer.Exit(CTRL_C) from None
            raise typer.Exit(0 if are_finished else 1)
        statuses = read()
    if as_json:
        records = [state.record() for state in statuses]
        echo(json.dumps(records[0] if len(records) == 1 else records, indent=2))
    elif len(statuses) == 1:
        echo(describe_status(statuses[0]))
    else:
        print_runs(statuses)


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=complete_run)],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of {checkpoint, step, usable, why} on stdout.")
    ] = False,
) -> None:
    """Reads every byte of a run's checkpoints and shows which are whole. Exit code 1 if no checkpoint is."""
    with errors_without_torch():
        check_run_name(run)
        from dpokit.checkpoint.store import find_checkpoints
        from dpokit.rundir import RunDir

        checkpoints = find_checkpoints(RunDir(run), deep=True)
    usable = [checkpoint for checkpoint in checkpoints if checkpoint.resume_problem is None]
    if as_json:
        records = [
            {"checkpoint": c.path.name, "step": c.step, "usable": c.resume_problem is None, "why": c.resume_problem}
            for c in checkpoints
        ]
        echo(json.dumps(records, indent=2))
    else:
        for checkpoint in checkpoints:
            alone = "" if checkpoint.resume_problem is None else f", but {checkpoint.resume_problem}"
            echo(f"{checkpoint.path.name}: {one_line(checkpoint.problem or f'whole{alone}')}")
        echo(
            f"a resume begins at step {usable[0].step}"
            if usable
            else f"{one_line(run)} holds no checkpoint that can be used"
        )
    raise typer.Exit(0 if usable else 1)
