"""The command that measures what networks cost."""

from collections.abc import Sequence
from typing import Any

from .parsing import add_progress_flag, command_parser, listed, parse, whole_numbers
from .printing import print_benchmark, progress_bar

_BENCH_FLAGS: tuple[tuple[str, Any, Any, str], ...] = (
    ("model", str, "resnet18_cifar", "The plain network: a name of timm, torchvision/NAME or a folder of mrla.save"),
    (
        "arms",
        str,
        "plain,light,base",
        "Baseline first, each NAME[+STATE...]. NAME: plain, light, base, exact, dw or any network's name; "
        "STATE: {states}",
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


def bench_command(words: Sequence[str]) -> int:
    """Measure what arms cost against the plain network: inference, training step, memory; over a sweep if asked."""
    from mrla.analysis.benchmarking.arms import known_states

    parser = command_parser("bench", bench_command)
    parser.add_argument("--config", action="config", help="A YAML file, as --print_config prints it")
    for flag, kind, default, text in _BENCH_FLAGS:
        parser.add_argument(f"--{flag}", type=kind, default=default, help=text.format(states=", ".join(known_states())))
    add_progress_flag(parser)
    options = parse(parser, words)
    options.pop("config")
    progress = options.pop("progress")
    for name in ("arms", "quantities"):
        options[name] = listed(options[name])
    if options["values"] is not None:
        options["values"] = whole_numbers("--values", options["values"])
    from mrla.analysis import benchmark

    with progress_bar(progress, "rounds") as on_progress:
        result = benchmark(**options, on_progress=on_progress)
    print_benchmark(result.content, result.folder)
    return 0
