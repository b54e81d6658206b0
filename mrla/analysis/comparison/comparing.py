"""The comparison: every arm with every seed, and what may honestly be said of the difference."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from mrla.files.atomic_write import read_json, write_json
from mrla.files.one_writer import alone_in
from mrla.messages.brief import Brief
from mrla.models import load
from mrla.train import get_recipe
from mrla.train.arm_names import folder_name, parse_arm
from mrla.train.arms import count_parameters
from mrla.train.history import write_csv
from mrla.train.packages import need
from mrla.train.progress_lines import CountedLines
from mrla.train.recipe import MOST_PROCESSES, Recipe
from mrla.train.recipe_tasks import packages_of
from mrla.train.runs import RESULT, finished_run, open_run, versions
from mrla.train.stopping import stopped_in_order
from mrla.train.threads import thread_limit
from mrla.train.work_time import WorkTime

from ..curves import draw_curves
from ..measure import count_macs, measure_throughput, timing_device
from ..report.page import write_report
from ..report.tables import percent
from ..statistics import compare_arms, summary
from .runs import OwnRuns, RecipeRuns

RESULTS = "compare.json"
_MOST_SEEDS = 1000
NOTE = (
    "Every difference is taken between runs of the same seed: the same data order, and the same starting weights where "
    "the arms share them. The interval covers the choice of the seed, on one fixed validation part; other images would "
    "add their own spread. Scores are those of the last epoch; the best epoch is chosen on the validation part and "
    "therefore flatters."
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Brief):
    """A finished comparison.

    Attributes:
        folder: Where it is.
        content: What ``compare.json`` holds; docs/reference/json_keys.md lists its keys.
        was_finished: Whether it was finished before, so that nothing was trained now.
    """

    folder: Path
    content: dict[str, Any]
    was_finished: bool = False

    def _brief(self) -> dict[str, object]:
        metric, table, verdicts = self.content["figure"], self.content["table"], self.verdicts
        said = {arm: f"{percent(table[arm][metric])} %" for arm in self.content["arms"]}
        told = {arm: f"{text}, {verdicts[arm]}" if arm in verdicts else text for arm, text in said.items()}
        return {"folder": str(self.folder), "figure": metric, "seeds": len(self.content["seeds"]), **told}

    @property
    def verdicts(self) -> dict[str, str]:
        """``better``, ``worse`` or ``not resolved``, for every arm but the first."""
        return {arm: difference["verdict"] for arm, difference in self.content["differences"].items()}


def compare(
    recipe: Recipe | str | None = None,
    *,
    model: nn.Module | None = None,
    train_loader: DataLoader | None = None,
    val_loader: DataLoader | None = None,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    arms: Sequence[str] = ("plain", "light"),
    seeds: int = 5,
    out: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Trains every arm with every seed and says which is better, with an interval, or that it is not resolved.

    Started again with the same folder and settings it keeps finished runs and goes on with unfinished ones after their
    last finished epoch, to the same numbers.

    Args:
        recipe: A recipe or its name; its `arm` is replaced by each of `arms`, its `seed` is the first of the seeds.
            ``digits_resnet18`` if not given, or ``finetune`` for a `model` of yours.
        model: A plain network of yours to start from in place of the recipe's; it is left as it is. Runs are then made
            one after the other in this process.
        train_loader: With `model`, in place of the recipe's images: batches of images (b, c, h, w) and labels (b,). It
            should shuffle: where the order is always the same the seeds are near copies, and the result says so.
        val_loader: Such batches for validation.
        architecture: Name of a `model` that timm did not make, such as ``"torchvision/resnet18"``.
        model_args: Arguments that such a network was built with, such as ``{"num_classes": 10}``.
        arms: What is compared, the baseline first: ``plain``, ``light``, ``base``, ``exact``, ``dw``, a method
            of your own, ``eca``, ``se``; a method with options as in ``base:last=3``.
        seeds: How many seeds each arm is trained with; settled before the first run, for to add seeds until a
            difference shows is to find one that is not there.
        out: Folder of the comparison; ``runs/compare-RECIPE`` if not given.
        jobs: Runs at once; if not given, as many as the CPU has cores for, or one where a GPU may be used.
        progress: Whether a line a minute on standard error says how far it has come.
        on_progress: Called with the epochs finished and the epochs in all, in place of those lines.

    Returns:
        The comparison; its folder holds ``report.html``, ``compare.json``, ``table.csv``, ``history.csv``,
        ``curves.png``, ``curves.svg`` and every run.

    Raises:
        ValueError: If an argument is not as described, the folder is another comparison's or another process writes
            into it, or a run fails.
        KeyboardInterrupt: After Ctrl-C; what is finished is kept. After SIGTERM a SystemExit with code 143.

    Example:
        A comparison takes a minute, so this is not run with the tests::

            result = mrla.compare("digits_resnet18", seeds=3)
            print(result.verdicts["light"])
            result = mrla.compare(model=model, train_loader=train, val_loader=val)
    """
    if recipe is None:
        recipe = "digits_resnet18" if model is None else "finetune"
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    need("scipy", "matplotlib", "jinja2", "bokeh", *packages_of(recipe))
    _check(arms, seeds, jobs)
    recipe = replace(recipe, arm=arms[0])
    folder = Path(out) if out is not None else Path("runs") / f"compare-{recipe.recipe}"
    # What can be refused is refused before the first run, and before anything is written.
    if model is None and train_loader is None and val_loader is None:
        source: RecipeRuns | OwnRuns = RecipeRuns(recipe, jobs)
    else:
        source = OwnRuns(recipe, model, train_loader, val_loader, architecture, model_args)
    plan = [(arm, recipe.seed + index) for index in range(seeds) for arm in arms]
    starts = {arm: _fingerprint(source.network(arm, recipe.seed)) for arm in arms}
    settings = {
        "recipe": source.settings,
        "arms": list(arms),
        "seeds": [seed for _, seed in plan[:: len(arms)]],
        "start": starts,
    }
    if progress and on_progress is None:
        on_progress = CountedLines("epochs of all runs").say
    folders = {(arm, seed): folder / "runs" / f"{folder_name(arm)}-seed{seed}" for arm, seed in plan}
    finished_run(folder, {"compare": settings}, source.contents)
    with stopped_in_order(lambda: _left_in(folder, folders)), alone_in(folder):
        open_run(folder, {"compare": settings}, source.contents)
        clock = WorkTime(folder / "seconds.json")

        def told(done: int, total: int) -> None:
            clock.keep()
            if on_progress is not None:
                on_progress(done, total)

        try:
            source.make(folders, told)
        except BaseException:
            with suppress(OSError):  # a full disk: the error is what counts
                clock.keep(now=True)
            raise
        results = {key: read_json(folders[key] / RESULT) for key in plan}
        earlier = _earlier(folder, arms, results)
        content = _summarise(source, arms, results, folders, earlier)
        content["seconds"] = clock.seconds if earlier is None else earlier["seconds"]
        _write(folder, content)
        clock.end()
    return Comparison(folder=folder, content=content, was_finished=earlier is not None)


