"""What does recording the attention over layers add to the pass that it records?

    python benchmarks/recording_cost.py [--rounds 25] [--model resnet50] [--size 224] [--batch_size 8] [--out FILE.json]

One pass of an attached network in inference, alone and inside `mrla.models.recording` with the maps made of what was
noted, as `mrla explain` does; both take turns in one process, for light and base. Two minutes on two quiet cores.
"""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from detector_speed import measure, summarise
from result_file import write_result

import mrla
from mrla.models import recording

METHODS = ("light", "base")


def passes(method: str, options: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A pass, and a recorded pass with its maps."""
    torch.manual_seed(0)
    model = mrla.attach(timm.create_model(options.model), method, init="released").eval()
    images = torch.randn(options.batch_size, 3, options.size, options.size)

    def plain() -> Any:
        with torch.inference_mode():
            return model(images)

    def recorded() -> Any:
        with torch.inference_mode(), recording(model) as recorder:
            return model(images), recorder.attention_over_layers()

    if not torch.allclose(plain(), recorded()[0], rtol=1e-3, atol=1e-3 * float(plain().abs().max())):
        raise RuntimeError("a recorded pass must give what the pass gives")
    return plain, recorded


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--model", default="resnet50", help="a timm network")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/recording_cost_HARDWARE_DATE.json)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"rounds must be positive: got {options.rounds}")
    started = datetime.now(UTC)
    made = {method: passes(method, options) for method in METHODS}
    arms = {
        "plain": {method: plain for method, (plain, _) in made.items()},
        "recorded": {method: recorded for method, (_, recorded) in made.items()},
    }
    seconds = measure(arms, options.rounds)
    results = summarise(seconds)
    for method, row in results["recorded"].items():
        print("{} {:.0f} ms, {median:.3f} ({p10:.3f} to {p90:.3f})".format(method, row["ms"], **row["ratio"]))
    write_result("recording_cost", started, options, torch.get_num_threads(), results=results, seconds=seconds)


if __name__ == "__main__":
    main()
