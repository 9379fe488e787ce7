"""Links in a run folder: their targets are not read, sent, overwritten or deleted."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import add_evaluation, make_run, make_steps

from dpokit.atomic_files import new_folder, write_whole
from dpokit.card.card import write_card
from dpokit.checkpoint.store import (
    describe_files,
    discard,
    find_part,
    list_files,
    restore_replaced,
    retire,
    seal,
    sweep_parts,
)
from dpokit.errors import RunFolderError
from dpokit.merge.merge import merge_run
from dpokit.model.base_and_tuned import find_run
from dpokit.push.bundle import build_bundle
from dpokit.report.page import write_report
from dpokit.rundir import MetricsFile, RunDir

FILES = (
    *("run.json", "metrics.jsonl", "data.json", "README.md", "votes.jsonl"),
    *("model/config.json", "model/tokenizer.json", "model/model.safetensors", "figures/loss.png"),
    *("eval/pairs.json", "eval/answers.jsonl", "eval/later/pairs.json", "report/report.html"),
)
FOLDERS = ("model", "adapter", "merged", "eval", "report", "figures")
VERBS: dict[str, Callable[[RunDir], object]] = {
    "push": build_bundle,
    "report": lambda run: write_report([run.path]),
    "card": lambda run: write_card(run, license="mit"),
    "merge": merge_run,
    "evaluate, chat, serve": lambda run: find_run(str(run.path)),
    "train": RunDir.make,
}


@pytest.fixture
def private(tmp_path) -> Path:
    """A folder with a private key, which must be neither read nor changed."""
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir(parents=True)
    (folder / "id_ed25519").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END OPENSSH PRIVATE KEY-----\n")
    return folder


@pytest.fixture
def run(tiny_gpt2, tmp_path) -> RunDir:
    made = RunDir(make_run(tmp_path / "run", make_steps(5, every=1)))
    add_evaluation(made.path)
    shutil.copytree(tiny_gpt2, made.model)
    made.card.write_text("---\nlicense: mit\n---\n\n# Tiny\n")
    return made


def check_untouched(private: Path) -> None:
    assert [path.name for path in private.iterdir()] == ["id_ed25519"]
    assert (private / "id_ed25519").read_text().startswith("-----BEGIN OPENSSH")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_linked_out_of_the_folder_stops_every_verb(name, verb, run, private):
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if path.exists() else b"{}"
    target = private / "id_ed25519" if name != "run.json" else private.parent / "run.json"
    if name == "run.json":
        target.write_bytes(content)  # an unreadable run.json would stop the verb for another reason
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    with pytest.raises(RunFolderError, match=r"is a link to .*, outside of the run folder"):
        VERBS[verb](run)
    check_untouched(private)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_instead_of_a_file_stops_every_verb_at_once(name, verb, run):
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(RunFolderError, match=r"is neither a file nor a folder|it is not a file"):
        VERBS[verb](run)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_linked_out_of_the_run_stops_every_verb(name, verb, run, private):
    path = run.path / name
    if path.exists():
        path.rename(run.path / "aside")
    path.symlink_to(private)
    with pytest.raises(RunFolderError, match=r"is a link to .*, outside of the run folder"):
        VERBS[verb](run)
    check_untouched(private)


def test_a_licence_that_is_a_link_is_not_sent(run, private):
    run.card.write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n\n# Tiny\n")
    (run.path / "LICENSE").symlink_to(private / "id_ed25519")
    with pytest.raises(RunFolderError, match="LICENSE is a link"):
        build_bundle(run)


def test_a_copy_of_a_private_key_is_not_sent(run, private):
    (run.model / "chat_template.jinja").write_text((private / "id_ed25519").read_text())
    with pytest.raises(Exception, match="holds a private key"):
        build_bundle(run)


def test_a_link_within_the_folder_is_allowed(run):
    (run.path / "kept").mkdir()
    run.data_json.rename(run.path / "kept" / "data.json")
    run.data_json.symlink_to("kept/data.json")
    for verb in ("push", "report", "evaluate, chat, serve", "train"):
        VERBS[verb](run)


# -- deleting and writing ----------------------------------------------------------------------------------------------


def seal_step(run: RunDir, step: int) -> Path:
    part = find_part(run, step)
    part.mkdir()
    (part / "weights").write_text("w")
    facts = {"world_size": 1, "placement": "one device", "settings": {}}
    return seal(run, step, describe_files(part, list_files(part)), facts)


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A whole checkpoint of another run."""
    run = RunDir(tmp_path / "other")
    run.make()
    run.take_possession(0)
    return seal_step(run, 1)


@pytest.fixture
def own(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "own")
    run.make()
    run.take_possession(0)
    return run


def retire_it(run: RunDir, foreign: Path) -> None:
    (run.path / "checkpoint-1").symlink_to(foreign)
    for step in (2, 3):
        seal_step(run, step)
    retire(run, limit=1, best=None)


def replace_it(run: RunDir, foreign: Path) -> None:
    (run.path / "checkpoint-1").symlink_to(foreign)
    seal_step(run, 1)


def overwrite_it(run: RunDir, foreign: Path) -> None:
    (run.path / "checkpoint-1").symlink_to(foreign)
    run.clear()


def sweep_it(run: RunDir, foreign: Path) -> None:
    (run.path / ".checkpoint-1.x.part").symlink_to(foreign)
    sweep_parts(run)


def restore_it(run: RunDir, foreign: Path) -> None:
    (run.path / "checkpoint-1").mkdir()
    (run.path / ".checkpoint-1.replaced").symlink_to(foreign)
    restore_replaced(run)


def renew_a_folder(run: RunDir, foreign: Path) -> None:
    run.merged.symlink_to(foreign)
    (run.path / ".merged.part").symlink_to(foreign)
    with new_folder(run.merged) as part:
        (part / "weights").write_text("new")


DELETIONS = (retire_it, replace_it, overwrite_it, sweep_it, restore_it, renew_a_folder)


@pytest.mark.parametrize("delete", [*DELETIONS, lambda run, foreign: discard(link(run, foreign))])
def test_deleting_stops_at_a_link(delete, own, foreign):
    delete(own, foreign)
    assert sorted(path.name for path in foreign.iterdir()) == ["manifest.json", "weights"]
    assert (foreign / "weights").read_text() == "w"


def link(run: RunDir, foreign: Path) -> Path:
    path = run.path / "checkpoint-7"
    path.symlink_to(foreign)
    return path


def test_writing_replaces_a_link_and_leaves_its_target(tmp_path, private):
    file = tmp_path / "run.json"
    file.symlink_to(private / "id_ed25519")
    write_whole(file, b"new")
    assert not file.is_symlink()
    check_untouched(private)


def test_metrics_are_not_written_through_a_link(own, private):
    own.metrics_jsonl.symlink_to(private / "id_ed25519")
    MetricsFile(own, 0).log(1, 0.1, {"loss": 1.0})
    assert not own.metrics_jsonl.is_symlink()
    check_untouched(private)
