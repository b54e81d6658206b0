"""The JSON that a benchmark leaves: where, with what and how it was measured, and every number."""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from mrla.analysis.benchmarking.record import hardware, versions
from mrla.files.atomic_write import write_json

RESULTS = Path(__file__).parent / "results"


def write_result(theme: str, started: datetime, options: argparse.Namespace, threads: int, **content: Any) -> None:
    """Writes it to ``options.out``, or to ``results/THEME_HARDWARE_DATE.json``, and says where.

    Args:
        theme: What was asked.
        started: When it began.
        options: The script's.
        threads: Threads of the CPU.
        content: What was found.
    """
    out = options.out or RESULTS / f"{theme}_amd-epyc-2-cores_{started:%Y-%m-%d}.json"
    record = {
        "theme": theme,
        "date": started.isoformat(timespec="seconds"),
        "hardware": hardware(torch.device("cpu"), threads),
        "versions": versions(),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record | content)
    print(f"written: {out}")
