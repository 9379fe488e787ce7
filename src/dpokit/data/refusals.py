"""Errors for rows that no layout fits, and for columns that they do not have. No torch."""

import json
import shlex
from collections.abc import Mapping, Sequence

from dpokit.data.formats import COLUMNS, FORMATS, PARTS, Format, Row
from dpokit.data.messages import describe_value, is_turns
from dpokit.data.published import Published
from dpokit.data.unused_columns import find_value, split_path
from dpokit.errors import DataError


def check_columns(columns: Mapping[str, str], rows: Sequence[Row], source: str) -> None:
    """Raises DataError for a column of `--columns` that no sampled row has."""
    names = dict.fromkeys(name for row in rows for name in row)
    paths = [(name, part) for name, path in columns.items() for part in split_path(path, names)]
    for name, path in paths:
        if path in names or any(find_value(row, path) is not None for row in rows):
            continue
        values = [row[path.partition(".")[0]] for row in rows if path.partition(".")[0] in row]
        keys = dict.fromkeys(
            f"{path.partition('.')[0]}.{key}" for value in values if isinstance(value, Mapping) for key in value
        )
        raise DataError(
            f"--columns {name}={path}: {source} has no column {path}",
            expected="one of " + ", ".join(keys or names),
            do=f"correct --columns {name}=...",
        )


def refuse_labels(layout: Published, labels: Sequence[str], source: str) -> DataError:
    """Returns the error for columns that may rank the answers otherwise than the layout does."""
    names = ",".join(labels)
    return DataError(
        f"{source} has the columns of {layout.name}, and beside them {names}, which may call another answer better",
        expected=f"{layout.looks}; without a further label, rank or score",
        do=f"if {names} says nothing else, --ignore_columns {shlex.quote(names)}; or write the better answer as chosen "
        "and the worse one as rejected",
    )


def refuse_rows(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    source: str,
    form: str | None,
    layouts: Sequence[Format | Published],
) -> DataError:
    """Returns the error for rows of no known layout; it names the first value that is neither text nor messages."""
    present = {name.lower(): name for row in rows for name in row}
    names = {part: next((present[name] for name in COLUMNS[part] if name in present), part) for part in PARTS}
    paths = names | {part: columns[part] for part in PARTS if part in columns}
    values = ((number, path, row[path]) for number, row in enumerate(rows, 1) for path in paths.values() if path in row)
    wrong = next((v for v in values if not isinstance(v[2], str) and not is_turns(v[2])), None)
    shown = json.dumps(dict(rows[0]), default=str)[:400] if rows else "no row at all"
    if wrong is not None and {paths["chosen"], paths["rejected"]} <= {*present.values()}:
        return DataError(
            f"{source} holds preference pairs of no known form: in row {wrong[0]}, {wrong[1]} is "
            f"{describe_value(wrong[2])}; its first row is {shown}",
            expected="texts or messages in more than half of the first rows",
            do="write texts or messages, leave out rows without an answer, or name other columns: --columns "
            f"{'chosen' if wrong[1] not in paths else wrong[1]}=NAME",
        )
    if form is not None:
        return DataError(
            f"--format {form} does not fit {source}; its first row is {shown}",
            expected="".join(f"{layout.name}: {layout.looks}" for layout in layouts if layout.flag == form),
            do="leave --format out, or name the columns: --columns prompt=NAME,chosen=NAME,rejected=NAME",
        )
    others = [name for name in present.values() if any(isinstance(row.get(name), str) for row in rows)]
    others = [name for name in others if name not in paths.values()]
    if paths["prompt"] not in present.values() and {paths["chosen"], paths["rejected"]} <= {*present.values()}:
        prompt = "|".join(sorted(others)) or "NAME"
        return DataError(
            f"{source} has {paths['chosen']} and {paths['rejected']} as texts, but no prompt; its first row is {shown}",
            expected='a column with the prompt, or HH transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:" turns',
            do=f"name the prompt's column: --columns prompt={prompt}; or, if both texts begin with the prompt: "
            "--format implicit_plain",
        )
    lists = [name for name, value in rows[0].items() if isinstance(value, (list, tuple))] if len(rows) == 1 else []
    inner = [name for name in lists if rows[0][name] and all(isinstance(part, Mapping) for part in rows[0][name])]
    if inner and not is_turns(rows[0][inner[0]]):
        return DataError(
            f"{source} has one row, whose {inner[0]} is a list of {len(rows[0][inner[0]]):,} objects",
            expected="one row for each pair: a list of objects, alone or under the only key of the file",
            do=f"write the objects of {inner[0]} as the rows of a file",
        )
    answers = [present[name] for name in ("completion", "response", "output", "answer") if name in present]
    if answers and "label" in present:
        return DataError(
            f"{source} has unpaired labels: one answer ({answers[0]}) and its label; its first row is {shown}",
            expected="two answers to one prompt in each row",
            do="write a good and a bad answer to the same prompt into each row, as prompt, chosen and rejected",
        )
    return DataError(
        f"{source} holds preference pairs of no known form; its first row is {shown}",
        expected="one of\n"
        + "\n".join(f"    {form.name}: {form.looks}" for form in FORMATS[1:])
        + f"\n    or {FORMATS[0].name} (`dpokit serve` writes them), or one of the layouts "
        + ", ".join(form.name for form in layouts if isinstance(form, Published)),
        do="name the columns: --columns prompt=NAME,chosen=NAME,rejected=NAME; or build them in one of these forms "
        "(prompt, chosen, rejected is the simplest)",
    )
