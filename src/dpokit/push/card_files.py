"""The card as it is sent: with its pictures, its licence, and only beside what it tells of. No torch."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dpokit.card.front_matter import BLOCK, LICENCE_FILE
from dpokit.errors import HubError
from dpokit.rundir import CARD_MARK, RunDir

PICTURES = re.compile(r"\bfigures/([\w.-]+\.png)\b")
NAME = re.compile(r'^(?:base, )?name = (?:".*", )?"(.+)"$', re.M)  # in the code of a card of ours


def find_card_files(run: RunDir, *, is_adapter: bool, repo_id: str | None) -> Iterator[tuple[str, Path]]:
    """(path in the repository, file) of the card, the pictures it shows, and the licence that lies beside it.

    Args:
        run: its folder.
        is_adapter: what is sent is an adapter alone.
        repo_id: where it goes; None where a card may tell of any repository.

    Raises: HubError: one of them is missing, or a card of ours tells of something else.
    """
    if not run.card.is_file():
        raise HubError(
            f"{run.path} has no README.md", expected="a model card", do="--license apache-2.0, or another, writes it"
        )
    text = run.card.read_bytes().decode(errors="replace")
    head = _read_head(text)
    if CARD_MARK in text:
        _check_card(run, text, head, is_adapter=is_adapter, repo_id=repo_id)
    yield "README.md", run.card
    beside = {f"figures/{name}": run.figures / name for name in sorted(set(PICTURES.findall(text)))}
    link = head.get("license_link")
    if isinstance(link, str) and re.fullmatch(LICENCE_FILE, link):
        beside[link] = run.path / link
    for name, source in beside.items():
        if not source.is_file():
            raise HubError(
                f"{run.card} names {name}, and there is no {source}",
                expected="it",
                do="put it there" if name == link else "write the card anew",
            )
        yield name, source


def _read_head(text: str) -> dict[str, Any]:
    """The front matter; {} where there is none, or none that can be read: the Hub says so of a card of others."""
    block = BLOCK.match(text)
    try:
        head = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:
        head = None
    return head if isinstance(head, dict) else {}


def _check_card(run: RunDir, text: str, head: dict[str, Any], *, is_adapter: bool, repo_id: str | None) -> None:
    told_adapter, told = head.get("library_name") == "peft", NAME.search(text)
    name = told[1] if told else repo_id
    if told_adapter != is_adapter or repo_id not in (None, name):
        words = {True: "an adapter", False: "a whole model"}
        raise HubError(
            f"{run.card} tells of {words[told_adapter]} in {name}; {words[is_adapter]} would go to {repo_id}",
            expected="a card of what is sent, by the name it gets",
            do=f"--license NAME writes it anew; dpokit card {run.path} --repo-id {repo_id} has more to tell it",
        )