def _check(arms: Sequence[str], seeds: int, jobs: int | None) -> None:
    parsed = [parse_arm(arm) for arm in arms]
    if len(arms) < 2 or any(arm in parsed[:index] for index, arm in enumerate(parsed)):
        raise ValueError(f"arms must be at least two different ones: got {', '.join(arms) or 'none'}")
    if not 1 <= seeds <= _MOST_SEEDS:
        raise ValueError(f"seeds must be from 1 to {_MOST_SEEDS}: got {seeds}")
    if jobs is not None and not 1 <= jobs <= MOST_PROCESSES:
        raise ValueError(f"jobs must be from 1 to {MOST_PROCESSES} runs at once: got {jobs}")


def _left_in(folder: Path, folders: Mapping[tuple[str, int], Path]) -> str:
    """What a comparison that was stopped has left, and how to go on."""
    done = sum((run / RESULT).is_file() for run in folders.values())
    return (
        f"{folder} has {done} of {len(folders)} runs; the same command goes on with the others after their last "
        f"finished epoch"
    )


def _fingerprint(model: nn.Module) -> str:
    """That of the weights at the start: who goes on in a folder must go on from the same."""
    digest = sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _earlier(
    folder: Path, arms: Sequence[str], results: Mapping[tuple[str, int], dict[str, Any]]
) -> dict[str, Any] | None:
    """What ``compare.json`` holds, if it is of these very runs: what was measured then is not measured again."""
    try:
        content = read_json(folder / RESULTS)
    except ValueError:  # there is none, or it is damaged: it is written anew
        return None
    epochs = {arm: [run["epochs"] for (of, _), run in results.items() if of == arm] for arm in arms}
    return content if content.get("epochs") == epochs else None


