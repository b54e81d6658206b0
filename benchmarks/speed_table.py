"""What do attached and fused networks cost against plain ones? Every row of issue 5's table, by `mrla bench`.

    python benchmarks/speed_table.py [--rounds 15] [--out FILE.json]

Let nothing else run: five benchmarks, some eight minutes on two quiet cores. The plain network is in the same state,
eager against eager, folded against folded; `+reference` is the path of torch's own operators.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mrla
from mrla.files.atomic_write import write_json

RESULTS = Path(__file__).parent / "results"
EAGER = ("plain", "light", "base", "light+reference", "base+reference")
FOLDED = ("plain+fused", "light+fused", "base+fused")
NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet-18": {"model": "resnet18_cifar", "batch_size": 64, "image_size": 32},
    "ResNet-50": {"model": "resnet50", "batch_size": 8, "image_size": 224},
}


def measure(rounds: int, folder: Path, small: bool) -> dict[str, Any]:
    """The benchmarks by name, each as its ``bench.json`` has it."""
    found = {}
    for name, settings in NETWORKS.items():
        settings = {**settings, "batch_size": 2, "image_size": 32} if small else settings
        eager = mrla.benchmark(arms=EAGER, rounds=rounds, out=folder / f"{name}-eager", **settings)
        folded = mrla.benchmark(
            arms=FOLDED, rounds=rounds, quantities=("inference",), out=folder / f"{name}-folded", **settings
        )
        found |= {f"{name}, eager": eager.content, f"{name}, folded": folded.content}
    settings: dict[str, Any] = {"batch_size": 2 if small else 8, "image_size": 32 if small else 224}
    blocks = mrla.benchmark(
        "resnet50", ("plain", "base", "base+reference"), sweep="blocks", rounds=rounds,
        quantities=("inference", "training"), out=folder / "blocks", **settings,
    )  # fmt: skip
    return {**found, "base, block by block": blocks.content}


def rows(content: dict[str, Any]) -> list[str]:
    """The ratios of one benchmark, a line for each arm and value."""
    lines = []
    for point in content["points"]:
        for arm, result in list(point["results"].items())[1:]:
            cells = [f"{arm:<16}" if "value" not in point else f"t={point['value']:<3}{arm:<16}"]
            for quantity in ("inference", "training"):
                entry = result[quantity]
                if entry:
                    ratio = entry["ratio"]
                    spread = f"({ratio['p10']:.3f} to {ratio['p90']:.3f})"
                    cells.append(f"{quantity} {ratio['median']:.3f} {spread}, {entry['ms']['median']:.1f} ms")
            memory = result["memory"]
            if memory and memory["saved_for_backward_ratio"]:
                cells.append(f"kept {memory['saved_for_backward_ratio']:.3f}, {memory['saved_for_backward_mb']:.0f} MB")
            lines.append("   ".join(cells))
    return lines


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/speed_table_HARDWARE_DATE.json)")
    parser.add_argument("--small", action="store_true", help="two images of 32x32: only to see that it works")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"rounds must be positive: got {options.rounds}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.rounds, Path(folder), options.small)
    for name, content in found.items():
        print(name)
        print("\n".join(f"  {line}" for line in rows(content)))
    first = next(iter(found.values()))
    out = options.out or RESULTS / f"speed_table_amd-epyc-2-cores_{first['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
