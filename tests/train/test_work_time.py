"""Seconds of a work that is stopped and started again."""

import json

import pytest

from mrla.train import work_time
from mrla.train.work_time import WorkTime


@pytest.fixture
def clock(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(work_time.time, "monotonic", lambda: now[0])
    return now


def test_seconds_of_all_processes_add_up(tmp_path, clock):
    path = tmp_path / "seconds.json"
    for expected in (12.0, 24.0):
        work = WorkTime(path)
        clock[0] += 9
        work.keep()  # too early
        clock[0] += 3
        work.keep()
        assert json.loads(path.read_text()) == {"seconds": expected}
        clock[0] += 2  # the process is killed: these are lost
    work = WorkTime(path)
    clock[0] += 1
    work.keep(now=True)
    assert json.loads(path.read_text()) == {"seconds": 25.0}
    work.end()
    assert work.seconds == 25.0
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": null}', '{"seconds": -5}', "[" * 100_000])
def test_a_damaged_file_counts_nothing(text, tmp_path, clock):
    path = tmp_path / "seconds.json"
    path.write_text(text)
    assert WorkTime(path).seconds == 0
