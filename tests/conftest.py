"""Shared by all tests: a fixed seed, a fixed thread count, and no network."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one for each core; what they start inherits the variable
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # test_promises.py asks what attach_coverage.py asks


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """Where a command is tried: nothing lies there, and a printed line is wide enough for a table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


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
