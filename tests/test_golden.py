"""Numbers from the released code and from the notebook's, case by case: outputs, gradients and running statistics."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from golden_cases import GOLDEN, MODEL_CASES, MODULE_CASES, Mode, ModuleCase, model_case, module_case
from oracles.naive import naive_exact_updates
from safetensors.torch import load_file
from timm.layers import EcaModule, SEModule
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

import mrla
from mrla.models.checkpoints.released import REFERENCES, translate
from mrla.models.checkpoints.tensor_files import read_state_dict
from mrla.models.mixed_blocks import mix_block
from mrla.models.wiring import Wiring
from mrla.ops import (
    ChainPlace,
    LayerAttention,
    LayerMemory,
    MRLABase,
    MRLALight,
    OutputMemory,
    base_update,
    exact_update,
    light_update,
)

PDPARAMS = GOLDEN / "pdparams"
RELEASED, NOTEBOOK = REFERENCES["resnet50_mrlal"].names, REFERENCES["paddle_resnet18_mrla"].names
DEIT = REFERENCES["deit_mrlal_tiny_patch16_224"].names

PADDLE_KEEPS = torch.tensor(0.9).item()
"""The part of the running statistics that Paddle keeps: 0.9 in float32."""

Run = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
"""Parameters by reference name, inputs by name -> outputs by name."""


def heads_of(case: ModuleCase) -> int:
    ctor = case.facts["ctor"]
    return ctor["input_dim"] // ctor.get("dim_perhead", ctor.get("dim_pergroup", 32))


def kernels(state: dict[str, Tensor], prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value kernels under either code's names."""
    names = ("Wq", "Wk", "Wv") if f"{prefix}Wq.weight" in state else ("convq", "convk", "convv")
    query, key, value = (state[f"{prefix}{name}.weight"] for name in names)
    return query, key, value


def light_layer(case: ModuleCase) -> Run:
    return lambda state, inputs: {
        "output": light_update(inputs["input"], None, *kernels(state), None, heads=heads_of(case))
    }


