"""The harness reads every golden number, and its formula gives the weights that the references were run with."""

import math

import pytest
import torch
from golden_cases import (
    GOLDEN,
    INDEX,
    MODEL_CASES,
    MODULE_CASES,
    formula_image,
    formula_tensor,
    model_case,
    module_case,
    pseudo_random,
)
from safetensors import safe_open

STATISTICS = ("running_mean", "running_var", "_mean", "_variance")


def assert_checks(tensor, check):
    """Sums are of the float32-rounded numbers in float64, so only the order of the additions may differ."""
    numbers = tensor.flatten().double().tolist()
    assert numbers[:4] == check["first4"]
    slack = 1e-13 * check["abs_sum"]
    assert math.fsum(numbers) == pytest.approx(check["sum"], rel=0, abs=slack)
    assert math.fsum(map(abs, numbers)) == pytest.approx(check["abs_sum"], rel=0, abs=slack)


def stored_names(file):
    with safe_open(GOLDEN / file, framework="pt") as opened:
        return set(opened.keys())


def test_there_are_24_and_8_cases_and_no_stray_files():
    assert (len(MODULE_CASES), len(MODEL_CASES)) == (24, 8)
    modules = {facts["file"] for facts in INDEX["module_cases"]}
    models = {facts[key] for facts in INDEX["model_cases"] for key in ("file", "state_file")}
    pdparams = {f"pdparams/{name}" for name in INDEX["pdparams"]["files"]}
    found = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/*")}
    assert found == modules | models | pdparams


def test_the_golden_folder_is_under_9_mb():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 9_000_000


@pytest.mark.parametrize("name", MODULE_CASES)
def test_every_tensor_of_a_module_case_is_claimed_under_its_name(name):
    case = module_case(name)
    suffixed = {mode: f"_{mode}" if len(case.modes) > 1 else "" for mode in case.modes}
    names = {f"state/{key}" for key in case.state} | {f"state_after_train/{key}" for key in case.state_after_train}
    names |= set(case.inputs) | {key.replace("output", "cotangent") for key in case.cotangents}
    for mode, suffix in suffixed.items():
        names |= {key + suffix for key in case.outputs_in(mode)}
        names |= {f"grad{suffix}/{key}" for key in case.grads_in(mode)}
        names |= {f"grad_{key}{suffix}" for key in case.input_grads_in(mode)}
    assert names == stored_names(case.facts["file"])


@pytest.mark.parametrize("name", MODULE_CASES)
def test_a_module_case_is_whole(name):
    case = module_case(name)
    assert list(case.state) == case.facts["state_names"]
    parameters = {key for key in case.state if not key.endswith(STATISTICS)}
    assert sum(case.state[key].numel() for key in parameters) == case.facts["params_trainable"]
    assert sum(tensor.numel() for tensor in case.state.values()) == case.facts["params_with_bn_stats"]
    assert {key: list(tensor.shape) for key, tensor in case.inputs.items()} == case.facts["inputs"]
    assert {tensor.dtype for tensor in (case.state | case.inputs | case.cotangents).values()} == {torch.float32}
    for mode in case.modes:
        outputs = case.outputs_in(mode)
        suffix = f"_{mode}" if len(case.modes) > 1 else ""
        shapes = {key + suffix: list(tensor.shape) for key, tensor in outputs.items()}
        assert shapes.items() <= case.facts["outputs"].items()
        assert len(shapes) * len(case.modes) == len(case.facts["outputs"])
        assert {tensor.dtype for tensor in outputs.values()} == {torch.float64}
        assert set(case.cotangents) == set(outputs) - {"output_K", "output_V"}
    for mode in case.grad_modes:
        kept, norms = case.grads_in(mode), case.grad_l2_in(mode)
        assert kept.keys().isdisjoint(norms)
        assert kept.keys() | norms.keys() == parameters
        assert case.input_grads_in(mode).keys() == case.inputs.keys()
        grads = [(case.state[key], grad) for key, grad in kept.items()]
        grads += [(case.inputs[key], grad) for key, grad in case.input_grads_in(mode).items()]
        assert all(tensor.shape == grad.shape for tensor, grad in grads)
        assert {f"torch.{case.facts['grad_dtype']}"} == {str(grad.dtype) for _, grad in grads}
    assert case.grad_modes == (("train",) if name == "mini_resnet_light" else case.modes)
    statistics = case.state.keys() - parameters if "train" in case.modes else set()
    assert case.state_after_train.keys() == statistics


@pytest.mark.parametrize("name", MODULE_CASES)
def test_a_module_case_has_tolerances_for_all_it_holds(name):
    case = module_case(name)
    for mode in case.modes:
        kinds = ["output"] + ["grad", "grad_input"] * (mode in case.grad_modes) + ["state_after"] * (mode == "train")
        for kind in kinds:
            narrow, wide = (case.tolerance(mode, kind, dtype) for dtype in (torch.float64, torch.float32))
            assert 0 < narrow <= wide < 0.01


def test_tolerances_and_modes_that_do_not_exist_are_refused():
    case = module_case("mini_resnet_light")
    assert case.grads_in("eval") == case.input_grads_in("eval") == {}
    with pytest.raises(KeyError, match="no tolerance for grad in eval mode"):
        case.tolerance("eval", "grad", torch.float64)
    with pytest.raises(ValueError, match="run in eval mode, not in 'train'"):
        module_case("mini_deit_light").outputs_in("train")


def test_the_loss_is_the_sum_over_outputs_with_a_cotangent():
    case = module_case("mrla_base_layer_chain4_c64_d16_7x5")
    outputs = case.outputs_in("eval")
    expected = sum((outputs[f"output_{layer}"] * case.cotangents[f"output_{layer}"]).sum() for layer in range(4))
    assert case.loss(outputs).dtype == torch.float64
    torch.testing.assert_close(case.loss(outputs), expected)


def test_the_formula_gives_the_test_vectors():
    vectors = INDEX["weight_formula"]["test_vectors_r_first4"]
    assert len(vectors) == 6
    for key, first4 in vectors.items():
        assert pseudo_random(int(key.removeprefix("i=")), 4).tolist() == first4


def test_the_formula_knows_the_indexs_kinds_and_no_others():
    weights = {"w": 1.7, "lam": 0.5, "other": 0.05, "bw": 0.7}
    for kind in INDEX["weight_formula"]["kinds"]:
        assert formula_tensor(kind, [2, 3], 0, weights).dtype == torch.float32
    with pytest.raises(ValueError, match="no formula for kind gamma"):
        formula_tensor("gamma", [2, 3], 0, weights)
    by_input, by_output = (formula_tensor("linear_weight", [2, 3], 0, weights, paddle=p) for p in (True, False))
    torch.testing.assert_close(by_input * math.sqrt(2), by_output * math.sqrt(3))


def test_the_image_is_coarse_cells_plus_fine_noise():
    image = formula_image([2, 3, 6, 5])
    fine, cells = pseudo_random(1000003, 180), pseudo_random(2000003, 96)
    for (n, c, y, x), value in zip(torch.cartesian_prod(*map(torch.arange, image.shape)), image.flatten(), strict=True):
        coarse = cells[((n * 3 + c) * 4 + 4 * y // 6) * 4 + 4 * x // 5]
        pixel = 1.5 * coarse + 0.5 * fine[((n * 3 + c) * 6 + y) * 5 + x]
        assert value == torch.tensor(pixel, dtype=torch.float32)


@pytest.mark.parametrize("name", MODEL_CASES)
def test_a_model_case_has_the_weights_and_the_image_of_the_index(name):
    case = model_case(name)
    assert case.facts["formula_checks"]
    for check in case.facts["formula_checks"]:
        assert_checks(case.state[check["name"]], check)
    assert_checks(case.image, case.facts["input"])
    assert list(case.image.shape) == case.facts["input"]["shape"]
    assert len(case.state) == len(case.kinds) == case.facts["state_entries"]
    counters = {key for key, kind in case.kinds.items() if kind == "counter"}
    assert all(case.state[key].dtype == torch.int64 and case.state[key] == 0 for key in counters)
    numbers = {key: tensor for key, tensor in case.state.items() if key not in counters}
    assert {tensor.dtype for tensor in numbers.values()} == {torch.float32}
    trainable = [tensor.numel() for key, tensor in numbers.items() if case.kinds[key] not in ("bn_mean", "bn_var")]
    assert sum(trainable) == case.facts["params_trainable"]
    assert sum(tensor.numel() for tensor in numbers.values()) == case.facts["params_with_bn_stats"]


@pytest.mark.parametrize("name", MODEL_CASES)
def test_every_tensor_of_a_model_case_is_claimed(name):
    case = model_case(name)
    assert case.outputs.keys() == stored_names(case.facts["file"])
    assert {key: list(tensor.shape) for key, tensor in case.outputs.items()} == case.facts["outputs"]
    assert {tensor.dtype for tensor in case.outputs.values()} == {torch.float64}
    narrow, wide = case.tolerance(torch.float64), case.tolerance(torch.float32)
    assert 0 < narrow < wide < 0.001
