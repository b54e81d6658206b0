"""The commands that write networks in other forms."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mrla.messages.one_line import one_line

from .parsing import add_study_flags, again, command_parser, listed, parse, study_options
from .printing import console_of_width, print_pruning, progress_bar


def export_command(words: Sequence[str]) -> int:
    """Write a trained network as a file for another engine, run that file, and compare its outputs."""
    from mrla.deploy.formats import FORMATS, get_format

    parser = command_parser("export", export_command)
    parser.add_argument("checkpoint", type=str, help="A folder of a run or of mrla.save, hf-hub:owner/name, or a .ckpt")
    parser.add_argument("--format", type=str, default="onnx", help=f"One of {', '.join(FORMATS)}")
    *first, last = (format.suffix for format in FORMATS.values())
    text = f"The file (CHECKPOINT{', '.join(first)} or {last}, here)"
    parser.add_argument("--out", type=str, default=None, help=text)
    parser.add_argument("--fuse", type=bool, default=False, help="Whether norms are folded first, as by mrla.fuse")
    parser.add_argument(
        "--dynamic_size", type=bool, default=True, help="Whether images may have any size, if the network can take it"
    )
    parser.add_argument(
        "--tolerance", type=float | None, default=None, help="Largest difference, of the largest output"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="Whether a file that is there is replaced")
    options = parse(parser, words)
    suffix = get_format(options["format"]).suffix
    from mrla.analysis.evaluation.exported_checkpoints import export_checkpoint
    from mrla.deploy import ExportMismatch

    checkpoint = Path(options["checkpoint"])
    name = checkpoint.stem if checkpoint.is_file() else checkpoint.name
    out = options["out"] or f"{name}{suffix}"
    arguments = {name: options[name] for name in ("format", "fuse", "dynamic_size", "tolerance", "overwrite")}
    try:
        made = export_checkpoint(options["checkpoint"], out, **arguments)
    except ExportMismatch as error:
        print(f"mrla: {one_line(error)}", file=sys.stderr)
        return 1
    table = Table(title=f"{made.path}: {made.format}, against the network")
    table.add_column("input")
    table.add_column("largest difference, of the largest output", justify="right")
    for one in made.compared:
        table.add_row("x".join(map(str, one.shape)), f"{one.difference:.1e}")
    console = console_of_width()
    console.print(table)
    console.print(f"Allowed: {made.bound:.0e}. Of any size: {', '.join(made.facts.dynamic)}.")
    if made.fixed_because is not None:
        console.print(f"Height and width are fixed: {made.fixed_because}")
    console.print(f"Try it: {again(f'mrla predict {made.path} IMAGE', words)}")
    return 0


def prune_command(words: Sequence[str]) -> int:
    """Take mixers off a trained classifier where that is shown to lose less than a margin, and save what is left."""
    parser = command_parser("prune", prune_command)
    parser.add_argument("checkpoint", type=str, help="A folder of a run or of mrla.save, hf-hub:owner/name, or a .ckpt")
    parser.add_argument(
        "--keep",
        type=str,
        default="needed",
        help="needed (all but those without which the network is shown to lose less than the margin), how many stay, "
        "or blocks such as layer3.1,layer4.0; refused where what is left is not shown to lose less",
    )
    parser.add_argument("--out", type=str, default=None, help="New folder of the pruned network (CHECKPOINT/pruned)")
    add_study_flags(parser, words)
    options = parse(parser, words)
    from mrla.analysis.explanation.pruned_checkpoints import prune_checkpoint

    with progress_bar(options["progress"], "passes over the images") as on_progress:
        folder, pruned = prune_checkpoint(
            options["checkpoint"],
            keep=_kept(options["keep"]),
            **study_options(parser, options, words),
            on_progress=on_progress,
        )
    print_pruning(pruned, folder)
    return 0


def _kept(text: str) -> int | list[str] | None:
    if text == "needed":
        return None
    try:
        return int(text)
    except ValueError:
        return listed(text)


def convert_command(words: Sequence[str]) -> int:
    """Write a checkpoint of the released code or of the Paddle notebook as a folder of mrla.save, or as safetensors."""
    parser = command_parser("convert", convert_command)
    parser.add_argument(
        "checkpoint", type=str, help="A .pth, .pth.tar, .safetensors or .pdparams file; its code is not run"
    )
    parser.add_argument("target", type=str, help="The folder to write, which all commands take, or .safetensors file")
    parser.add_argument("--arch", type=str, required=True, help="The foreign name, such as resnet50_mrlal")
    parser.add_argument("--se", type=bool, default=False, help="Whether its blocks have squeeze-and-excitation")
    parser.add_argument("--eca", type=str, default="", help="Kernel sizes of its blocks' ECA by stage, such as 5,5,5,7")
    parser.add_argument("--img_size", type=int, default=None, help="Image size to resample a DeiT's positions to")
    options = parse(parser, words)
    from mrla.models import REFERENCES, convert, network_arguments

    overrides: dict[str, Any] = {"se": True} if options["se"] else {}
    if options["eca"]:
        overrides["eca"] = _kernel_sizes(options["eca"])
    if options["img_size"] is not None:
        overrides["img_size"] = options["img_size"]
    model = convert(options["checkpoint"], options["target"], options["arch"], **overrides)
    if Path(options["target"]).is_dir():
        print(
            f"{options['target']}/ is written: mrla eval {options['target']} --data.kind folder --data.root DIR scores "
            f"it, mrla train --recipe finetune --arm plain --model {options['target']} --data.root DIR trains it on"
        )
        return 0
    built_with = "".join(f"{name}={value!r}, " for name, value in network_arguments(model).items())
    print(
        f"{options['target']} is written. It is read, after `import mrla`, by\n"
        f"timm.create_model({REFERENCES[options['arch']].network!r}, {built_with}checkpoint_path={options['target']!r})"
    )
    return 0


def _kernel_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise ValueError(f"--eca takes one kernel size for each stage, such as 5,5,5,7: got {text!r}") from error
