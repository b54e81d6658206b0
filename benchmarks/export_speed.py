"""What does layer attention cost in ONNX Runtime on a CPU, as attached and in its engine form?

    python benchmarks/export_speed.py [--rounds 25] [--model resnet50] [--size 224] [--batches 8 1] [--out FILE.json]

Inference of exported networks, all with the same random norms and random lambdas, against the exported plain network.
``depthwise`` is a depthwise convolution and its add behind each block, the least that a method with values can cost;
``light`` and ``base`` are exported as they are, ``light_engine`` by `mrla.deploy.engine_form`. With ``--fused`` every
network is folded by `mrla.fuse` first, the plain one too; with ``--openvino`` OpenVINO runs the same files. The
sessions take turns in one process, and each must first say what torch says. Six minutes on two quiet cores.
"""

import argparse
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from result_file import write_result
from torch import Tensor, nn

import mrla
from mrla.analysis.benchmarking.record import commit
from mrla.deploy.engine_form import engine_form
from mrla.deploy.exported_files import Run
from mrla.deploy.formats import OnnxFormat, OpenVinoFormat
from mrla.deploy.fusing import largest_difference
from mrla.ops import MRLALight

ARMS = ("plain", "depthwise", "light", "light_engine", "base")
METHODS = {"depthwise": "dw", "light": "light", "light_engine": "light", "base": "base"}
# Of the largest output, in float32.
TOLERANCE = 1e-4


def network(arm: str, model: str, fused: bool) -> tuple[nn.Module, nn.Module]:
    """The network of an arm, and what of it is exported."""
    torch.manual_seed(0)
    made = timm.create_model(model)
    if arm in METHODS:
        made = mrla.attach(made, METHODS[arm])
    randomise(made)
    exported = mrla.fuse(made) if fused else made
    return made.eval(), engine_form(exported) if arm == "light_engine" else exported.eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Norms and lambdas that leave no term out, drawn so small that the network's outputs stay of ordinary size."""
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            least, most = (0.1, 0.3) if ".mrla." in name else (0.5, 1.0)
            module.weight.uniform_(least, most, generator=generator)
            module.bias.normal_(std=0.1, generator=generator)
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        scale = getattr(module, "scale", None)  # base's, behind its ReLU
        if ".mrla" in name and isinstance(scale, nn.Parameter):
            scale.uniform_(0.1, 0.3, generator=generator)
        if isinstance(module, MRLALight) and module.decay is not None:
            module.decay.normal_(generator=generator)


def write(model: nn.Module, images: Tensor, file: Path) -> None:
    """The file that engines run, for images of this shape."""
    with torch.no_grad():
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)


ENGINES = {"onnxruntime": OnnxFormat(), "openvino": OpenVinoFormat()}


def sessions(options: argparse.Namespace, images: Tensor, engine: str, folder: Path) -> tuple[dict[str, Run], Any]:
    """What runs each arm, and by how much of the largest output each differs from torch.

    Raises:
        RuntimeError: If one differs by more than rounding.
    """
    runs: dict[str, Run] = {}
    differences: dict[str, float] = {}
    for arm in ARMS:
        model, exported = network(arm, options.model, options.fused)
        file = folder / f"{arm}_{len(images)}.onnx"
        if not file.exists():
            write(exported, images, file)
        opened = ENGINES[engine].open(file, threads=options.threads)  # OpenVINO reads ONNX, too
        runs[arm] = partial(ENGINES[engine].values, opened.session)
        with torch.inference_mode():
            expected = model(images)
        differences[arm] = largest_difference(runs[arm](images)[0], expected)
        if not differences[arm] <= TOLERANCE:
            raise RuntimeError(
                f"{arm} must say in {engine} what it says in torch: it differs by {differences[arm]:.1e}"
            )
    return runs, differences


def measure(runs: dict[str, Run], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by arm; the order turns from round to round."""
    seconds: dict[str, list[float]] = {arm: [] for arm in runs}
    order = list(runs)
    for turn in range(rounds + 2):
        order = order[1:] + order[:1]
        for arm in order:
            start = time.perf_counter()
            runs[arm](images)
            if turn >= 2:
                seconds[arm].append(time.perf_counter() - start)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median milliseconds; the ratio to the plain network's time of the same round; and that of the fastest rounds."""
    results: dict[str, Any] = {}
    for arm, values in seconds.items():
        p10, median, p90 = map(float, np.quantile(np.divide(values, seconds["plain"]), (0.1, 0.5, 0.9)))
        results[arm] = {
            "n": len(values),
            "ms": 1000 * float(np.median(values)),
            "ratio": {"median": median, "p10": p10, "p90": p90},
            "ratio_of_fastest": min(values) / min(seconds["plain"]),
        }
    return results


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--model", default="resnet50", help="a timm network")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1], help="images at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fused", action="store_true", help="fold every network by mrla.fuse first")
    parser.add_argument("--openvino", action="store_true", help="OpenVINO beside ONNX Runtime")
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/export_speed_HARDWARE_DATE.json)")
    options = parser.parse_args()
    if options.rounds < 1 or min(options.batches) < 1 or options.threads < 1:
        parser.error(
            f"rounds, batches and threads must be positive: got {options.rounds}, {options.batches}, {options.threads}"
        )
    started = datetime.now(UTC)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES if options.openvino else ("onnxruntime",):
            for batch in options.batches:
                images = torch.randn(batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(2))
                runs, differences = sessions(options, images, engine, Path(folder))
                seconds = measure(runs, images, options.rounds)
                case = f"{engine}, batch {batch}"
                results[case], kept[case] = summarise(seconds), seconds
                for arm, row in results[case].items():
                    row["difference"] = differences[arm]
                    print(
                        "{case:<22} {arm:<13} {ms:8.1f} ms   {median:.3f} ({p10:.3f} to {p90:.3f}, n = {n})   "
                        "fastest {ratio_of_fastest:.3f}".format(case=case, arm=arm, **row, **row["ratio"]),
                        flush=True,
                    )
    write_result("export_speed", started, options, options.threads, **commit(), results=results, seconds=kept)


if __name__ == "__main__":
    main()
