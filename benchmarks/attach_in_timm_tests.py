"""A pytest plugin for `timm_tests.py`: networks that timm's tests create get mixers with random weights.

It is loaded with `-p` before timm's test module is imported, so the module's own `create_model` is the attaching one.
Its settings come from the environment, since a plugin that is loaded this early has no command-line options yet:
`MRLA_METHOD`, `MRLA_MODELS` (patterns of names, by spaces) and `MRLA_COUNTS` (the file that the counts go to).
"""

import inspect
import json
import os
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import timm.models
import timm.models._factory as factory
import timm.models._registry as registry
from torch import nn

import mrla

METHOD = os.environ["MRLA_METHOD"]
PATTERNS = os.environ["MRLA_MODELS"].split()
COUNTS = Path(os.environ["MRLA_COUNTS"])

networks: Counter[str] = Counter()
plain_names: dict[str, str] = {}
results: Counter[str] = Counter()
failures: dict[str, str] = {}
refused: list[str] = []

# What a batch of patches gets that has no one grid: NaFlex with padding, or with images of several sizes.
REFUSAL = "the patch embedding did not say them: give the network images of one size"


def _attached(create: Callable[..., Any]) -> Callable[..., Any]:
    def create_model(model_name: str, *args: Any, **keywords: Any) -> Any:
        model = create(model_name, *args, **keywords)
        # timm's wrappers for features hold a whole network, which is where the chains are.
        inner = model if not keywords.get("features_only") else getattr(model, "model", model)
        try:
            mrla.attach(inner, METHOD, init="released")
        except ValueError as refusal:
            networks["plain"] += 1
            plain_names[model_name] = str(refusal).splitlines()[0][:200]
        else:
            networks["attached"] += 1
            _randomize(inner)
        return model

    return create_model


def _randomize(model: nn.Module) -> None:
    """Norms of mixers that start at zero or one would hide a mixer that is not run."""
    for path, parameter in model.named_parameters():
        if ".mrla." in path and parameter.ndim < 2 and not parameter.is_meta:
            nn.init.normal_(parameter, 0.5, 0.2)


def _selected(list_names: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def list_models(*args: Any, **keywords: Any) -> list[str]:
        # Ours in timm's registry have mixers already, and no default configuration that timm's tests could check.
        names = (name for name in list_names(*args, **keywords) if "_mrla_" not in name)
        return [name for name in names if any(fnmatch(name, each) for each in PATTERNS)]

    return list_models


attaching = _attached(factory.create_model)
selecting = _selected(registry.list_models)
for place in (timm, timm.models, factory):
    vars(place)["create_model"] = attaching
for place in (timm, timm.models):
    vars(place)["list_models"] = selecting


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out what scripts a network: a block's source is compiled then, which does not know its mixer."""
    scripting = [item for item in items if "jit.script" in inspect.getsource(item.function)]
    config.hook.pytest_deselected(items=scripting)
    items[:] = [item for item in items if item not in scripting]


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed and REFUSAL in report.longreprtext:
        results["refused"] += 1
        refused.append(report.nodeid)
        return
    if report.when == "call" or (report.when == "setup" and not report.passed):
        results[report.outcome] += 1
    if report.failed:
        failures[report.nodeid] = report.longreprtext[-2000:]


def pytest_sessionfinish() -> None:
    content = {"results": results, "networks": networks, "left_plain": plain_names}
    content |= {"refused": refused, "failures": failures}
    COUNTS.write_text(json.dumps(content))
