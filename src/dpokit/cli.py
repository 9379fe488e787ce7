"""`dpokit VERB`: one verb a room. Progress goes to stderr, the answer to stdout; `--help` needs no torch."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Preference training (DPO) on one to many GPUs. A verb's own --help says more.",
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def _verbs() -> None:
    """Makes every function below a verb of its own, also where there is only one."""


@app.command(context_settings=PASS_ON)
def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="recipes/NAME.py, or NAME. It comes first.")],
    gpus: Annotated[
        str | None, typer.Option(metavar="NxGIB", help="Plan for these GPUs: 8x80. Without it, for this machine.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Train the longest rows for two steps here, and compare the peak.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Memory, steps and tokens of a run before anything is loaded; which placement fits, and its command.

    Every other flag is a training flag and goes over the recipe's own: dpokit plan recipes/dpo_qlora.py --lora_r 32.
    """
    with redirect_stdout(sys.stderr):  # what libraries print is no answer
        from dpokit.screen import quiet_dependencies
        from dpokit.story import user_errors

        quiet_dependencies()
        from dpokit.plan.asked import load_asked
        from dpokit.plan.check import check_plan
        from dpokit.plan.plan import build_plan
        from dpokit.plan.table import print_plan

        with user_errors():
            made = build_plan(load_asked(recipe, context.args, gpus))
            checked = check_plan(made) if check else None
    if as_json:
        typer.echo(json.dumps(made.record() | {"check": checked}, indent=2))
    else:
        print_plan(made, checked)


@app.command(context_settings=PASS_ON)
def prepare(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="recipes/NAME.py, or NAME. It comes first.")],
    as_json: Annotated[bool, typer.Option("--json", help="What data.json will hold, on stdout.")] = False,
) -> None:
    """Tokens and reference log-probs of a run, computed now: the job that follows finds them in the caches.

    Every other flag is a training flag; give those of the run: dpokit prepare recipes/dpo_gpt2.py --max_length 512.
    """
    with redirect_stdout(sys.stderr):
        from dpokit.plan.asked import find_recipe, load_defaults
        from dpokit.story import prepare as prepare_run
        from dpokit.story import user_errors

        with user_errors():
            path = find_recipe(recipe)
            record = prepare_run(str(path), load_defaults(path), context.args)
    if as_json:
        typer.echo(json.dumps(record, indent=2))


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
