"""What does a detector cost whose backbone has mixers, against the plain detector of the same weights?

    python benchmarks/detector_speed.py [--rounds 25] [--model resnet50] [--size 320] [--out FILE.json]

Faster R-CNN with a feature pyramid: inference of one image, and the loss and gradients of two. The detectors take turns
in one process, and must first answer with the same bits: so both make the same proposals, on which the time of a
detector's heads depends. Three minutes on two quiet cores.
"""

import argparse
import copy
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from result_file import write_result
from torch import nn

import mrla
from mrla.analysis.measure import timed
from mrla.dense import detector

CPU = torch.device("cpu")


def detectors(model: str, size: int) -> dict[str, nn.Module]:
    """The plain detector, and those attached to a copy of its backbone, with its heads."""
    torch.manual_seed(0)
    backbone = timm.create_model(model)
    arms = {"plain": copy.deepcopy(backbone)}
    arms |= {method: mrla.attach(copy.deepcopy(backbone), method) for method in ("light", "base")}
    made = {
        arm: detector("faster_rcnn", network, num_classes=91, min_size=size, max_size=size)
        for arm, network in arms.items()
    }
    for arm, network in made.items():
        unknown = network.load_state_dict(made["plain"].state_dict(), strict=False).unexpected_keys
        if unknown:
            raise RuntimeError(f"the {arm} detector must have the plain one's parameters: it lacks {unknown[:3]}")
    return made


def works(network: nn.Module, size: int) -> dict[str, Callable[[], Any]]:
    """What is timed: ``inference`` of one image, and ``training``, forward and backward of two."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, size, size, generator=generator) for _ in range(2)]
    box = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.3, 0.9, 0.8]]) * size
    targets = [{"boxes": box, "labels": torch.tensor([1, 2])} for _ in images]

    def inference() -> Any:
        with torch.no_grad():
            return network.eval()(images[:1])

    def training() -> Any:
        network.zero_grad()
        # Regions are drawn at random.
        torch.manual_seed(2)
        torch.stack(list(network.train()(images, targets).values())).sum().backward()

    return {"inference": inference, "training": training}


def check_same(arms: dict[str, dict[str, Callable[[], Any]]]) -> None:
    """Raises ``RuntimeError`` unless all answer with the same bits."""
    answers = {arm: work["inference"]() for arm, work in arms.items()}
    for arm, (answer,) in answers.items():
        (plain,) = answers["plain"]
        if not all(torch.equal(answer[name], plain[name]) for name in plain):
            raise RuntimeError(f"the {arm} detector must answer as the plain one")


def measure(arms: dict[str, dict[str, Callable[[], Any]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by arm and work, of each round; the order turns from round to round."""
    for work in arms.values():
        for action in work.values():
            action()
    seconds: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in work} for arm, work in arms.items()}
    order = list(arms)
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name in seconds["plain"]:
            for arm in order:
                seconds[arm][name].append(timed(arms[arm][name], CPU))
    return seconds


def summarise(seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Median milliseconds, and the ratio to the plain detector's time of the same round."""
    results: dict[str, Any] = {}
    for arm, works in seconds.items():
        results[arm] = {}
        for name, values in works.items():
            p10, median, p90 = map(float, np.quantile(np.divide(values, seconds["plain"][name]), (0.1, 0.5, 0.9)))
            results[arm][name] = {
                "n": len(values),
                "ms": 1000 * float(np.median(values)),
                "ratio": {"median": median, "p10": p10, "p90": p90},
            }
    return results


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--model", default="resnet50", help="a timm backbone")
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/detector_speed_HARDWARE_DATE.json)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"rounds must be positive: got {options.rounds}")
    started = datetime.now(UTC)
    arms = {arm: works(network, options.size) for arm, network in detectors(options.model, options.size).items()}
    check_same(arms)
    seconds = measure(arms, options.rounds)
    results = summarise(seconds)
    for arm, entry in results.items():
        cells = [
            "{name} {ms:.0f} ms, {median:.3f} ({p10:.3f} to {p90:.3f})".format(name=name, ms=row["ms"], **row["ratio"])
            for name, row in entry.items()
        ]
        print(f"{arm:<6} {'   '.join(cells)}")
    write_result("detector_speed", started, options, torch.get_num_threads(), results=results, seconds=seconds)


if __name__ == "__main__":
    main()
