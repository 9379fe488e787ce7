"""Verbs that show the results of a run: evaluate, report."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dpokit.run_names import check_run_name, check_run_or_model
from dpokit.terminal import echo, one_line
from dpokit.verbs.common import PASS_ON, complete_run, errors_without_torch

app = typer.Typer()


@app.command(context_settings=PASS_ON)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run folder, a model's folder, or a Hub id.", autocompletion=complete_run
        ),
    ],
    base: Annotated[str | None, typer.Option(help="The model to compare with; by default the run's base.")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out pairs: Hub id, file or folder; else the run's.")] = None,
    split: Annotated[str | None, typer.Option(help="The split of --data.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N pairs.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="Number of held-out prompts that both models answer.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.7,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible server with the judge: https://.../v1.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The model that compares the answers.")] = "",
    judge_key: Annotated[str, typer.Option(help="The environment variable with the judge's key.")] = "OPENAI_API_KEY",
    judge_limit: Annotated[int, typer.Option(min=1, help="Most answers to compare, by two requests each.")] = 100,
    judge_max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply, thoughts included.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record on stdout.")] = False,
) -> None:
    """Compares base and tuned model on held-out pairs, with intervals, and their answers; adds a folder to RUN/eval.

    Every other flag is a training flag that overrides the run's: --beta 0.3, --max_length 512. On several devices:
    accelerate launch -m dpokit.cli evaluate RUN.
    """
    with errors_without_torch():
        check_run_or_model(model)
        check_run_or_model(base)
    with redirect_stdout(sys.stderr):
        from dpokit.distributed.processes import is_main_process
        from dpokit.evaluate.answers import Sampling
        from dpokit.evaluate.command import Judge, run_evaluation
        from dpokit.evaluate.table import print_evaluation
        from dpokit.story import user_errors

        with user_errors():
            record = run_evaluation(
                model,
                base=base,
                data=data,
                split=split,
                limit=limit,
                argv=context.args,
                answers=answers,
                sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature),
                judge=Judge(judge, judge_model, judge_key, judge_limit, judge_max_tokens) if judge else None,
            )
    if not is_main_process():
        return
    if as_json:
        echo(json.dumps(record, indent=2))
    else:
        print_evaluation(record)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [RUN ...]", help="Run folders; several are compared.", autocompletion=complete_run),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="By default RUN/report/report.html; ./report.html for several runs."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The metric that sorts the runs; by default the lowest eval_loss."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The folder in RUN/eval; by default the largest of the run's own pairs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print {report, pngs, verdict} on stdout.")] = False,
) -> None:
    """Writes curves, evaluations, samples, data and settings to one HTML file, and each figure to a PNG beside it."""
    with errors_without_torch():
        for run in runs:
            check_run_name(run)
        from dpokit.report.page import write_report

        written = write_report(runs, output=output, metric=metric, evaluation=evaluation)
    echo(json.dumps(written.record(), indent=2) if as_json else one_line(written.report))
