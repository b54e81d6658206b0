import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_training_loop(tmp_path):
    out = tmp_path / "results" / "loop.json"
    command = [sys.executable, str(BENCHMARKS / "training_loop.py"), "--rounds", "1", "--epochs", "1"]
    done = subprocess.run([*command, "--out", str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["arm", *["plain"] * 2, *["light"] * 2, "written:"]
    content = json.loads(out.read_text())
    assert set(content) == {
        *("theme", "date", "hardware", "versions", "commit", "changed", "options", "recipes", "results"),
        "epochs",
    }
    assert content["options"] == {"rounds": 1, "epochs": 1}
    assert set(content["results"]) == set(content["recipes"]) == {"plain", "light"}
    for arm, entry in content["results"].items():
        assert content["recipes"][arm]["arm"] == arm
        assert entry["n"] == 1
        assert entry["steps_per_epoch"] == 14
        for clock in ("seconds", "cpu_seconds"):
            for part in ("bare", "loop", "whole"):
                (seconds,) = content["epochs"][arm][clock][part]
                assert entry[clock][f"{part}_ms_per_step"] == 1000 * seconds / 14
            assert entry[clock]["whole_to_bare"]["median"] > entry[clock]["loop_to_bare"]["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_training_loop_refuses_no_rounds(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "training_loop.py"), "--rounds", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "rounds and epochs must be positive: got 0 and 8" in done.stderr
