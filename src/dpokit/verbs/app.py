"""All verbs of `dpokit`, as one command."""

import typer

from dpokit.verbs import evaluation as proof
from dpokit.verbs import publish as release
from dpokit.verbs import runs, search, talk

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Training flags have underscores: a verb's own options are known by either spelling.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    help="Preference training (DPO) on one to many GPUs. A verb's own --help says more.",
)
for room in (runs, proof, release, search, talk):  # the order in which --help lists them
    app.add_typer(room.app)
