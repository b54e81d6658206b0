"""Shared by all tests: a fixed seed, a fixed thread count, no network, and which tests run with types checked."""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one for each core; what they start inherits the variable
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
sys.path.append(
    str(Path(__file__).parent.parent / "benchmarks")
)  # test_invariants.py asks what attach_coverage.py asks

# With jaxtyping's hook every call checks types and shapes: what trains takes twice as long, what exports does not work.
CHECKED = [Path(__file__).parent / room for room in ("ops", "models")]


def pytest_configure() -> None:
    # A shell starts what runs in the background with Ctrl-C ignored, and its processes inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.path.is_relative_to(folder) for folder in CHECKED):
            item.add_marker(pytest.mark.unchecked)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """Where a command is tried: nothing lies there, and a printed line is wide enough for a table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def without_downloads(monkeypatch):
    """Code for readers runs as it is printed: weights that timm would fetch are random ones."""
    import timm

    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **arguments: create_model(name, **arguments)
    )


@pytest.fixture
def small_files():
    """`small_files(size)`: a body in which no file takes more bytes, as on a disk that is full."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores the signal that comes with it
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def sweep_but(kept: Iterable[Any], rows: Iterable[Any]) -> list[Any]:
    """The rows of a table for `parametrize`: all but those that are kept in the default lane are marked `sweep`."""
    return [row if row in kept else pytest.param(row, marks=pytest.mark.sweep) for row in rows]


@contextmanager
def one_process() -> Iterator[None]:
    """A comparison's runs are made here, one after the other: a process for each takes longer to start than to train.

    `tests/analysis/comparison/test_comparing.py` has real processes.
    """
    from mrla.analysis.comparison import runs as comparison_runs
    from mrla.files.atomic_write import write_json
    from mrla.train.fitting import train
    from mrla.train.recipe import Recipe, as_dict, from_dict

    def start(folder: Path, recipe: Recipe, plugins: Sequence[str]) -> SimpleNamespace:
        write_json(folder / "recipe.json", as_dict(recipe))
        train(from_dict(json.loads((folder / "recipe.json").read_text())), folder, progress=False)
        return SimpleNamespace(poll=lambda: 0, communicate=lambda: None, returncode=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_runs, "_start", start)
        yield


@pytest.fixture
def runs_in_one_process() -> Iterator[None]:
    with one_process():
        yield


def randomise_norms(model: nn.Module) -> nn.Module:
    """Gives every BatchNorm other weights and statistics: timm zeroes the last one of a block, which hides mistakes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model
