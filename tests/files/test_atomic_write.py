"""Files written whole: what killed writers leave, what is swept and what is not, and disks that are full."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import mrla
from mrla.files import atomic_write
from mrla.files.atomic_write import (
    NotWrittenError,
    read_json,
    room_for,
    scratch_folder,
    sweep,
    write_json,
    written_folder,
    written_whole,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from mrla.files import atomic_write

target = Path(sys.argv[2])
if sys.argv[1] == "file":
    with atomic_write.written_whole(target) as beside:
        beside.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
rename, renames = Path.rename, 0
def killed_between(self, other):
    global renames
    renames += 1
    if renames == 2:  # the old one has been moved aside
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, other)
Path.rename = killed_between
with atomic_write.written_folder(target, record="made.json", overwrite=True) as beside:
    (beside / "made.json").write_text("new")
"""


def killed(kind: str, target: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, kind, str(target)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_writer_left_is_swept_and_what_is_the_users_stays(tmp_path):
    mine = {".last-abcdefgh.ckpt", ".last.mrla-ABCDEFGH.ckpt", ".mrla-abcdefgh", ".hidden", "last.mrla-abcdefgh.ckpt"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    killed("file", tmp_path / "last.ckpt")
    assert len(names(tmp_path)) == len(mine) + 1
    sweep(tmp_path)
    assert names(tmp_path) == mine


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with written_whole(tmp_path / "last.ckpt") as beside, scratch_folder(tmp_path / "folder") as scratch:
        (scratch / "one").write_text("half")
        sweep(tmp_path)
        assert beside.is_file()
        assert (scratch / "one").is_file()
        beside.write_text("whole")
    assert names(tmp_path) == {"last.ckpt"}
    assert (tmp_path / "last.ckpt").read_text() == "whole"


def test_a_link_of_that_name_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".last.mrla-abcdefgh.ckpt").symlink_to(tmp_path / "mine")
    sweep(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_a_killed_process_had_moved_aside_is_put_back(tmp_path):
    target = tmp_path / "made"
    with written_folder(target, record="made.json") as beside:
        (beside / "made.json").write_text("old")
    killed("folder", target)
    assert not target.exists()
    # The next one may write nothing, and still puts back what was there.
    with pytest.raises(ValueError, match="made holds 1 entries"), written_folder(target, record="made.json"):
        pass
    assert names(tmp_path) == {"made"}
    assert (target / "made.json").read_text() == "old"


def test_a_signal_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "made"
    with written_folder(target, record="made.json") as beside:
        (beside / "made.json").write_text("old")
    rename = Path.rename

    def interrupted(self, other):
        if self.parent.name == "whole":
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        written_folder(target, record="made.json", overwrite=True) as beside,
    ):
        (beside / "made.json").write_text("new")
    assert names(tmp_path) == {"made"}
    assert (target / "made.json").read_text() == "old"


def test_two_do_not_make_one_folder_at_once(tmp_path):
    with (
        scratch_folder(tmp_path / "made"),
        pytest.raises(
            ValueError,
            match=rf"another command is writing .*made: process {os.getpid()} on .*, since 2.*; wait for it to end, or",
        ),
        scratch_folder(tmp_path / "made"),
    ):
        pass
    with scratch_folder(tmp_path / "made"), scratch_folder(tmp_path / "other"):
        pass
    assert names(tmp_path) == set()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_disk_that_takes_nothing_is_named_with_the_file(tmp_path, number):
    target = tmp_path / "one.json"
    target.write_text("before")
    with pytest.raises(NotWrittenError, match=rf"one\.json cannot be written \({os.strerror(number)}\)") as caught:
        with written_whole(target):
            raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert caught.value.filename is None  # the sentence names it
    assert target.read_text() == "before"
    assert names(tmp_path) == {"one.json"}


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (ValueError("x"), OSError(errno.EACCES, "no"), RuntimeError("y")):
        with pytest.raises(type(error)) as caught, room_for(tmp_path):
            raise error
        assert caught.value is error


def test_in_a_folder_the_file_is_named_as_it_would_be_called(tmp_path):
    with pytest.raises(NotWrittenError) as caught, written_folder(tmp_path / "made", record="a") as beside:
        with written_whole(beside / "explain.json"):
            raise OSError(errno.ENOSPC, "full")
    assert str(caught.value.strerror).startswith(f"{tmp_path / 'made' / 'explain.json'} cannot be written")
    assert names(tmp_path) == set()


def save_as_a_checkpoint(model: nn.Module, folder: Path) -> None:
    with written_whole(folder / "one.ckpt") as beside:
        torch.save(model.state_dict(), beside)


@pytest.mark.parametrize("save", [save_as_a_checkpoint, mrla.save])
def test_writers_of_other_languages_that_hide_the_systems_error(tmp_path, small_files, save):
    model = timm.create_model("test_resnet", num_classes=2)
    with small_files(100_000), pytest.raises(NotWrittenError, match=r"cannot be written \(File too large\)"):
        save(model, tmp_path)
    assert names(tmp_path) == set()


def test_saving_sweeps_what_a_killed_save_left(tmp_path):
    killed("file", tmp_path / "model.safetensors")
    mrla.save(timm.create_model("test_resnet", num_classes=2), tmp_path)
    assert names(tmp_path) == {"config.json", "model.safetensors"}


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    killed("file", tmp_path / "last.ckpt")
    monkeypatch.setattr(atomic_write, "lock", lambda descriptor: None)
    sweep(tmp_path)
    with written_whole(tmp_path / "last.ckpt") as beside:
        beside.write_text("whole")
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("name", ["猫.png", "\udcff.png"])
def test_names_are_written_as_they_are_where_that_is_text(name, tmp_path):
    write_json(tmp_path / "names.json", {"file": name})
    assert read_json(tmp_path / "names.json") == {"file": name}
    assert ("猫" in (tmp_path / "names.json").read_text(encoding="utf-8")) == (name == "猫.png")
