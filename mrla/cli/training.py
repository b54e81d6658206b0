"""The commands that train and score networks."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mrla.train.arm_names import folder_name, known_arms
from mrla.train.recipe import Machine

from .parsing import (
    add_data_flags,
    add_progress_flag,
    again,
    command_parser,
    fitting_epochs,
    listed,
    parse,
    recipe_from,
    recipe_parser,
    shown_data,
)
from .printing import console_of_width, print_comparison, progress_bar
from .tables import counted, number_tables

_RUN_COLUMNS = {
    "train_loss": "train loss",
    "train_accuracy": "train accuracy",
    "val_loss": "val loss",
    "val_accuracy": "val accuracy",
    "val_box_ap": "box AP",
    "val_box_ap50": "box AP50",
    "val_mask_ap": "mask AP",
    "val_mask_ap50": "mask AP50",
}


_SCORES = {"accuracy": "top-1 accuracy", "accuracy_top5": "top-5 accuracy", "loss": "loss"} | {
    f"{kind}_{name}": f"{kind} {words}"
    for kind in ("box", "mask")
    for name, words in {
        "ap": "AP",
        "ap50": "AP50",
        "ap75": "AP75",
        "ap_small": "AP, small (-1: none)",
        "ap_medium": "AP, medium (-1: none)",
        "ap_large": "AP, large (-1: none)",
    }.items()
}
_FINISHED = "{}/ was finished before: nothing was trained now. Another --out trains anew"


def train_command(words: Sequence[str]) -> int:
    """Train one network from a recipe; started again with the same --out it goes on where it stopped."""
    parser = recipe_parser("train", words, train_command)
    parser.add_argument("--out", type=str, default=None, help="Folder of the run (runs/RECIPE-ARM-seedN)")
    add_progress_flag(parser)
    options = fitting_epochs(parse(parser, words), words)
    recipe = recipe_from(options)
    from mrla.train.fitting import train

    out = Path(options["out"] or Path("runs") / f"{recipe.recipe}-{folder_name(recipe.arm)}-seed{recipe.seed}")
    run = train(recipe, out, progress=options["progress"], command=shlex.join([*parser.prog.split(), *words]))
    if not run.is_main_process:
        return 0
    shown = [name for name in _RUN_COLUMNS if name in run.result["last"]]
    chosen = {name: run.result[name] for name in ("best", "last")}
    rows = [[f"{name} ({row['epoch']})", *(f"{row[key]:.4f}" for key in shown)] for name, row in chosen.items()]
    console = console_of_width()
    title = f"{recipe.arm}, {recipe.model}, seed {recipe.seed}"
    headings = ["epoch", *(_RUN_COLUMNS[name] for name in shown)]
    for table in number_tables(title, headings, rows, width=console.width):
        console.print(table)
    if run.was_finished:
        console.print(_FINISHED.format(out))
    console.print(f"{run.result['seconds']:.1f} s. Weights, history and checkpoints are in {out}/")
    console.print(f"Look at it again: {again(f'mrla eval {out}', words)}")
    return 0


_ARMS_HELP = "Baseline first, of {}; with options as in base:last=3"


def compare_command(words: Sequence[str]) -> int:
    """Train with and without layer attention over several seeds and say which is better, or that it is not resolved."""
    parser = recipe_parser("compare", words, compare_command, skip={"arm"})
    parser.add_argument("--arms", type=str, default="plain,light", help=_ARMS_HELP.format(", ".join(known_arms())))
    parser.add_argument("--seeds", type=int, default=5, help="Seeds of each arm, counted up from --seed")
    parser.add_argument("--out", type=str, default=None, help="Folder of the comparison (runs/compare-RECIPE)")
    parser.add_argument("--jobs", type=int, default=None, help="Runs at once (as many as there are cores for)")
    add_progress_flag(parser)
    options = fitting_epochs(parse(parser, words), words)
    from mrla.analysis import compare

    with progress_bar(options["progress"]) as on_progress:
        result = compare(
            recipe_from({**options, "arm": "plain"}),
            arms=listed(options["arms"]),
            seeds=options["seeds"],
            out=options["out"],
            jobs=options["jobs"],
            on_progress=on_progress,
        )
    print_comparison(result.content, result.folder)
    if result.was_finished:
        console_of_width().print(_FINISHED.format(result.folder))
    return 0


def eval_command(words: Sequence[str]) -> int:
    """Accuracy, loss and cost of a trained network, on the data it was trained with or on others."""
    parser = command_parser("eval", eval_command)
    text = "A folder of a run or of mrla.save, hf-hub:owner/name, a .ckpt, or a file of mrla export"
    parser.add_argument("checkpoint", type=str, help=text)
    add_data_flags(parser, words)
    parser.add_argument("--speed", type=bool, default=False, help="Whether images a second are measured: 33 passes")
    parser.add_class_arguments(Machine, "machine")
    options = parse(parser, words)
    from mrla.analysis.evaluation.scoring import evaluate_checkpoint

    report = evaluate_checkpoint(
        options["checkpoint"],
        **shown_data(options, words),
        speed=options["speed"],
        machine=Machine(**options["machine"]),
    )
    shown = f"{report['split']} part, {counted(report['images'], 'image')}"
    table = Table(title=f"{options['checkpoint']}: {shown}", show_header=False)
    for name, value in {
        **{words: f"{report[name]:.4f}" for name, words in _SCORES.items() if name in report},
        **_parameter_rows(report.get("parameters")),
        **({"MACs an image": f"{report['macs'] / 1e6:,.2f} M"} if "macs" in report else {}),
        **_speed_rows(report.get("images_per_second")),
    }.items():
        table.add_row(name, value)
    console_of_width().print(table)
    return 0


def _parameter_rows(counts: Mapping[str, int] | None) -> dict[str, str]:
    if counts is None:  # of an exported file they are not known
        return {}
    return {
        "parameters (trainable)": f"{counts['trainable']:,}",
        "with BatchNorm statistics": f"{counts['with_statistics']:,}",
    }


def _speed_rows(rate: Mapping[str, Any] | None) -> dict[str, str]:
    if rate is None:
        return {}
    return {
        "images a second": f"{rate['median']:,.0f} ({rate['p10']:,.0f} to {rate['p90']:,.0f}, 10 to 90 %)",
        "measured with": f"batch {rate['batch_size']}, {rate['threads']} threads, {rate['rounds']} rounds",
    }
