"""The model card, its pictures and its licence as files to send, checked against the weights. No torch."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpokit.card.front_matter import LICENCE_FILE, read_front_matter
from dpokit.errors import HubError
from dpokit.rundir import CARD_MARK, RunDir

PICTURES = re.compile(r"\bfigures/([\w.-]+\.png)\b")
NAME = re.compile(r'^(?:base, )?name = (?:".*", )?"(.+)"$', re.M)  # in the code of a generated card


def find_card_files(run: RunDir, *, is_adapter: bool, repo_id: str | None) -> Iterator[tuple[str, Path]]:
    """Yields (path in the repository, file) of the card, its pictures, and the licence file that it links.

    Args:
        run: the run folder.
        is_adapter: whether only an adapter is sent.
        repo_id: the target repository; None skips the check that the card names it.

    Raises: HubError: a file is missing, or a generated card describes other weights or another repository.
    """
    if not run.card.is_file():
        raise HubError(
            f"{run.path} has no README.md",
            expected="a model card",
            do="--license apache-2.0 (or another licence) writes it",
        )
    text = run.card.read_bytes().decode(errors="replace")
    head = read_front_matter(text)
    if CARD_MARK in text:
        _check_card(run, text, head, is_adapter=is_adapter, repo_id=repo_id)
    yield "README.md", run.card
    linked = {f"figures/{name}": run.figures / name for name in sorted(set(PICTURES.findall(text)))}
    link = head.get("license_link")
    if isinstance(link, str) and re.fullmatch(LICENCE_FILE, link):
        linked[link] = run.path / link
    for name, source in linked.items():
        if not source.is_file():
            raise HubError(
                f"{run.card} names {name}, but there is no {source}",
                expected="every file that the card names",
                do="add the file" if name == link else "write the card again",
            )
        yield name, source


def _check_card(run: RunDir, text: str, head: dict[str, Any], *, is_adapter: bool, repo_id: str | None) -> None:
    """Raises HubError if a generated card describes other weights, or names another repository."""
    describes_adapter, match = head.get("library_name") == "peft", NAME.search(text)
    name = match[1] if match else repo_id
    if describes_adapter != is_adapter or repo_id not in (None, name):
        kinds = {True: "an adapter", False: "a whole model"}
        raise HubError(
            f"{run.card} describes {kinds[describes_adapter]} in {name}, but {kinds[is_adapter]} would go to {repo_id}",
            expected="a card that describes these weights in this repository",
            do=f"--license NAME writes it again; dpokit card {run.path} --repo-id {repo_id} has more options",
        )
