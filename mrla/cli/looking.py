"""The commands that look at networks: what they find, what they are made of."""

import sys
from collections.abc import Sequence

from rich.table import Table

from mrla.train.recipe import Machine

from .parsing import add_progress_flag, add_study_flags, again, command_parser, listed, parse, study_options
from .printing import console_of_width, progress_bar
from .tables import counted, number_tables


def predict_command(words: Sequence[str]) -> int:
    """Draw what a trained network finds in images: boxes and masks with names, or the most likely classes."""
    parser = command_parser("predict", predict_command)
    parser.add_argument(
        "checkpoint", type=str, help="A folder of a run or of mrla.save, a .ckpt, or a file of mrla export"
    )
    parser.add_argument("images", type=str, nargs="+", help="Image files, and folders of them")
    parser.add_argument("--out", type=str, default="predictions", help="Folder for the drawings and predictions.json")
    parser.add_argument("--score_thresh", type=float, default=0.5, help="Below what score a detection is left out")
    parser.add_argument("--top", type=int, default=5, help="How many classes are given")
    parser.add_class_arguments(Machine, "machine")
    add_progress_flag(parser)
    options = parse(parser, words)
    from mrla.analysis.evaluation.prediction import predict

    with progress_bar(options["progress"], "images") as on_progress:
        found = predict(
            options["checkpoint"],
            options["images"],
            options["out"],
            score_thresh=options["score_thresh"],
            top=options["top"],
            machine=Machine(**options["machine"]),
            on_progress=on_progress,
        )
    read = [entry for entry in found if "error" not in entry]
    table = Table(title=f"{options['checkpoint']}: {counted(len(read), 'image')}")
    table.add_column("image")
    table.add_column("found" if "labels" in read[0] else "most likely")
    for entry in read:
        shown = [f"{name} {100 * score:.0f} %" for name, score in zip(entry["names"], entry["scores"], strict=True)]
        table.add_row(entry["file"], ", ".join(shown) or "nothing")
    console = console_of_width()
    console.print(table)
    console.print(f"Drawn in {options['out']}/")
    unread = [entry["error"] for entry in found if "error" in entry]
    for error in unread:
        print(f"mrla: not read: {error}", file=sys.stderr)
    return 1 if unread else 0


def explain_command(words: Sequence[str]) -> int:
    """Show what each block takes from the others, what ablating it costs, and where the network looks; as a page."""
    parser = command_parser("explain", explain_command)
    parser.add_argument("checkpoint", type=str, help="A folder of a run or of mrla.save, or a .ckpt, with mixers")
    parser.add_argument(
        "images", type=str, nargs="*", help="Image files to look at one by one (four validation images)"
    )
    parser.add_argument("--out", type=str, default=None, help="New folder of the explanation (runs/explain-CHECKPOINT)")
    parser.add_argument(
        "--cuts",
        type=str | None,
        default=None,
        help="What is cut, of mixers,links,heads (mixers,links); '' for nothing",
    )
    add_study_flags(parser, words)
    options = parse(parser, words)
    from mrla.analysis.explanation.checkpoints import explain_checkpoint
    from mrla.analysis.explanation.explaining import MAPS
    from mrla.analysis.explanation.margins import MARGIN

    with progress_bar(options["progress"], "passes over batches") as on_progress:
        found = explain_checkpoint(
            options["checkpoint"],
            options["images"],
            cuts=None if options["cuts"] is None else listed(options["cuts"]),
            **study_options(parser, options, words),
            on_progress=on_progress,
        )
    console = console_of_width()
    headline, *more = found.content["verdict"]
    console.print(headline, style="bold")
    for sentence in more:
        console.print(sentence)
    console.print(f"\n{found.content['note']}", style="dim")
    files = ", ".join(["report.html", "explain.json", *([MAPS] if found.content["chains"] else [])])
    console.print(f"{found.content['seconds']:.0f} s. {found.folder}/{files}")
    # Only where pruning on the same images would take off that mixer at least.
    if ((found.content["cuts"] or {}).get("least") or {}).get("shown"):
        margin = "" if options["margin"] == MARGIN else f" --margin {options['margin']:g}"
        prune = f"mrla prune {options['checkpoint']}{margin}"
        console.print(f"To see how many of them together: {again(prune, words)}")
    return 0


def models_command(words: Sequence[str]) -> int:
    """List the named networks with their parameters and multiply-accumulates."""
    parser = command_parser("models", models_command)
    parser.add_argument("filter", type=str, nargs="?", default="*", help="Names to list, such as 'resnet50*'")
    options = parse(parser, words)
    from mrla.analysis.catalogue import list_networks

    title, console = "Networks of mrla, for timm.create_model after `import mrla`", console_of_width()
    headings = ["name", "parameters", "MACs (G)", "with BN statistics", "image"]
    rows = []
    for network in list_networks(options["filter"]):
        counts, side = network["parameters"], "x".join(map(str, network["input_size"][1:]))
        numbers = f"{counts['trainable']:,}", f"{network['macs'] / 1e9:.3f}", f"{counts['with_statistics']:,}"
        rows.append([network["name"], *numbers, side])
    first, *below = number_tables(title, headings, rows, width=console.width)
    console.print(first)
    if below:  # the list is long: what does not fit is left out rather than listed below
        left_out = headings[len(first.columns) :]
        console.print(f"Left out in {console.width} columns: {', '.join(left_out)}.")
    return 0


def chains_command(words: Sequence[str]) -> int:
    """Show the chains of blocks that mrla.attach finds in a network, and which blocks would get a mixer."""
    parser = command_parser("chains", chains_command)
    parser.add_argument(
        "model", type=str, help="A name of timm, torchvision/NAME, a folder of mrla.save or hf-hub:owner/name"
    )
    parser.add_argument("--blocks", type=str, default=None, help="Containers to look at, such as 'stages.*.blocks'")
    options = parse(parser, words)
    from mrla.analysis.catalogue import describe_chains

    table = Table(title=f"Chains of {options['model']}, for a batch of two images")
    for heading in ("container", "blocks with a mixer", "output", "layout", "prefix", "shortcut"):
        table.add_column(heading, no_wrap=heading in ("output", "layout", "prefix"))
    for chain in describe_chains(options["model"], options["blocks"]):
        known = {chain.shortcuts.get(name, "not known") for name in chain.served}
        shape = "x".join(map(str, chain.shape))
        prefix = str(chain.num_prefix_tokens) if chain.layout == "NLC" else ""
        table.add_row(chain.name, ", ".join(chain.served), shape, chain.layout, prefix, ", ".join(sorted(known)))
    console_of_width().print(table)
    return 0