def _summarise(
    source: RecipeRuns | OwnRuns,
    arms: Sequence[str],
    results: Mapping[tuple[str, int], dict[str, Any]],
    folders: Mapping[tuple[str, int], Path],
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    seeds = list(dict.fromkeys(seed for _, seed in results))
    models = {arm: load(folders[arm, seeds[-1]]) for arm in arms}
    metric = "val_accuracy" if source.recipe.detector is None else "val_box_ap"
    first = results[arms[0], seeds[0]]["last"]
    # What only some runs have was made by another version.
    scores = [
        name for name in first if name not in ("epoch", "lr") and all(name in run["last"] for run in results.values())
    ]
    images = source.images()
    machine = source.recipe.machine
    if earlier is not None:
        rates = {arm: earlier["table"][arm]["images_per_second"] for arm in arms}
    else:
        device = timing_device(machine.accelerator)
        on_device = {arm: model.to(device) for arm, model in models.items()}
        with thread_limit(machine.threads):
            rates = {arm: asdict(rate) for arm, rate in measure_throughput(on_device, images.to(device)).items()}
    table: dict[str, Any] = {}
    for arm in arms:
        runs = [results[arm, seed] for seed in seeds]
        table[arm] = {
            **{name: _spread([run["last"][name] for run in runs]) for name in scores},
            f"best_{metric}": _spread([run["best"][metric] for run in runs])
            | {"epochs": [run["best"]["epoch"] for run in runs]},
            "parameters": count_parameters(models[arm]),
            # A detector's depend on what it finds.
            "macs": count_macs(models[arm], tuple(images.shape[1:])) if source.recipe.detector is None else None,
            "images_per_second": rates[arm],
            "train_seconds": _spread([run["seconds"] for run in runs]),
        }
    differences = compare_arms({arm: table[arm][metric]["values"] for arm in arms}, baseline=arms[0])
    return {
        "recipe": source.settings,
        "arms": list(arms),
        "seeds": seeds,
        "figure": metric,
        "table": table,
        "differences": {arm: asdict(difference) for arm, difference in differences.items()},
        "note": NOTE,
        "notes": source.notes,
        "versions": versions(),
        "epochs": {arm: [results[arm, seed]["epochs"] for seed in seeds] for arm in arms},
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    mean, sd = summary(values)
    return {"mean": mean, "sd": sd, "values": list(values)}


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    recipe, arms = content["recipe"], content["arms"]
    write_json(folder / RESULTS, content)
    write_csv(folder / "table.csv", [_table_row(arm, content) for arm in arms])
    rows = [
        {"arm": arm, "seed": seed, **row}
        for arm in arms
        for seed, run in zip(content["seeds"], content["epochs"][arm], strict=True)
        for row in run
    ]
    write_csv(folder / "history.csv", rows)
    title = f"{recipe['recipe']}: {recipe['model']}"
    draw_curves(content["epochs"], folder, title=title, baseline=arms[0], score=content["figure"])
    write_report(folder, content, kind="compare")


def _table_row(arm: str, content: Mapping[str, Any]) -> dict[str, Any]:
    entry, difference = content["table"][arm], content["differences"].get(arm, {})
    row: dict[str, Any] = {"arm": arm}
    for name in (name for name, cell in entry.items() if isinstance(cell, dict) and "values" in cell):
        row |= {f"{name}_mean": entry[name]["mean"], f"{name}_sd": entry[name]["sd"]}
    row |= {f"parameters_{name}": value for name, value in entry["parameters"].items()}
    row["macs"] = entry["macs"]
    row |= {f"images_per_second_{name}": entry["images_per_second"][name] for name in ("median", "p10", "p90")}
    fields = ("mean", "low", "high", "sd", "p_value", "p_holm", "detectable", "verdict")
    return row | {f"difference_{name}": difference.get(name) for name in fields}
