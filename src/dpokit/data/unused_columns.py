"""The columns that a layout does not use; an error if one looks like content, by its name and its first values."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpokit.data.formats import Row
from dpokit.data.messages import is_turns
from dpokit.errors import DataError

# What content a column has by the nouns of its name, as the key of --columns; None if no layout can use it.
CONTENT = {
    **dict.fromkeys(("system", "persona"), "system"),
    **dict.fromkeys(("prompt", "question", "query", "instruction", "input", "context", "history"), "prompt"),
    **dict.fromkeys(("message", "conversation", "dialog", "dialogue", "chat", "post", "passage"), "prompt"),
    **dict.fromkeys(("tool", "function"), "tools"),
    **dict.fromkeys(("image", "picture", "photo", "audio", "video", "document", "attachment")),
}
# The nouns of ids, scores, origins and remarks: no pair depends on them.
METADATA = {
    *("id", "uid", "uuid", "guid", "idx", "index", "key", "hash", "md5", "sha", "sha256", "fingerprint"),
    *("score", "rating", "rank", "reward", "margin", "label", "preference", "vote", "win", "winner", "strength"),
    *("confidence", "probability", "prob", "logprob", "weight", "quality", "difficulty", "status", "state"),
    *("source", "origin", "dataset", "split", "subset", "config", "model", "generator", "policy", "provider"),
    *("domain", "category", "topic", "tag", "type", "kind", "task", "lang", "language", "locale", "subreddit"),
    *("meta", "metadata", "info", "date", "time", "timestamp", "created", "updated", "version", "url", "link"),
    *("license", "licence", "author", "user", "username", "annotator", "worker", "labeler", "judge"),
    *("count", "num", "number", "length", "len", "size", "token", "word", "turn", "order", "round", "seed"),
    *("annotation", "critique", "comment", "feedback", "rationale", "explanation", "judgement", "judgment"),
}
# Nouns of columns that may say which answer is better.
LABELS = {
    *("label", "score", "rating", "rank", "ranking", "reward", "preference", "preferred", "vote", "winner", "best"),
    *("better", "choice", "strength"),
}
MOST_LABEL_WORDS = 5  # a longer text is content rather than a label
MOST_LABEL_LETTERS = 60


def find_unused_columns(
    layout: str, used: Mapping[str, str], rows: Sequence[Row], source: str, ignored: Collection[str]
) -> tuple[str, ...]:
    """Returns the columns, and the keys beside a dotted path, that a layout does not use.

    Args:
        layout: the layout's name.
        used: the columns that the layout uses, or dotted paths in them, by the names that the format has for them.
        rows: the first rows.
        source: the dataset's name, for errors.
        ignored: the value of `--ignore_columns`.

    Raises: DataError if one of them looks like content.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    paths = [part for path in used.values() for part in split_path(path, names)]
    objects = {path.rpartition(".")[0] for path in paths if path not in names}
    used_names = {*paths, *(path.partition(".")[0] for path in objects), *ignored}
    keys = {
        f"{path}.{key}": None
        for path in sorted(objects)
        for value in (find_value(row, path) for row in rows)
        if isinstance(value, Mapping)
        for key in value
    }
    unused = tuple(name for name in {**names, **keys} if name not in used_names and name not in objects)
    parts = list(used.values())
    content = []
    for name in unused:
        repeats = all(_repeats(find_value(row, name), [find_value(row, path) for path in parts]) for row in rows)
        values = [find_value(row, name) for row in rows]
        if not repeats and _looks_like_content(name, values):
            content.append(name)
    if not content:
        return unused
    texts = [name for name in content if all(isinstance(find_value(row, name), str | None) for row in rows)]
    columns = _suggest_columns(content, used, texts)
    use = ",".join(f"{part}={name}" for part, name in columns.items())
    named = [part for path in columns.values() for part in split_path(path, names)]
    others = ",".join(name for name in content if name not in named)
    use = f"--columns {shlex.quote(use)}" + (f" --ignore_columns {shlex.quote(others)}" if others else "")
    ignore = f"--ignore_columns {shlex.quote(','.join(content))}"
    raise DataError(
        f"{source} has columns that look like content and that the layout {layout!r} does not use: "
        + ", ".join(content),
        expected="columns that the layout uses, or that hold only ids, scores and other metadata",
        do=f"to use them: {use}; to leave them out: {ignore}" if columns else f"to leave them out: {ignore}",
    )


