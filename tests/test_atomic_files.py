"""Files and folders are written whole or not at all."""

import json

import pytest

from dpokit.atomic_files import new_folder, write_json


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "model") as part:
        (part / "half").write_text("")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_made_again_replaces_the_old_one_whole(tmp_path):
    for name in ("old", "new"):
        with new_folder(tmp_path / "model") as part:
            (part / name).write_text(name)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with new_folder(tmp_path / "model") as part:
        (part / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "model") as part:
        (part / "new").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_of_a_killed_writer_are_not_in_the_new_folder(tmp_path):
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "half").write_text("")
    with new_folder(tmp_path / "model") as part:
        (part / "whole").write_text("")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]
