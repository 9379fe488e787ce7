"""The HTML parts of the page; every value in them is escaped. No torch."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from dpokit.errors import DpokitError
from dpokit.report.page import list_facts
from dpokit.report.read import Run, load_run
from dpokit.report.tables import Table, list_pairs
from dpokit.report.verdict import find_evaluation_verdict
from dpokit.report.votes import count_votes
from dpokit.rundir import RunDir
from dpokit.serve.question_queue import Exchange

PLACES = ("Left", "Right")
BLIND_NAMES = ("Answer A", "Answer B")


def name_side(side: str, names: Mapping[str, str], *, short: int = 60) -> str:
    """`tuned: runs/mine/model`; a name longer than `short` loses its beginning."""
    name = names.get(side, "")
    return f"{side}: {name if len(name) <= short else '...' + name[3 - short :]}"


def show_past(messages: Sequence[Mapping[str, str]]) -> str:
    """The conversation so far; empty without messages."""
    turns = Markup("").join(
        Markup('<div class="turn {}"><b>{}</b><p>{}</p></div>').format(
            "you" if message["role"] == "user" else "model",
            {"user": "You", "assistant": "Model"}.get(message["role"], message["role"]),
            message["content"],
        )
        for message in messages
    )
    return str(Markup('<div class="past" role="log" aria-label="Conversation">{}</div>').format(turns)) if turns else ""


def show_note(exchange: Exchange, place: int) -> str:
    """The line under an answer: its length, how it ended, and its implicit reward unless names are hidden."""
    job = exchange.job
    if place >= len(job.order):
        return ""
    side = job.order[place]
    reply = job.replies.get(side)
    if reply is None:
        return _line("waiting for the other answer" if job.state == "answering" else "")
    parts = [f"{reply.tokens:,} tokens"] if reply.tokens else []
    if job.state == "done":
        parts += ["ended by the model" if reply.ended else "cut at the length limit"]
    elif job.state == "stopped":
        parts += ["stopped"]
    if job.rewards is not None and not exchange.hides_names:
        parts += [f"implicit reward {job.rewards[side]:+.3f}"]
    return _line(", ".join(parts))


def _line(text: str) -> str:
    return str(Markup('<p class="note">{}</p>').format(text))


def show_status(text: str, kind: str = "") -> str:
    """The status line, which a screen reader reads out when it changes."""
    return str(Markup('<p class="status {}" role="status" aria-live="polite">{}</p>').format(kind, text))


def show_votes(votes: Sequence[Mapping[str, object]]) -> str:
    """The win rate so far, with its interval."""
    count = count_votes(votes)
    if not count.votes:
        return _line("No votes yet.")
    rate = count.win_rate
    counts_text = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in count.counts.items())
    win_rate_text = "no answer was preferred yet"
    if rate is not None:
        win_rate_text = f"tuned wins {rate['value']:.0%} (95 % interval {rate['low']:.0%} to {rate['high']:.0%})"
    return str(
        Markup('<p class="votes"><b>{}</b> votes: {}, of them {}</p>').format(win_rate_text, count.votes, counts_text)
    )


def show_facts(run: RunDir | None, names: Mapping[str, str]) -> str:
    """The models' names, and the facts, first table and verdict of the run."""
    facts: list[tuple[str, str]] = list(names.items())
    tables: list[Table] = []
    verdict = ""
    if run is not None:
        try:
            loaded: Run = load_run(run.path, name=run.path.name)
        except DpokitError as error:
            facts.append(("run", error.seen))
        else:
            facts += list_facts(loaded)
            tables = list_pairs(loaded)[:1]
            verdict = find_evaluation_verdict(loaded) or ""
    rows = Markup("").join(Markup("<dt>{}</dt><dd>{}</dd>").format(*fact) for fact in facts)
    tables_markup = Markup("").join(_table(table) for table in tables)
    return str(Markup('<p>{}</p><dl class="facts">{}</dl>{}').format(verdict, rows, tables_markup))


def _table(table: Table) -> Markup:
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in table.head)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row))
        for row in table.rows
    )
    return Markup(
        '<h3>{}</h3><p class="note">{}</p><div class="scroll" tabindex="0" role="region" aria-label="{}">'
        "<table><tr>{}</tr>{}</table></div>"
    ).format(table.title, table.note, table.title, head, body)
