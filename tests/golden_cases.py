"""Reads tests/golden: numbers that other people's code gave, sorted by what they are (tests/golden/README.md)."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
INDEX: dict[str, Any] = json.loads((GOLDEN / "INDEX.json").read_text(encoding="utf-8"))
_MODULES: dict[str, dict[str, Any]] = {facts["case"]: facts for facts in INDEX["module_cases"]}
_MODELS: dict[str, dict[str, Any]] = {facts["case"]: facts for facts in INDEX["model_cases"]}
MODULE_CASES: list[str] = list(_MODULES)
MODEL_CASES: list[str] = list(_MODELS)

Mode = Literal["eval", "train"]
What = Literal["output", "grad", "grad_input", "state_after"]


@dataclass(frozen=True)
class ModuleCase:
    """A layer, block or reduced net; every load gives fresh tensors, so a test may write into them.

    Attributes:
        name: The case's name.
        facts: Its entry in INDEX.json.
        state: Parameters and statistics by reference name, float32, in the reference's order, no batch counters.
        inputs: Float32, by `input`, `input_xt`, `input_0`, ...
        cotangents: Float32, by the output that each one goes with: `output`, `output_0`, ...
        outputs: Float64, by mode, then by `output`, `output_0`, `output_K`, ...
        grads: By mode, then by the parameter's reference name, in `facts["grad_dtype"]`.
        input_grads: By mode, then by the input's name, in `facts["grad_dtype"]`.
        grad_l2_of_tensors_not_saved: By mode, then by reference name: the norms of gradients too large to keep.
        state_after_train: Float64 BatchNorm statistics after the one train-mode forward, by reference name.
    """

    name: str
    facts: dict[str, Any]
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    outputs: dict[Mode, dict[str, Tensor]]
    grads: dict[Mode, dict[str, Tensor]]
    input_grads: dict[Mode, dict[str, Tensor]]
    grad_l2_of_tensors_not_saved: dict[Mode, dict[str, float]]
    state_after_train: dict[str, Tensor]

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that the case was run in."""
        return tuple(self.facts["modes"])

    @property
    def grad_modes(self) -> tuple[Mode, ...]:
        """The modes that gradients were kept for: all of them, except in `mini_resnet_light` (train alone)."""
        return tuple(mode for mode in self.modes if self.grads[mode])

    def outputs_in(self, mode: Mode) -> dict[str, Tensor]:
        return _of_mode(self.name, self.outputs, mode)

    def grads_in(self, mode: Mode) -> dict[str, Tensor]:
        """Empty in a mode outside `grad_modes`."""
        return _of_mode(self.name, self.grads, mode)

    def input_grads_in(self, mode: Mode) -> dict[str, Tensor]:
        """Empty in a mode outside `grad_modes`."""
        return _of_mode(self.name, self.input_grads, mode)

    def grad_l2_in(self, mode: Mode) -> dict[str, float]:
        return _of_mode(self.name, self.grad_l2_of_tensors_not_saved, mode)

    def loss(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """What the stored gradients are of: the sum of (output * cotangent) over the outputs that have a cotangent."""
        terms = [(outputs[name] * cotangent.to(outputs[name])).sum() for name, cotangent in self.cotangents.items()]
        return torch.stack(terms).sum()

    def tolerance(self, mode: Mode, what: What, dtype: torch.dtype) -> float:
        """The suggested absolute tolerance for a run in `dtype`.

        The index has no float64 bound for gradients of inputs: that of the parameters' gradients stands in, or the
        float32 bound of the inputs' where that is smaller.

        Raises:
            KeyError: If the index has none, because it has no such numbers.
        """
        bounds: dict[str, float] = _of_mode(self.name, self.facts["tolerance"], mode)
        names = [_bound(dtype, what)]
        if what == "grad_input" and names[0] not in bounds:
            names = [_bound(dtype, "grad"), _bound(torch.float32, "grad_input")]
        if any(name not in bounds for name in names):
            raise KeyError(f"{self.name} has no tolerance for {what} in {mode} mode and {dtype}")
        return min(bounds[name] for name in names)


@dataclass(frozen=True)
class ModelCase:
    """A full-size net in eval mode; weights and image come from the formula, and every load gives fresh tensors.

    Attributes:
        name: The case's name.
        facts: Its entry in INDEX.json.
        state: The whole state by reference name, in the reference's order and layout: float32, counters int64 zeros.
            Paddle's linear weights are [in, out].
        kinds: The kind of each entry of `state`: `conv_weight`, `linear_weight`, `bn_mean`, `counter`, ...
        image: The input, float32.
        outputs: Float64: `output` (logits), `output_stage1_gap` .. `output_stage4_gap` or `output_block_cls`.
    """

    name: str
    facts: dict[str, Any]
    state: dict[str, Tensor]
    kinds: dict[str, str]
    image: Tensor
    outputs: dict[str, Tensor]

    def tolerance(self, dtype: torch.dtype) -> float:
        """The suggested absolute tolerance of the logits for a run in `dtype`."""
        return self.facts["tolerance"][_bound(dtype, "output")]


def module_case(name: str) -> ModuleCase:
    """Loads one of `MODULE_CASES`.

    Raises:
        ValueError: If the file holds a tensor that is not understood.
    """
    facts = _MODULES[name]
    modes: list[Mode] = facts["modes"]
    state: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    cotangents: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    outputs: dict[Mode, dict[str, Tensor]] = {mode: {} for mode in modes}
    grads: dict[Mode, dict[str, Tensor]] = {mode: {} for mode in modes}
    input_grads: dict[Mode, dict[str, Tensor]] = {mode: {} for mode in modes}
    for key, tensor in load_file(GOLDEN / facts["file"]).items():
        head, _, rest = key.partition("/")
        stem, found = _split_mode(head, modes)
        if head == "state":
            state[rest] = tensor
        elif head == "state_after_train":
            after[rest] = tensor
        elif stem == "grad" and rest:
            for mode in found:
                grads[mode][rest] = tensor
        elif rest:
            raise ValueError(f"{name}: {key} is not understood")
        elif stem.startswith("grad_input"):
            for mode in found:
                input_grads[mode][stem.removeprefix("grad_")] = tensor
        elif stem.startswith("output"):
            for mode in found:
                outputs[mode][stem] = tensor
        elif head.startswith("input"):
            inputs[head] = tensor
        elif head.startswith("cotangent"):
            cotangents[head.replace("cotangent", "output", 1)] = tensor
        else:
            raise ValueError(f"{name}: {key} is not understood")
    norms = facts["grad_l2_of_tensors_not_saved"]
    return ModuleCase(
        name=name,
        facts=facts,
        state={key: state[key] for key in facts["state_names"]},
        inputs=dict(sorted(inputs.items())),
        cotangents=dict(sorted(cotangents.items())),
        outputs=outputs,
        grads=grads,
        input_grads=input_grads,
        grad_l2_of_tensors_not_saved={mode: dict(norms.get(mode, {})) for mode in modes},
        state_after_train=after,
    )


def model_case(name: str) -> ModelCase:
    """Loads one of `MODEL_CASES` and computes its state, which takes a second or so for a ResNet-50."""
    facts = _MODELS[name]
    described = json.loads((GOLDEN / facts["state_file"]).read_text(encoding="utf-8"))
    entries = [dict(zip(described["columns"], entry, strict=True)) for entry in described["entries"]]
    paddle = facts["framework"].startswith("paddle")
    return ModelCase(
        name=name,
        facts=facts,
        state={
            entry["name"]: formula_tensor(entry["kind"], entry["shape"], entry["i"], facts["weights"], paddle=paddle)
            for entry in entries
        },
        kinds={entry["name"]: entry["kind"] for entry in entries},
        image=formula_image(facts["input"]["shape"], facts["input"]["which"]),
        outputs=load_file(GOLDEN / facts["file"]),
    )


def pseudo_random(i: int, count: int) -> NDArray[np.float64]:
    """The first `count` numbers r(i, 0), r(i, 1), ... in [-1, 1) of the golden README's formula."""
    z = np.arange(1, count + 1, dtype=np.uint64)
    z += np.uint64(i << 32)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    z >>= np.uint64(11)
    return z.astype(np.float64) * 2.0**-52 - 1


def formula_tensor(
    kind: str, shape: list[int], i: int | None, weights: Mapping[str, Any], *, paddle: bool = False
) -> Tensor:
    """One entry of a model's state: float32, or an int64 zero for a batch counter (whose `i` is None).

    Args:
        kind: The entry's kind in the state file.
        shape: The entry's shape in the reference's layout.
        i: The entry's number in the formula.
        weights: The model's `w`, `lam`, `other` and `bw`.
        paddle: Whether linear weights are stored as [in, out].
    """
    if kind == "counter":
        return torch.zeros(shape, dtype=torch.int64)
    if i is None:
        raise ValueError(f"an entry of kind {kind} needs its number")
    values = pseudo_random(i, math.prod(shape))
    if kind == "conv_weight":
        values *= weights["w"] / math.sqrt(math.prod(shape[1:]))
    elif kind == "linear_weight":
        values *= weights["w"] / math.sqrt(shape[0 if paddle else 1])
    elif kind == "lambda":
        values *= weights["lam"]
    elif kind in ("bias", "token"):
        values *= weights["other"]
    elif kind == "norm_weight":
        values = weights["bw"] * (1 + 0.25 * values)
    elif kind in ("norm_bias", "bn_mean"):
        values *= 0.1
    elif kind == "bn_var":
        values = 1 + 0.5 * values
    else:
        raise ValueError(f"no formula for kind {kind}")
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def formula_image(shape: list[int], which: int = 0) -> Tensor:
    """The input of a full-size model: noise on a coarse 4x4 pattern, float32."""
    batch, channels, height, width = shape
    fine = pseudo_random(1000003 + which, math.prod(shape)).reshape(shape)
    cells = pseudo_random(2000003 + which, batch * channels * 16).reshape(batch, channels, 4, 4)
    coarse = cells[:, :, 4 * np.arange(height)[:, None] // height, 4 * np.arange(width) // width]
    return torch.from_numpy((1.5 * coarse + 0.5 * fine).astype(np.float32))


def _of_mode(name: str, by_mode: Mapping[Mode, Any], mode: Mode) -> Any:
    if mode not in by_mode:
        raise ValueError(f"{name} was run in {' and '.join(by_mode)} mode, not in {mode!r}")
    return by_mode[mode]


def _split_mode(head: str, modes: list[Mode]) -> tuple[str, list[Mode]]:
    """`output_0_eval` is `output_0` in eval mode; a name without suffix holds in every mode of the case."""
    for mode in modes:
        if head.endswith(f"_{mode}"):
            return head.removesuffix(f"_{mode}"), [mode]
    return head, modes


def _bound(dtype: torch.dtype, what: str) -> str:
    return f"suggested_atol_{str(dtype).removeprefix('torch.')}_{what}"