def _repeats(value: Any, parts: Sequence[Any]) -> bool:
    """Whether a value is one of the pair's own values, or a list of them."""
    return value in parts or (isinstance(value, (list, tuple)) and len(value) > 0 and all(v in parts for v in value))


def find_labels(names: Sequence[str]) -> list[str]:
    """Returns the columns that may say which answer is better, by their names."""
    return [name for name in names if any(noun.removesuffix("s") in LABELS for noun in _split_name(name))]


def split_path(path: str, names: Collection[str]) -> list[str]:
    """Returns the paths that plus signs join, as `instruction+input`; a column of the same name is one path."""
    return [path] if path in names else path.split("+")


def find_value(row: Row, path: str) -> Any:
    """Returns the value of a column, or of a dotted path in one; None if it is missing.

    Of several paths with plus signs between them, it returns the texts, with an empty line between two of them.
    """
    if path in row:
        return row[path]
    if "+" in path:
        values = [find_value(row, part) for part in path.split("+")]
        if all(value is None or isinstance(value, str) for value in values):
            return "\n\n".join(value for value in values if value and value.strip())
        return values
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _looks_like_content(name: str, values: Sequence[Any]) -> bool:
    """Whether a column looks like content: a part of the conversation rather than an id, a score or other metadata.

    Numbers are metadata. Of other values, the last noun of the name decides (a `prompt_id` is an id), then any noun,
    then the values: messages, or a text of several words.

    Args:
        name: the column.
        values: its values in the first rows.
    """
    nouns = _split_name(name)
    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {int, float, bool}:
        return False
    if nouns and nouns[-1] in CONTENT:
        return True
    is_media = any(CONTENT.get(noun, "") is None for noun in nouns)  # the path or the URL of an image is content, too
    if METADATA.intersection(nouns) and not (is_media and nouns[-1] in ("url", "link")):
        return False
    return any(_has_text(value, any_text=is_media) for value in values)


def _suggest_columns(names: Sequence[str], used: Mapping[str, str], texts: Collection[str]) -> dict[str, str]:
    """Returns the columns that `--columns` could name, by the name that it would give to each; texts can be joined."""
    columns: dict[str, str] = {}
    for name in names:
        target = next((CONTENT[noun] for noun in reversed(_split_name(name)) if noun in CONTENT), None)
        if target is not None and target not in used:
            columns.setdefault(target, name)
        elif target == "prompt" and name in texts:
            columns["prompt"] = f"{columns.get('prompt', used['prompt'])}+{name}"
    return columns


def _split_name(name: str) -> list[str]:
    """Returns the nouns of a column's name in lower case, in the singular if CONTENT or METADATA has it."""
    nouns = re.findall(r"[a-z]+|\d+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    singular = [noun.removesuffix("s") for noun in nouns]
    return [s if s in CONTENT or s in METADATA else noun for noun, s in zip(nouns, singular, strict=True)]


def _has_text(value: Any, *, any_text: bool) -> bool:
    """Whether a value holds messages, or a text that is longer than a label."""
    if isinstance(value, str):
        return bool(value.strip()) and (
            any_text or len(value.split()) > MOST_LABEL_WORDS or len(value) > MOST_LABEL_LETTERS
        )
    if isinstance(value, Mapping):
        return is_turns(value) or any(_has_text(part, any_text=any_text) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_text(part, any_text=any_text) for part in value)
    return False
