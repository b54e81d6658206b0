"""The command that measures what networks cost."""

from collections.abc import Sequence

from mrla.ops import METHODS

from .parsing import add_progress_flag, command_parser, listed, parse, whole_numbers
from .printing import print_benchmark, progress_bar

_AS_WORDS = (
    ("model", str, "resnet18_cifar", "The plain network: a name of timm, torchvision/NAME or a folder of mrla.save"),
    (
        "arms",
        str,
        "plain,light,base",
        "Baseline first, each NAME[+STATE...]. NAME: plain, {methods}, with options as in base:last=3, or the name of "
        "any network; STATE: {states}",
    ),
    ("quantities", str, "inference,training,memory", "What is measured"),
    ("values", str | None, None, "What the sweep gives it, such as 1,8,64"),
    ("out", str | None, None, "Folder of the results (runs/bench-MODEL)"),
)
"""Arguments of `mrla.benchmark` that are no single word or number; the others' flags are read off its signature."""


def bench_command(words: Sequence[str]) -> int:
    """Measure what arms cost against the plain network: inference, training step, memory; over a sweep if asked."""
    from mrla.analysis import benchmark
    from mrla.analysis.benchmarking.arms import known_states

    parser = command_parser("bench", bench_command)
    parser.add_argument("--config", action="config", help="A YAML file, as --print_config prints it")
    names = {"states": ", ".join(known_states()), "methods": ", ".join(METHODS)}
    for flag, kind, default, text in _AS_WORDS:
        parser.add_argument(f"--{flag}", type=kind, default=default, help=text.format(**names))
    parser.add_function_arguments(benchmark, skip={*(flag for flag, *_ in _AS_WORDS), "on_progress"})
    add_progress_flag(parser)
    options = parse(parser, words)
    options.pop("config")
    progress = options.pop("progress")
    for name in ("arms", "quantities"):
        options[name] = listed(options[name])
    if options["values"] is not None:
        options["values"] = whole_numbers("--values", options["values"])
    with progress_bar(progress, "rounds") as on_progress:
        result = benchmark(**options, on_progress=on_progress)
    print_benchmark(result.content, result.folder)
    return 0
