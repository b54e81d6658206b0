"""The commands that write networks in other forms."""

from collections.abc import Sequence
from typing import Any

from .parsing import command_parser, parse


def convert_command(words: Sequence[str]) -> int:
    """Write a checkpoint of the released code or of the Paddle notebook as safetensors with our names."""
    parser = command_parser("convert", convert_command)
    parser.add_argument(
        "checkpoint", type=str, help="A .pth, .pth.tar, .safetensors or .pdparams file; its code is not run"
    )
    parser.add_argument("target", type=str, help="The .safetensors file to write")
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
