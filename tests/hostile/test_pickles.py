"""Untrusted folders of weights: every pickle that does more than hold tensors is found, and none of its code runs."""

import io
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from payloads import ARCHIVES, PICKLES, archive, hostile
from torch.distributed import checkpoint as dcp

from dpokit.checkpoint import pickles
from dpokit.checkpoint.pickles import check_pickles, find_pickle_problem, needs_trust
from dpokit.checkpoint.store import check_origin, describe_files, find_checkpoints, find_part, list_files, seal
from dpokit.errors import RunFolderError
from dpokit.rundir import RunDir


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that a payload would create if it ran."""
    return tmp_path / "it-ran"


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "weights"
    made.mkdir()
    return made


@pytest.fixture
def shards(folder) -> Path:
    """A distributed checkpoint of torch: tensors, and a value that torch stores as a pickle."""
    dcp.save({"weight": torch.ones(4), "step": 3}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    return folder / "optimizer_0"


@pytest.mark.parametrize("payload", PICKLES)
def test_a_hostile_pickle_in_an_archive_is_found(payload, folder, marker):
    (folder / "optimizer.pt").write_bytes(archive(PICKLES[payload](marker)))
    assert find_pickle_problem(folder).startswith("optimizer.pt ")
    assert not marker.exists()


@pytest.mark.parametrize("payload", [name for name in PICKLES if name.startswith("os.system")])
def test_the_payloads_run_if_torch_loads_them(payload, marker):
    with suppress(Exception):
        torch.load(io.BytesIO(archive(PICKLES[payload](marker))), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("payload", ARCHIVES)
def test_an_archive_that_torch_does_not_write_is_found(payload, folder, marker):
    (folder / "scheduler.pt").write_bytes(ARCHIVES[payload](marker))
    assert find_pickle_problem(folder).startswith("scheduler.pt ")
    assert not marker.exists()


@pytest.mark.parametrize("payload", PICKLES)
def test_a_hostile_table_of_shards_is_found(payload, shards, marker):
    (shards / ".metadata").write_bytes(PICKLES[payload](marker))
    assert find_pickle_problem(shards.parent).startswith("optimizer_0/.metadata ")
    assert not marker.exists()


def test_a_hostile_value_within_a_shard_is_found(shards, marker):
    table = pickle.loads((shards / ".metadata").read_bytes())
    (place,) = (info for index, info in table.storage_data.items() if index.fqn == "step")
    file, content = shards / place.relative_path, archive(hostile(marker))
    place.offset, place.length = file.stat().st_size, len(content)
    with file.open("ab") as end:
        end.write(content)
    (shards / ".metadata").write_bytes(pickle.dumps(table))
    assert "posix.system" in find_pickle_problem(shards.parent)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../elsewhere.distcp", "/etc/passwd", "__0_0.pt", ""])
def test_a_shard_elsewhere_is_found(name, shards):
    table = pickle.loads((shards / ".metadata").read_bytes())
    for place in table.storage_data.values():
        place.relative_path = name
    (shards / ".metadata").write_bytes(pickle.dumps(table))
    assert "places an entry in" in find_pickle_problem(shards.parent)


@pytest.mark.parametrize("name", ["../other", "/tmp", "..", "", "a/b"])
def test_shards_of_deepspeed_lie_beside_the_file_that_names_them(name, folder):
    (folder / "latest").write_text(name)
    assert "which is no folder beside it" in find_pickle_problem(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/etc/hostname"), "is a link to a place outside"),
        (lambda path: path.symlink_to(path.parent.parent), "is a link to a place outside"),
        (os.mkfifo, "is neither a file nor a folder"),
    ],
    ids=["a link to a file", "a link to a folder", "a pipe"],
)
def test_an_odd_file_is_found_and_not_opened(make: Callable[[Path], None], message, folder):
    make(folder / "optimizer.pt")
    assert message in find_pickle_problem(folder)


@pytest.mark.parametrize(
    "value",
    [
        {"exp_avg": torch.ones(3, dtype=torch.bfloat16), "step": torch.tensor(3), "lr": 1e-5, "betas": (0.9, 0.95)},
        {"weight": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)), "names": {"a"}},
        {"bytes": torch.zeros(3, dtype=torch.uint8), "dtype": torch.float8_e4m3fn, "size": torch.Size([1, 2])},
    ],
    ids=["an optimizer", "a parameter", "odd types"],
)
def test_a_file_that_training_saves_passes_and_loads(value, folder):
    torch.save(value, folder / "optimizer.pt")
    assert find_pickle_problem(folder) is None
    assert torch.load(folder / "optimizer.pt", weights_only=True).keys() == value.keys()


def test_a_pickle_that_is_too_large_to_be_searched_is_refused(folder, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 100)
    torch.save({f"weight {number}": 1.0 for number in range(100)}, folder / "optimizer.pt")
    assert "holds a pickle of" in find_pickle_problem(folder)


def test_the_message_names_file_and_function(folder, marker):
    (folder / "optimizer.pt").write_bytes(archive(hostile(marker)))
    with pytest.raises(RunFolderError, match=r"optimizer.pt names posix.system, which no weights need"):
        check_pickles(folder)


# -- the origin of a checkpoint ----------------------------------------------------------------------------------------


def seal_shards(folder: Path) -> Path:
    run = RunDir(folder / "run")
    run.make()
    run.take_possession(0)
    part = find_part(run, 4)
    dcp.save({"weight": torch.ones(4)}, checkpoint_id=part / "pytorch_model_fsdp_0", no_dist=True)
    facts = {"world_size": 1, "placement": "FSDP2", "settings": {}}
    return seal(run, 4, describe_files(part, list_files(part)), facts)


def test_shards_of_this_user_need_no_flag(tmp_path):
    check_origin(seal_shards(tmp_path), trusted=False)


def unsign(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["signature"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def edit(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"step": 5}))


FOREIGN = {
    "no signature": unsign,
    "an edited manifest": edit,
    "no manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "a manifest that is none": lambda checkpoint: (checkpoint / "manifest.json").write_text("[1]"),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_unsigned_shards_are_refused_until_they_are_trusted(change, tmp_path):
    checkpoint = seal_shards(tmp_path)
    FOREIGN[change](checkpoint)
    with pytest.raises(RunFolderError, match="another user or machine wrote it") as refusal:
        check_origin(checkpoint, trusted=False)
    assert "--trust_checkpoint true" in refusal.value.do
    check_origin(checkpoint, trusted=True)


def test_shards_of_another_user_are_refused(tmp_path, monkeypatch):
    checkpoint = seal_shards(tmp_path)
    monkeypatch.setenv("DPOKIT_STATE", str(tmp_path / "another home"))
    with pytest.raises(RunFolderError, match="another user or machine wrote it"):
        check_origin(checkpoint, trusted=False)


def test_only_the_user_can_read_the_signing_key(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOKIT_STATE", str(tmp_path / "state"))
    seal_shards(tmp_path)
    assert (tmp_path / "state" / "key").stat().st_mode & 0o777 == 0o600


def test_weights_without_pickles_need_no_flag(folder):
    torch.save({}, folder / "optimizer.pt")  # torch loads it with weights_only
    assert not needs_trust(folder)


def test_a_checkpoint_with_a_hostile_pickle_is_not_whole(tmp_path, marker):
    run = RunDir(tmp_path / "run")
    run.make()
    run.take_possession(0)
    part = find_part(run, 4)
    part.mkdir()
    (part / "optimizer.pt").write_bytes(archive(hostile(marker)))
    seal(run, 4, describe_files(part, list_files(part)), {"world_size": 1, "placement": "one device", "settings": {}})
    (checkpoint,) = find_checkpoints(run, deep=True)
    assert checkpoint.problem == "it must not be loaded: optimizer.pt names posix.system, which no weights need"
    assert not marker.exists()
