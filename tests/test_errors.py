"""The tree of errors: each message has three parts and survives pickling to another rank."""

import errno
import pickle

import pytest
import torch
from safetensors.torch import save_file

from dpokit.errors import (
    DataError,
    DpokitError,
    GateError,
    HubError,
    JudgeError,
    MachineError,
    ModelError,
    ReleaseError,
    RunFolderError,
    SettingsError,
    find_disk_trouble,
    is_missing_file,
)

KINDS = [DataError, GateError, HubError, JudgeError, MachineError, ModelError, ReleaseError]
KINDS += [RunFolderError, SettingsError]


def test_no_error_of_the_tree_is_left_out_here():
    assert set(DpokitError.__subclasses__()) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_what_was_seen_expected_and_to_do(kind):
    text = str(kind("a hole", expected="a row", do="fill it"))
    assert text.splitlines()[0] == "a hole"
    assert "a row" in text
    assert "fill it" in text


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_is_sent_to_another_rank_arrives_whole(kind):
    error = kind("a hole", expected="a row", do="fill it")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert (arrived.seen, arrived.expected, arrived.do) == ("a hole", "a row", "fill it")
    assert str(arrived) == str(error)


@pytest.mark.parametrize(("number", "seen"), [(errno.ENOSPC, "no space"), (errno.EROFS, "read-only")])
def test_disk_trouble_is_found_behind_the_error_of_a_library(number, seen):
    try:
        try:
            raise OSError(number, "the message of the system", "/scratch/run")
        except OSError as cause:
            raise RuntimeError("could not save") from cause
    except RuntimeError as error:
        trouble = find_disk_trouble(error)
    assert trouble is not None
    assert seen in trouble.seen
    assert "/scratch/run" in trouble.seen
    assert "--output_dir" in trouble.do


def test_other_errors_are_no_disk_trouble():
    assert find_disk_trouble(ValueError("beta")) is None
    assert find_disk_trouble(OSError(errno.ECONNREFUSED, "refused")) is None


MISSING_FOLDER_WRITERS = {
    "python": lambda path: path.write_text("text"),
    "torch": lambda path: torch.save({}, path),
    "safetensors": lambda path: save_file({"weight": torch.zeros(1)}, path),
}


@pytest.mark.parametrize("writer", MISSING_FOLDER_WRITERS)
def test_a_missing_folder_is_known_by_the_error_of_each_writer(writer, tmp_path):
    with pytest.raises(Exception) as caught:
        MISSING_FOLDER_WRITERS[writer](tmp_path / "gone" / "file")
    assert is_missing_file(caught.value)
    assert "cannot be created" in find_disk_trouble(caught.value).seen
