"""A benchmark's numbers as lines for a reader."""

from collections.abc import Mapping
from typing import Any

SWEPT = {"batch": "batch", "depth": "depth", "resolution": "image size", "blocks": "block's place"}
"""What a sweep varies, in words."""


def title(content: Mapping[str, Any]) -> str:
    """What was measured and how, in one line.

    Args:
        content: The content of ``bench.json``.

    Returns:
        Such as ``resnet18_cifar, 64x3x32x32, float32, contiguous, cpu, 2 threads, 10 rounds``.
    """
    configuration, points = content["configuration"], content["points"]
    sweep = configuration["sweep"]
    name = points[0]["model"] if sweep != "depth" else configuration["model"]
    what = [f"{name}, {points[0]['block']}" if sweep == "blocks" else name]
    shapes = ["x".join(map(str, point["input_shape"])) for point in points]
    if len(set(shapes)) == 1:
        what.append(shapes[0])
    elif sweep == "batch":
        what.append("images " + "x".join(map(str, points[0]["input_shape"][1:])))
    else:
        what.append(f"batch {points[0]['input_shape'][0]}")
    what += [configuration["dtype"], configuration["memory_format"], configuration["device"]]
    threads = configuration["threads"]
    what.append(f"{threads} thread{'s' if threads > 1 else ''}")
    rounds = configuration["rounds"]
    what.append(f"{rounds} round{'s' if rounds > 1 else ''}")
    return ", ".join(what)


def table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The headings and one line for each arm, at each value of a sweep.

    Args:
        content: The content of ``bench.json``.

    Returns:
        Headings and lines; what was not asked for has no column, and what an arm has not a ``-``.
    """
    configuration = content["configuration"]
    sweep, quantities = configuration["sweep"], configuration["quantities"]
    headings = [*([SWEPT[sweep]] if sweep else []), "arm"]
    if "inference" in quantities:
        headings += ["images/s", "inference\nratio"]
    if "training" in quantities:
        headings += ["step\n(ms)", "training\nratio"]
    if "memory" in quantities:
        headings += ["kept\n(MB)", "kept\nratio", "infer.\npeak MB", "step\npeak MB"]
    lines = []
    for point in content["points"]:
        for arm, entry in point["results"].items():
            first = [str(point["value"])] if sweep else []
            lines.append([*first, arm, *_cells(entry, quantities)])
    return headings, lines


def _cells(entry: Mapping[str, Any], quantities: list[str]) -> list[str]:
    cells = []
    if "inference" in quantities:
        taken = entry["inference"]
        cells += [f"{taken['images_per_second']:,.1f}" if taken else "-", _ratio(taken)]
    if "training" in quantities:
        taken = entry["training"]
        cells += [f"{taken['ms']['median']:,.2f}" if taken else "-", _ratio(taken)]
    if "memory" in quantities:
        held = entry["memory"]
        against = held["saved_for_backward_ratio"]
        cells += [_megabytes(held["saved_for_backward_mb"]), "-" if against is None else f"{against:.2f}"]
        cells += [_megabytes(held["peak_inference_mb"]), _megabytes(held["peak_training_mb"])]
    return cells


def _ratio(taken: Mapping[str, Any] | None) -> str:
    if not taken or not taken["ratio"]:
        return "-"
    return "{median:.2f} ({p10:.2f}-{p90:.2f})".format(**taken["ratio"])


def _megabytes(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:,.1f}"