def light_module(case: ModuleCase) -> Run:
    def run(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inner = "mrla." if "mrla.Wq.weight" in state else "mla."
        decay = state["lambda_t"].flatten()
        output = light_update(inputs["input_xt"], inputs["input_ot_1"], *kernels(state, inner), decay, heads=2)
        return {"output": output}

    return run


def base_chain(case: ModuleCase) -> Run:
    def run(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        memory: LayerMemory | None = None
        for layer in range(len(inputs)):
            outputs[f"output_{layer}"], memory = base_update(
                inputs[f"input_{layer}"], memory, *kernels(state, f"{layer}."), heads=heads_of(case)
            )
        assert memory is not None
        outputs["output_K"] = torch.stack(memory.keys, dim=1).flatten(2)
        outputs["output_V"] = torch.stack(memory.values, dim=1)
        return outputs

    return run


def exact_chain(case: ModuleCase) -> Run:
    def run(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        memory: OutputMemory | None = None
        for layer in range(len(inputs)):
            outputs[f"output_{layer}"], memory = exact_update(
                inputs[f"input_{layer}"], memory, *kernels(state, f"{layer}."), heads=heads_of(case)
            )
        return outputs

    return run


class Chain(nn.Module):
    """Residual blocks with their mixers, one after the other, as a stage runs them; gives every block's output."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for block in self.children():
            x = block(x)
            outputs.append(x)
        return outputs


def blocks_of(case: ModuleCase) -> Chain:
    """The chain of blocks of a case, made by timm, with our mixers."""
    ctor, name = case.facts["ctor"], case.name
    kind = BasicBlock if ctor.get("planes") == 64 else Bottleneck
    channels = ctor["planes"] * kind.expansion
    inplanes, blocks = ctor["inplanes"], []
    for index in range(count := ctor.get("blocks", 1)):
        place = ChainPlace(index, count)
        stride = 2 if index == 0 and any("downsample" in key for key in case.state) else 1
        downsample = None
        if stride == 2:
            downsample = nn.Sequential(nn.Conv2d(inplanes, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        block: Any = kind(inplanes, ctor["planes"], stride=stride, downsample=downsample)
        if ctor.get("SE"):
            block.se = SEModule(channels, rd_channels=channels // 16, bias=False)
        if ctor.get("ECA_size"):
            block.se = EcaModule(kernel_size=ctor["ECA_size"])
        if "la_eq4" in name:
            mixer = LayerAttention(
                channels, head_dim=ctor["dim_per_head"], residual=False, place=place, init="released"
            )
        elif "base" in name and "basicblock" not in name:
            mixer = MRLABase(channels, out_act=None if "base22" in name else "relu", place=place, init="released")
        else:
            mixer = MRLALight(channels, place=place, init="released")
        mix_block(block, mixer, Wiring(str(index), "0", "input" if downsample is None else "downsample"))
        blocks.append(block)
        inplanes = channels
    return Chain(blocks)


def modules_of(case: ModuleCase) -> tuple[nn.Module, dict[str, str]]:
    """The module of a case that is more than a layer, and what the reference calls each of its entries."""
    paddle = case.name.startswith("paddle")
    if case.name == "mini_resnet_light":
        model: nn.Module = mrla.load_reference(
            "resnet50_mrlal", case.state, layers=(1, 1, 2, 1), channels=(8, 16, 32, 64)
        )
        names = RELEASED
    elif case.name == "mini_deit_light":
        sizes = {key: case.facts["ctor"][key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
        model = mrla.load_reference("deit_mrlal_tiny_patch16_224", case.state, **sizes)
        names = DEIT
    elif case.name.startswith("deit"):
        model = MRLALight(
            192, head_dim=16, layout="NLC", num_prefix_tokens=1, norm="pre_layer", value_act="gelu", init="released"
        )
        names = {
            "lambda_t": "decay",
            "mrla.Wq.weight": "query_weight",
            "mrla.Wk.weight": "key_weight",
            "mrla.Wv.weight": "value_weight",
            "normx": "input_norm",
            "normo": "shortcut_norm",
        }
    else:
        model = blocks_of(case)
        names = NOTEBOOK if paddle else RELEASED
    single = isinstance(model, Chain) and "blocks" not in case.facts["ctor"]
    ours = {}
    for name, tensor in case.state.items():
        (renamed,) = translate({name: tensor}, names)
        ours[f"0.{renamed}" if single else renamed] = name
    return model, ours


def load(model: nn.Module, case: ModuleCase, ours: dict[str, str], dtype: torch.dtype) -> nn.Module:
    own = model.state_dict()
    values = {name: case.state[theirs].reshape(own[name].shape) for name, theirs in ours.items()}
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and case.name.startswith("paddle"):
            # Paddle holds epsilon and momentum in float32, in float64 runs too (golden/README.md, discrepancy 9).
            module.eps, module.momentum = torch.tensor(1e-5).item(), 1 - PADDLE_KEEPS
    return model.to(dtype)


LAYERS: dict[str, Callable[[ModuleCase], Run]] = {
    **{name: light_layer for name in MODULE_CASES if "light_layer" in name or "mla_layer" in name},
    "mrla_light_module_c64_8x8": light_module,
    "paddle_mrla_module_c64_8x8": light_module,
    "mrla_base_layer_chain4_c64_d16_7x5": base_chain,
    "la_layer_eq4_chain3_c64_d64_heads1_6x5": exact_chain,
}
CHANNEL_ATTENTION = {"eca_layer_c64_k5_6x6", "se_layer_c64_r16_6x6"}
RESHAPED_HEADS = "la_layer_eq4_chain3_c64_d32_heads2_6x5"
MODULES = [name for name in MODULE_CASES if name not in {*LAYERS, *CHANNEL_ATTENTION, RESHAPED_HEADS}]
DTYPES = [torch.float64, torch.float32]


def close(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    assert found.shape == expected.shape or found.numel() == expected.numel(), what
    error = (found.double() - expected.double().reshape(found.shape)).abs().max().item()
    assert error <= bound, f"{what}: off by {error}, bound {bound}"


def test_every_case_is_claimed_once():
    assert sorted([*LAYERS, *CHANNEL_ATTENTION, RESHAPED_HEADS, *MODULES]) == sorted(MODULE_CASES)
    assert (len(MODULE_CASES), len(MODEL_CASES)) == (24, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_the_reference_numbers(name, dtype):
    case = module_case(name)
    state = {key: tensor.to(dtype).requires_grad_() for key, tensor in case.state.items()}
    inputs = {key: tensor.to(dtype).requires_grad_() for key, tensor in case.inputs.items()}
    outputs = LAYERS[name](case)(state, inputs)
    for key, expected in case.outputs_in("eval").items():
        close(outputs[key], expected, case.tolerance("eval", "output", dtype), key)
    case.loss(outputs).backward()
    for key, expected in case.grads_in("eval").items():
        close(state[key].grad, expected, case.tolerance("eval", "grad", dtype), key)
    for key, expected in case.input_grads_in("eval").items():
        close(inputs[key].grad, expected, case.tolerance("eval", "grad_input", dtype), key)


def cases_and_modes() -> list[Any]:
    return [pytest.param(name, mode, id=f"{name}-{mode}") for name in MODULES for mode in module_case(name).modes]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "mode"), cases_and_modes())
def test_blocks_and_small_networks_give_the_reference_numbers(name: str, mode: Mode, dtype):
    case = module_case(name)
    model, ours = modules_of(case)
    load(model, case, ours, dtype).train(mode == "train")
    inputs = {key: tensor.to(dtype).requires_grad_() for key, tensor in case.inputs.items()}
    if isinstance(model, MRLALight):
        found, _ = model(inputs["input_xt"], inputs["input_ot_1"])
        outputs = {"output": found - inputs["input_xt"]}  # the released module leaves the add to its block
    else:
        result = model(inputs["input"])
        results = result if isinstance(result, list) else [result]
        keys = [f"output_{index}" for index in range(len(results))] if len(results) > 1 else ["output"]
        outputs = dict(zip(keys, results, strict=True))
    for key, expected in case.outputs_in(mode).items():
        close(outputs[key], expected, case.tolerance(mode, "output", dtype), key)
    if mode in case.grad_modes:
        case.loss(outputs).backward()
        grads = {theirs: model.get_parameter(name).grad for name, theirs in ours.items() if "running" not in name}
        expected_grads = case.grads_in(mode)
        for key, expected in expected_grads.items():
            close(grads[key], expected, case.tolerance(mode, "grad", dtype), key)
        for key, norm in case.grad_l2_in(mode).items():
            count = grads[key].numel()
            bound = case.tolerance(mode, "grad", dtype) * math.sqrt(count)  # the bound on each of so many entries
            assert abs(grads[key].double().norm().item() - norm) <= bound, key
        for key, expected in case.input_grads_in(mode).items():
            close(inputs[key].grad, expected, case.tolerance(mode, "grad_input", dtype), key)
    if mode == "train":
        check_statistics(model, case, ours, dtype)


def check_statistics(model: nn.Module, case: ModuleCase, ours: dict[str, str], dtype: torch.dtype) -> None:
    state = model.state_dict()
    paddle = case.name.startswith("paddle")
    for name, theirs in ours.items():
        if theirs not in case.state_after_train:
            continue
        expected = case.state_after_train[theirs]
        if paddle and name.endswith("running_var"):
            # Paddle's CPU BatchNorm keeps the biased variance: n / (n - 1) on the batch's part (discrepancy 8).
            before = case.state[theirs].double()
            expected = before * PADDLE_KEEPS + (expected - before * PADDLE_KEEPS) * _unbias(case, name)
        close(state[name], expected, case.tolerance("train", "state_after", dtype), theirs)


def _unbias(case: ModuleCase, name: str) -> float:
    batch, _, height, width = case.facts["inputs"]["input"]
    out = case.facts["outputs"]["output_train"]
    full = batch * height * width
    count = full if name.split(".")[1] == "bn1" and "basicblock" not in case.name else out[0] * out[2] * out[3]
    return count / (count - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", sorted(CHANNEL_ATTENTION))
def test_timm_channel_attention_is_the_released_one(name, dtype):
    case = module_case(name)
    if name.startswith("eca"):
        module: nn.Module = EcaModule(kernel_size=5)
        ours = {"conv.weight": "conv.weight"}
    else:
        module, ours = (
            SEModule(64, rd_channels=4, bias=False),
            {"fc1.weight": "fc.0.weight", "fc2.weight": "fc.2.weight"},
        )
    load(module, case, ours, dtype)
    x = case.inputs["input"].to(dtype).requires_grad_()
    output = module(x)
    close(output, case.outputs_in("eval")["output"], case.tolerance("eval", "output", dtype), "output")
    case.loss({"output": output}).backward()
    for key, theirs in ours.items():
        close(module.get_parameter(key).grad, case.grads_in("eval")[theirs], case.tolerance("eval", "grad", dtype), key)
    close(x.grad, case.input_grads_in("eval")["input"], case.tolerance("eval", "grad_input", dtype), "grad_input")


def test_with_two_heads_exact_is_the_equation_where_the_released_layer_is_not():
    """The released layer reshapes without moving axes: it agrees where there is one block, and nowhere after."""
    case = module_case(RESHAPED_HEADS)
    xs = [case.inputs[f"input_{layer}"].double() for layer in range(3)]
    state = {key: tensor.double() for key, tensor in case.state.items()}
    queries, keys, values = ([state[f"{layer}.{name}.weight"] for layer in range(3)] for name in ("Wq", "Wk", "Wv"))
    ours = exact_chain(case)(state, dict(zip(case.inputs, xs, strict=True)))
    released = case.outputs_in("eval")
    close(ours["output_0"], released["output_0"], case.tolerance("eval", "output", torch.float64), "output_0")
    # By how much the released one is off, as golden/README.md says.
    assert (ours["output_1"] - released["output_1"]).abs().max().item() == pytest.approx(2.7, abs=0.05)
    assert (ours["output_2"] - released["output_2"]).abs().max().item() == pytest.approx(1.9, abs=0.05)
    # The oracle on one image and a corner of the map: pooling needs whole maps, so the rest is set by its mean.
    small = [x[:1, :, :2, :2] for x in xs]
    slow = naive_exact_updates(small, queries, keys, values, heads=2)
    memory = None
    for x, query, key, value, expected in zip(small, queries, keys, values, slow, strict=True):
        found, memory = exact_update(x, memory, query, key, value, heads=2)
        torch.testing.assert_close(found, expected)


ARCHITECTURES = {
    "resnet50_mrlal_se": ("resnet50_mrlal", {"se": True}),
    "paddle_baseline_resnet18": ("paddle_resnet18", {}),
}


@pytest.mark.parametrize("name", MODEL_CASES)
def test_full_size_networks_give_the_reference_logits_and_features(name):
    case = model_case(name)
    arch, overrides = ARCHITECTURES.get(name, (name, {}))
    model = mrla.load_reference(arch, case.state, **overrides)
    assert sum(parameter.numel() for parameter in model.parameters()) == case.facts["params_trainable"]
    assert not model.training
    for dtype in DTYPES:
        bound = case.tolerance(dtype)
        with torch.no_grad():
            logits, features = model.to(dtype)(case.image.to(dtype)), intermediate(model, case.image.to(dtype))
        close(logits, case.outputs["output"], bound, "logits")
        for key, feature in features.items():
            # Suggested bounds are for the logits; features are larger by their own size.
            close(feature, case.outputs[key], bound * max(1.0, case.outputs[key].abs().max().item()), key)
        assert {"output", *features} == set(case.outputs)


def intermediate(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    _, maps = model.forward_intermediates(
        image, **({"return_prefix_tokens": True, "norm": False} if hasattr(model, "blocks") else {})
    )
    if hasattr(model, "blocks"):
        return {"output_block_cls": torch.stack([prefix[:, 0] for _, prefix in maps], dim=1)}
    return {f"output_stage{stage}_gap": maps[stage].mean((2, 3)) for stage in range(1, 5)}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_a_file_that_paddle_wrote_gives_the_notebooks_numbers(dtype):
    state = {name: tensor.to(dtype) for name, tensor in read_state_dict(PDPARAMS / "mrla_module_64.pdparams").items()}
    known = load_file(PDPARAMS / "mrla_module_64.safetensors")
    inputs = {"input_xt": known["input_0"].to(dtype), "input_ot_1": known["input_1"].to(dtype)}
    case = module_case("paddle_mrla_module_c64_8x8")  # the same module with other numbers: its bounds serve here
    output = light_module(case)(state, inputs)["output"]
    close(output, known["output"], case.tolerance("eval", "output", dtype), "output")


@pytest.mark.parametrize("name", ["mrla_light_layer_c64_d32_8x8", "mini_resnet_light"])
def test_a_case_can_fail(name):
    """The bounds bite: zero queries, or a network without its mixers, are far outside."""
    case = module_case(name)
    if name == "mini_resnet_light":
        model, ours = modules_of(case)
        load(model, case, ours, torch.float64)
        found = mrla.detach(model)(case.inputs["input"].double())
    else:
        state = {key: tensor.double() for key, tensor in case.state.items()}
        state["Wq.weight"] = torch.zeros_like(state["Wq.weight"])
        found = light_layer(case)(state, {key: tensor.double() for key, tensor in case.inputs.items()})["output"]
    error = (found - case.outputs_in("eval")["output"]).abs().max().item()
    assert error > 1e4 * case.tolerance("eval", "output", torch.float64)


def test_every_reference_names_a_network():
    assert all(timm.is_model(reference.network) for reference in REFERENCES.values())
