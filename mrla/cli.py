"""The commands: parse, call, print."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table

from mrla.models.near_names import nearest
from mrla.train.recipes import (
    ALL_DATA_KINDS,
    ARMS,
    RECIPES,
    DetectorOptions,
    Machine,
    Recipe,
    as_dict,
    from_dict,
    get_recipe,
)

DEFAULT_RECIPE = "digits_resnet18"
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words of the command line after ``mrla``; those of this process if not given.

    Returns:
        The exit code: 0, or 2 after one line on standard error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except (ArgumentError, ValueError, TypeError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        extra = "dense" if error.name in ("pycocotools", "faster_coco_eval") else "train"
        return _fail(f"{error.name} is not installed, and this command needs it: pip install 'mrla[{extra}]'")
    except KeyboardInterrupt:
        print("mrla: interrupted; the same command goes on after the last finished epoch", file=sys.stderr)
        return 130


def train_command(words: Sequence[str]) -> int:
    """Train one network from a recipe; started again with the same --out it goes on where it stopped."""
    parser = _recipe_parser("train", words, train_command)
    parser.add_argument("--out", type=str, default=None, help="Folder of the run (runs/RECIPE-ARM-seedN)")
    _add_switch(parser, "--progress", "Whether a progress bar is shown")
    options = _parse(parser, words)
    recipe = _recipe_from(options)
    from mrla.train.fitting import train

    out = Path(options["out"] or Path("runs") / f"{recipe.recipe}-{recipe.arm}-seed{recipe.seed}")
    run = train(recipe, out, progress=options["progress"])
    if not run.is_main_process:
        return 0
    table = Table(title=f"{recipe.arm}, {recipe.model}, seed {recipe.seed}")
    shown = [name for name in _RUN_COLUMNS if name in run.result["last"]]
    for heading in ("epoch", *(_RUN_COLUMNS[name] for name in shown)):
        table.add_column(heading, justify="right")
    for name in ("best", "last"):
        row = run.result[name]
        table.add_row(f"{name} ({row['epoch']})", *(f"{row[key]:.4f}" for key in shown))
    console = _console()
    console.print(table)
    console.print(f"{run.result['seconds']:.1f} s. Weights, history and checkpoints are in {out}/", highlight=False)
    console.print(f"Look at it again: mrla eval {out}", highlight=False)
    return 0


def compare_command(words: Sequence[str]) -> int:
    """Train with and without layer attention over several seeds and say which is better, or that it is not resolved."""
    parser = _recipe_parser("compare", words, compare_command, skip={"arm"})
    parser.add_argument("--arms", type=str, default="plain,light", help=f"Baseline first, of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=5, help="Seeds of each arm, counted up from --seed")
    parser.add_argument("--out", type=str, default=None, help="Folder of the comparison (runs/compare-RECIPE)")
    parser.add_argument("--jobs", type=int, default=None, help="Runs at once (as many as there are cores for)")
    _add_switch(parser, "--progress", "Whether a progress bar is shown")
    options = _parse(parser, words)
    from mrla.analysis import compare

    with _progress(options["progress"]) as on_progress:
        result = compare(
            _recipe_from({**options, "arm": "plain"}),
            arms=[arm.strip() for arm in options["arms"].split(",")],
            seeds=options["seeds"],
            out=options["out"],
            jobs=options["jobs"],
            on_progress=on_progress,
        )
    print_comparison(result.content, result.folder)
    return 0


def eval_command(words: Sequence[str]) -> int:
    """Accuracy, loss and cost of a trained network, on the data it was trained with or on others."""
    kind = _word_after(words, "--data.kind")
    parser = _parser("eval", eval_command)
    parser.add_argument("checkpoint", type=str, help="A folder of a run or of mrla.save, hf-hub:owner/name, or a .ckpt")
    parser.add_argument("--split", type=str, default="val", help="val, test or train")
    parser.add_argument("--batch_size", type=int, default=64, help="Images in one batch")
    if kind is not None:
        parser.add_class_arguments(_data_class(kind), "data")
    else:
        parser.add_argument("--data.root", type=str, default=None, help="Where the images are, if they have moved")
        parser.add_argument("--data.kind", type=str, default=None, help=f"Other images: {', '.join(ALL_DATA_KINDS)}")
    parser.add_class_arguments(Machine, "machine")
    options = _parse(parser, words)
    from mrla.analysis.evaluation import evaluate_checkpoint

    report = evaluate_checkpoint(
        options["checkpoint"],
        data=_data_class(kind)(**options["data"]) if kind is not None else None,
        root=None if kind is not None else options["data"]["root"],
        split=options["split"],
        batch_size=options["batch_size"],
        machine=Machine(**options["machine"]),
    )
    table = Table(
        title=f"{options['checkpoint']}: {report['split']} part, {report['images']} images", show_header=False
    )
    rate = report["images_per_second"]
    for name, value in {
        **{words: f"{report[name]:.4f}" for name, words in _SCORES.items() if name in report},
        "parameters (trainable)": f"{report['parameters']['trainable']:,}",
        "with BatchNorm statistics": f"{report['parameters']['with_statistics']:,}",
        **({"MACs an image": f"{report['macs'] / 1e6:,.2f} M"} if "macs" in report else {}),
        "images a second": f"{rate['median']:,.0f} ({rate['p10']:,.0f} to {rate['p90']:,.0f}, 10 to 90 %)",
        "measured with": f"batch {rate['batch_size']}, {rate['threads']} threads, {rate['rounds']} rounds",
    }.items():
        table.add_row(name, value)
    _console().print(table)
    return 0


def predict_command(words: Sequence[str]) -> int:
    """Draw what a trained network finds in images: boxes and masks with names, or the most likely classes."""
    parser = _parser("predict", predict_command)
    parser.add_argument("checkpoint", type=str, help="A folder of a run or of mrla.save, or a .ckpt")
    parser.add_argument("images", type=str, nargs="+", help="Image files")
    parser.add_argument("--out", type=str, default="predictions", help="Folder for the drawings and predictions.json")
    parser.add_argument("--score_thresh", type=float, default=0.5, help="Below what score a detection is left out")
    parser.add_argument("--top", type=int, default=5, help="How many classes are given")
    parser.add_class_arguments(Machine, "machine")
    _add_switch(parser, "--progress", "Whether a progress bar is shown")
    options = _parse(parser, words)
    from mrla.analysis.prediction import predict

    with _progress(options["progress"], "images") as on_progress:
        found = predict(
            options["checkpoint"],
            options["images"],
            options["out"],
            score_thresh=options["score_thresh"],
            top=options["top"],
            machine=Machine(**options["machine"]),
            on_progress=on_progress,
        )
    table = Table(title=f"{options['checkpoint']}: {len(found)} images")
    table.add_column("image")
    table.add_column("found" if "labels" in found[0] else "most likely")
    for entry in found:
        shown = [f"{name} {100 * score:.0f} %" for name, score in zip(entry["names"], entry["scores"], strict=True)]
        table.add_row(entry["file"], ", ".join(shown) or "nothing")
    console = _console()
    console.print(table)
    console.print(f"Drawn in {options['out']}/", highlight=False)
    return 0


def convert_command(words: Sequence[str]) -> int:
    """Write a checkpoint of the released code or of the Paddle notebook as safetensors with our names."""
    parser = _parser("convert", convert_command)
    parser.add_argument(
        "checkpoint", type=str, help="A .pth, .pth.tar, .safetensors or .pdparams file; its code is not run"
    )
    parser.add_argument("target", type=str, help="The .safetensors file to write")
    parser.add_argument("--arch", type=str, required=True, help="The foreign name, such as resnet50_mrlal")
    parser.add_argument("--se", type=bool, default=False, help="Whether its blocks have squeeze-and-excitation")
    parser.add_argument("--eca", type=str, default="", help="Kernel sizes of its blocks' ECA by stage, such as 5,5,5,7")
    parser.add_argument("--img_size", type=int, default=None, help="Image size to resample a DeiT's positions to")
    options = _parse(parser, words)
    from mrla.models import REFERENCES, convert, network_arguments

    overrides: dict[str, Any] = {"se": True} if options["se"] else {}
    if options["eca"]:
        overrides["eca"] = _kernel_sizes(options["eca"])
    if options["img_size"] is not None:
        overrides["img_size"] = options["img_size"]
    model = convert(options["checkpoint"], options["target"], options["arch"], **overrides)
    built_with = "".join(f"{name}={value!r}, " for name, value in network_arguments(model).items())
    print(
        f"{options['target']} is written. It is read, after `import mrla`, by\n"
        f"timm.create_model({REFERENCES[options['arch']].network!r}, {built_with}checkpoint_path={options['target']!r})"
    )
    return 0


def models_command(words: Sequence[str]) -> int:
    """List the named networks with their parameters and multiply-accumulates."""
    parser = _parser("models", models_command)
    parser.add_argument("filter", type=str, nargs="?", default="*", help="Names to list, such as 'resnet50*'")
    options = _parse(parser, words)
    from mrla.analysis.catalogue import list_networks

    table = Table(title="Networks of mrla, for timm.create_model after `import mrla`")
    table.add_column("name", no_wrap=True)
    for heading in ("image", "parameters", "with BN statistics", "MACs (G)"):
        table.add_column(heading, justify="right")
    for network in list_networks(options["filter"]):
        counts = network["parameters"]
        table.add_row(
            network["name"],
            "x".join(map(str, network["input_size"][1:])),
            *(f"{counts['trainable']:,}", f"{counts['with_statistics']:,}", f"{network['macs'] / 1e9:.3f}"),
        )
    _console().print(table)
    return 0


def chains_command(words: Sequence[str]) -> int:
    """Show the chains of blocks that mrla.attach finds in a network, and which blocks would get a mixer."""
    parser = _parser("chains", chains_command)
    parser.add_argument(
        "model", type=str, help="A name of timm, torchvision/NAME, a folder of mrla.save or hf-hub:owner/name"
    )
    parser.add_argument("--blocks", type=str, default=None, help="Containers to look at, such as 'stages.*.blocks'")
    options = _parse(parser, words)
    from mrla.analysis.catalogue import describe_chains

    table = Table(title=f"Chains of {options['model']}, for a batch of two images")
    for heading in ("container", "blocks with a mixer", "output", "layout", "prefix", "shortcut"):
        table.add_column(heading)
    for chain in describe_chains(options["model"], options["blocks"]):
        known = {chain.shortcuts.get(name, "not known") for name in chain.served}
        shape = "x".join(map(str, chain.shape))
        prefix = str(chain.num_prefix_tokens) if chain.layout == "NLC" else ""
        table.add_row(chain.name, ", ".join(chain.served), shape, chain.layout, prefix, ", ".join(sorted(known)))
    _console().print(table)
    return 0


def bench_command(words: Sequence[str]) -> int:
    """Measure what arms cost against the plain network: inference, training step, memory; over a sweep if asked."""
    parser = _parser("bench", bench_command)
    parser.add_argument("--config", action="config", help="A YAML file, as --print_config prints it")
    for flag, kind, default, text in _BENCH_FLAGS:
        parser.add_argument(f"--{flag}", type=kind, default=default, help=text)
    _add_switch(parser, "--progress", "Whether a progress bar is shown")
    options = _parse(parser, words)
    options.pop("config")
    progress = options.pop("progress")
    for name in ("arms", "quantities"):
        options[name] = [word.strip() for word in options[name].split(",")] if options[name].strip() else []
    if options["values"] is not None:
        options["values"] = _whole_numbers("--values", options["values"])
    from mrla.analysis import benchmark

    try:
        with _progress(progress, "rounds") as on_progress:
            result = benchmark(**options, on_progress=on_progress)
    except KeyboardInterrupt:
        print("mrla: interrupted; nothing is written", file=sys.stderr)
        return 130
    print_benchmark(result.content, result.folder)
    return 0


_BENCH_FLAGS: tuple[tuple[str, Any, Any, str], ...] = (
    ("model", str, "resnet18_cifar", "The plain network: a name of timm, torchvision/NAME or a folder of mrla.save"),
    (
        "arms",
        str,
        "plain,light,base",
        "Baseline first, each NAME[+STATE...]. NAME: plain, light, base, exact, dw or any network's name; STATE: "
        "fused, reference, compiled, onnx, openvino",
    ),
    ("quantities", str, "inference,training,memory", "What is measured"),
    ("image_size", int | None, None, "Side of the square images (the network's own)"),
    ("in_chans", int | None, None, "Channels of the images (the network's own)"),
    ("batch_size", int, 64, "Images in a batch"),
    ("rounds", int, 10, "Timed rounds; each arm runs once a round"),
    ("warmup", int, 2, "Rounds before them that are not timed"),
    ("dtype", str, "float32", "float32, bfloat16, float16 or float64, of weights and images"),
    ("memory_format", str, "contiguous", "contiguous or channels_last"),
    ("device", str, "cpu", "cpu or cuda"),
    ("threads", int | None, None, "Threads of the CPU (as many as torch takes)"),
    ("sweep", str | None, None, "What is varied: batch, depth, resolution or blocks"),
    ("values", str | None, None, "What the sweep gives it, such as 1,8,64"),
    ("out", str | None, None, "Folder of the results (runs/bench-MODEL)"),
)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "compare": compare_command,
    "train": train_command,
    "eval": eval_command,
    "bench": bench_command,
    "predict": predict_command,
    "models": models_command,
    "chains": chains_command,
    "convert": convert_command,
}


def print_comparison(content: Mapping[str, Any], folder: Path) -> None:
    """Prints what ``compare.json`` holds: the table, the differences and the verdict.

    Args:
        content: The content of ``compare.json``.
        folder: Where it is.
    """
    console = _console()
    recipe = content["recipe"]
    table = Table(
        title=f"{recipe['recipe']}: {recipe['model']}, {len(content['seeds'])} seeds, {recipe['epochs']} epochs"
    )
    table.add_column("arm", no_wrap=True)
    columns = {
        "train_accuracy": "train acc. (%)",
        "val_accuracy": "val acc. (%), last epoch",
        "best_val_accuracy": "val acc. (%), best epoch",
        "val_box_ap": "box AP (%), last epoch",
        "best_val_box_ap": "box AP (%), best epoch",
        "val_box_ap50": "box AP50 (%)",
        "val_mask_ap": "mask AP (%)",
    }
    columns = {name: heading for name, heading in columns.items() if name in content["table"][content["arms"][0]]}
    for heading in (*columns.values(), "params", "MACs (M)", "images/s (10 to 90 %)"):
        table.add_column(heading, justify="right", overflow="fold")
    for arm in content["arms"]:
        entry = content["table"][arm]
        rate = entry["images_per_second"]
        table.add_row(
            arm,
            *(_percent(entry[name]) for name in columns),
            f"{entry['parameters']['trainable']:,}",
            "-" if entry["macs"] is None else f"{entry['macs'] / 1e6:.2f}",
            f"{rate['median']:,.0f} ({rate['p10']:,.0f} to {rate['p90']:,.0f})",
        )
    console.print(table)
    for arm, difference in content["differences"].items():
        console.print(f"[bold]{arm} against {difference['baseline']}:[/bold] {difference['reason']}", highlight=False)
    console.print(f"\n{content['note']}", style="dim")
    console.print(
        f"{content['seconds']:.0f} s. {folder}/compare.json, table.csv, history.csv, curves.png", highlight=False
    )


def print_benchmark(content: Mapping[str, Any], folder: Path) -> None:
    """Prints what ``bench.json`` holds as one table.

    Args:
        content: The content of ``bench.json``.
        folder: Where it is.
    """
    from mrla.analysis.benchmark_tables import table, title

    headings, lines = table(content)
    console = _console()
    shown = Table(title=title(content))
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    sweep = content["configuration"]["sweep"] is not None
    arms = len(content["configuration"]["arms"])
    for index, line in enumerate(lines):
        shown.add_row(*line, end_section=sweep and (index + 1) % arms == 0)
    console.print(shown)
    for note in content["notes"]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(f"\n{content['note']}", style="dim")
    console.print(f"{content['seconds']:.0f} s. {folder}/bench.json, bench.png, bench.svg", highlight=False)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _print_overview()
        return 0
    if words[0] == "--version":
        print(f"mrla {version('mrla')}")
        return 0
    if words[0] not in COMMANDS:
        raise ValueError(
            f"the command must be one of {', '.join(COMMANDS)}: got {words[0]!r}{nearest(words[0], COMMANDS)}"
        )
    try:
        return COMMANDS[words[0]](words[1:])
    except SystemExit as leave:  # --help and --print_config
        return int(leave.code or 0)


def _print_overview() -> None:
    print("usage: mrla COMMAND [OPTIONS]\n\nLayer attention for vision networks: train it, and see whether it helps.\n")
    for name, command in COMMANDS.items():
        print(f"  mrla {name:<8} {(command.__doc__ or '').splitlines()[0]}")
    print("\nRecipes: " + ", ".join(RECIPES) + "\nOptions of a command: mrla COMMAND --help")


def _parser(name: str, command: Callable[..., int]) -> ArgumentParser:
    return ArgumentParser(prog=f"mrla {name}", description=command.__doc__, exit_on_error=False)


def _recipe_parser(
    name: str, words: Sequence[str], command: Callable[..., int], skip: set[str] | None = None
) -> ArgumentParser:
    """A parser of every field of a recipe; which recipe, and which images, must be known before it is made."""
    parser = _parser(name, command)
    parser.add_argument("--config", action="config", help="A YAML file, as --print_config prints it")
    given = _config_of(words)
    recipe = get_recipe(_word_after(words, "--recipe") or given.get("recipe") or DEFAULT_RECIPE)
    defaults = as_dict(recipe)
    data = given.get("data")
    kind = _word_after(words, "--data.kind") or (data.get("kind") if isinstance(data, dict) else None)
    if kind is not None and kind != recipe.data.kind:
        defaults["data"] = vars(_data_class(kind)())
    parser.add_argument("--recipe", type=str, default=recipe.recipe, help=f"One of {', '.join(RECIPES)}")
    parser.add_class_arguments(Recipe, None, skip={"recipe", "data", "detector", *(skip or ())})
    if recipe.detector is not None:
        parser.add_class_arguments(DetectorOptions, "detector")
    else:
        del defaults["detector"]
    parser.add_class_arguments(_data_class(defaults["data"]["kind"]), "data")
    parser.set_defaults({key: value for key, value in defaults.items() if key not in (skip or ())})
    return parser


def _recipe_from(options: Mapping[str, Any]) -> Recipe:
    return from_dict({name: options.get(name) for name in as_dict(get_recipe(DEFAULT_RECIPE))})


def _config_of(words: Sequence[str]) -> dict[str, Any]:
    path = _word_after(words, "--config")
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config must be a YAML file: {path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config must be a YAML file as --print_config prints it: {path} holds no settings")
    return content


def _word_after(words: Sequence[str], flag: str) -> str | None:
    for index, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and index + 1 < len(words):
            return words[index + 1]
    return None


def _data_class(kind: str) -> Any:
    if kind not in ALL_DATA_KINDS:
        known = ", ".join(ALL_DATA_KINDS)
        raise ValueError(f"data.kind must be one of {known}: got {kind!r}{nearest(kind, ALL_DATA_KINDS)}")
    return ALL_DATA_KINDS[kind]


def _parse(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    try:
        return parser.parse_args(list(words)).as_dict()
    except ArgumentError as error:
        message = " ".join(str(error).split())
        if unknown := re.search(r"unrecognized arguments: (--[^\s=]+)", message, flags=re.IGNORECASE):
            flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
            raise ValueError(f"{parser.prog} has no flag {unknown[1]}{nearest(unknown[1], flags)}") from error
        if wrong := re.search(r'Parser key "([\w.]+)": Expected a (.+)\. Got value: (.*)$', message):
            key, rule, given = wrong.groups()
            names = re.findall(r"'([^']*)'", rule) if "Literal" in rule else []
            rule = f"one of {', '.join(names)}" if names else re.sub(r"<class '(\w+)'>", r"\1", rule)
            raise ValueError(f"{key} must be {rule}: got {given!r}{nearest(given, names)}") from error
        raise ValueError(message) from error


def _kernel_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise ValueError(f"--eca takes one kernel size for each stage, such as 5,5,5,7: got {text!r}") from error


def _whole_numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{flag} takes whole numbers, such as 1,8,64: got {text!r}") from error


def _add_switch(parser: ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, type=bool, default=sys.stderr.isatty(), help=f"{text} (true on a terminal)")


class _progress:
    """A bar over all epochs of all runs, or all rounds, with the time that is left."""

    def __init__(self, shown: bool, text: str = "epochs of all runs"):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)

    def __enter__(self) -> Callable[[int, int], None]:
        self.bar.start()
        task = self.bar.add_task("", total=None)
        return lambda done, total: self.bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _percent(spread: Mapping[str, Any]) -> str:
    sd = "" if spread["sd"] is None else f" ± {100 * spread['sd']:.2f}"
    return f"{100 * spread['mean']:.2f}{sd}"


def _console() -> Console:
    # A pipe or a log has no width of its own; a table squeezed into 80 columns loses its numbers.
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "140")))


def _fail(message: str) -> int:
    print(f"mrla: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
