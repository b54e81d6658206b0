"""One process at a time writes into a folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mrla.files import one_writer
from mrla.files.one_writer import LOCK, alone_in

HOLDS = """
import sys
from pathlib import Path
from mrla.files.one_writer import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(one_writer, "PATIENCE", 0.0)


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield folder, process
        finally:
            process.kill()


def test_the_second_is_told_who_the_first_is(held, tmp_path):
    folder, process = held
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=rf"in {folder}: process {process.pid} on .*, since 20\d\d-.*; wait") as caught:
        with alone_in(folder):
            pass
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    # A copy is not held, and a folder that has moved is held in its new place.
    shutil.copytree(folder, tmp_path / "copy")
    with alone_in(tmp_path / "copy"):
        pass
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"process {process.pid}"), alone_in(tmp_path / "moved"):
        pass


def test_the_lock_ends_with_its_process(held):
    folder, process = held
    process.kill()
    process.wait()
    assert (folder / LOCK).is_file()
    with alone_in(folder):
        (folder / "mine").touch()
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_folder_in_a_folder_is_another(tmp_path):
    with alone_in(tmp_path), alone_in(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one").is_dir()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_nothing_has_come_into_is_taken_away_again(tmp_path):
    with pytest.raises(KeyError), alone_in(tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    with alone_in(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_what_killed_processes_left_is_swept_in_the_named_parts(tmp_path):
    for place in (tmp_path, tmp_path / "checkpoints", tmp_path / "other"):
        place.mkdir(exist_ok=True)
        (place / ".last.mrla-abcdefgh.ckpt").touch()
    with alone_in(tmp_path, ("checkpoints", "missing")):
        pass
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob(".last*")] == ["other/.last.mrla-abcdefgh.ckpt"]


def test_where_files_cannot_be_locked_all_works(tmp_path, monkeypatch):
    monkeypatch.setattr(one_writer, "lock", lambda descriptor: None)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_taken_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, taken = tmp_path / LOCK, []

    def lock(descriptor: int) -> bool:
        if not taken:
            path.unlink()  # whoever held it has ended between our opening and our locking
        taken.append(os.fstat(descriptor).st_ino)
        return True

    monkeypatch.setattr(one_writer, "lock", lock)
    with alone_in(tmp_path):
        assert len(taken) == 2
        assert path.stat().st_ino == taken[-1]
    assert not list(Path(tmp_path).iterdir())
