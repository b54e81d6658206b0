"""Do timm's own tests of its models hold for networks with mixers?

    python benchmarks/timm_tests.py [--method light] [--models 'test_*' ...] [--tests EXPRESSION] [--source FILE.tar.gz]
        [--out FILE.json]

timm's `tests/test_models.py` is run with pytest, in a process of its own, over networks that have mixers with random
weights from their creation on; one in which no chain is found stays plain and is counted. The tests that take every
model in turn take those of `--models` (timm's miniature ones and a few small ones); the others name their models.

Left out are tests that need a download, and those that script a network: TorchScript compiles a block's source and
finds no mixer there (`mrla.attach` works with tracing and export). Counted by themselves are tests that end in the one
error that mixers give a batch of patches without one grid (NaFlex with padding or several sizes). timm's source
distribution is downloaded by pip if `--source` does not give it. Exits with 1 if a test failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from result_file import write_result

# Needs weights from the hub.
LEFT_OUT = "not test_model_inference"

# timm's miniature networks, many of which have one block a stage and stay plain, and small ones that have chains.
MODELS = ["test_*", "resnet18", "regnety_002", "convnext_atto", "levit_128s", "efficientnet_b0", "pvt_v2_b0"]
MODELS += ["vit_tiny_patch16_224"]


def source_distribution(folder: Path) -> Path:
    """The installed timm's source distribution, downloaded."""
    words = ["download", "--quiet", "--no-deps", "--no-binary", "timm", "--no-cache-dir", f"timm=={timm.__version__}"]
    subprocess.run([sys.executable, "-m", "pip", *words, "--dest", str(folder)], check=True)
    (archive,) = folder.glob("timm-*.tar.gz")
    return archive


def run_tests(archive: Path, folder: Path, method: str, models: Sequence[str], tests: str) -> dict[str, Any]:
    """What `attach_in_timm_tests` counted: outcomes, networks attached and left plain, failures."""
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (unpacked,) = folder.glob("timm-*/")
    counts = folder / "counts.json"
    here = Path(__file__).parent
    paths = [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "GITHUB_ACTIONS": "1",  # timm's own switch: no tests of downloaded weights, no networks too large for 16 GB
        "MRLA_METHOD": method,
        "MRLA_MODELS": " ".join(models),
        "MRLA_COUNTS": str(counts),
    }
    words = ["-p", "attach_in_timm_tests", "-p", "no:cacheprovider", "-q", "-W", "ignore", "--tb", "short", "-k", tests]
    # timm itself is the installed one, not the sources beside the tests.
    command = [sys.executable, "-P", "-m", "pytest", *words, "tests/test_models.py"]
    done = subprocess.run(command, cwd=unpacked, env=environment)
    if not counts.exists():
        raise RuntimeError(f"pytest ended with {done.returncode} before a test was run; see its output above")
    return json.loads(counts.read_text())


def main() -> int:
    """Runs the tests, prints the counts and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("light", "base", "exact"), default="light")
    parser.add_argument("--models", nargs="+", default=MODELS, help="patterns of names in timm's registry")
    parser.add_argument("--tests", default=LEFT_OUT, help="pytest's -k")
    parser.add_argument("--source", type=Path, default=None, help="timm's source distribution")
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/timm_tests_METHOD_HARDWARE_DATE.json)")
    options = parser.parse_args()
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = options.source or source_distribution(folder)
        found = run_tests(archive, folder / "tests", options.method, options.models, options.tests)
    results, networks = found["results"], found["networks"]
    print(", ".join(f"{results.get(outcome, 0)} {outcome}" for outcome in ("passed", "failed", "refused", "skipped")))
    print(f"networks: {networks.get('attached', 0)} attached, {networks.get('plain', 0)} left plain")
    for test in found["failures"]:
        print(f"failed: {test}")
    options.source = options.source and options.source.name
    write_result(f"timm_tests_{options.method}", started, options, torch.get_num_threads(), **found)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
