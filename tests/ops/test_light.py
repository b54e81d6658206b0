"""MRLA-light against plain loops, against the released code and the notebook, and against its own algebra."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mrla.ops import light_gate, light_update
from mrla.ops._naive import naive_light_update

GOLDEN = Path(__file__).parents[1] / "golden"
# Case, its query, key and value weights, and the suggested bounds of shared/golden/INDEX.json (float64, float32).
LAYERS = [
    ("mrla_light_layer_c64_d32_7x5", ("Wq", "Wk", "Wv"), 2, (1.8e-10, 2.5e-8), (4e-6, 1.3e-4)),
    ("mrla_light_layer_c32_d1_8x8", ("Wq", "Wk", "Wv"), 32, (2.1e-10, 1.9e-8), (4.2e-6, 1e-4)),
    ("paddle_mla_layer_c64_8x8", ("convq", "convk", "convv"), 2, (2.5e-8, 4.9e-6), (6.8e-6, 3e-4)),
]


def arguments(channels: int, heads: int, height: int, width: int, kernel_size: int = 3, dtype=torch.float64):
    return (
        torch.randn(2, channels, height, width, dtype=dtype),
        torch.randn(2, channels, height, width, dtype=dtype),
        torch.randn(1, 1, kernel_size, dtype=dtype),
        torch.randn(1, 1, kernel_size, dtype=dtype),
        torch.randn(channels, 1, 3, 3, dtype=dtype),
        torch.randn(channels, dtype=dtype),
        heads,
    )


@pytest.mark.parametrize(
    "shape", [(4, 1, 3, 3, 3), (4, 2, 2, 5, 3), (6, 6, 1, 1, 3), (6, 3, 4, 1, 5), (8, 2, 3, 2, 7)], ids=str
)
def test_fast_equals_naive_in_values_and_gradients(shape):
    *tensors, heads = arguments(*shape)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    twins = [tensor.clone().requires_grad_() for tensor in tensors]
    fast, slow = light_update(*leaves, heads), naive_light_update(*twins, heads)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(fast)
    (fast * weight).sum().backward()
    (slow * weight).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("case", "names", "heads", "float64", "float32"), LAYERS, ids=[layer[0] for layer in LAYERS])
def test_layer_agrees_with_the_reference(case, names, heads, float64, float32, dtype):
    golden = load_file(GOLDEN / f"{case}.safetensors")
    bound, grad_bound = float64 if dtype == torch.float64 else float32
    x = golden["input"].to(dtype).requires_grad_()
    weights = [golden[f"state/{name}.weight"].to(dtype).requires_grad_() for name in names]
    out = light_update(x, None, *weights, None, heads)
    torch.testing.assert_close(out.double(), golden["output"], atol=bound, rtol=0)
    (out * golden["cotangent"].to(dtype)).sum().backward()
    torch.testing.assert_close(x.grad.double(), golden["grad_input"].double(), atol=grad_bound, rtol=0)
    for name, weight in zip(names, weights, strict=True):
        torch.testing.assert_close(
            weight.grad.double(), golden[f"grad/{name}.weight"].double(), atol=grad_bound, rtol=0
        )


def test_lambda_term_agrees_with_the_reference():
    golden = load_file(GOLDEN / "mrla_light_module_c64_8x8.safetensors")
    weights = [golden[f"state/mrla.{name}.weight"].double() for name in ("Wq", "Wk", "Wv")]
    out = light_update(
        golden["input_xt"].double(),
        golden["input_ot_1"].double(),
        *weights,
        golden["state/lambda_t"].double().flatten(),
        heads=2,
    )
    torch.testing.assert_close(out, golden["output"], atol=1.1e-9, rtol=0)


def test_gradcheck():
    *tensors, heads = arguments(4, 2, 3, 2)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *inputs: light_update(*inputs, heads), leaves)


def test_every_head_has_its_own_gate():
    x, _, query, key, *_ = arguments(8, 4, 3, 3)
    gate = light_gate(x, query, key, heads=4)
    assert gate.shape == (2, 4)
    louder = x.clone()
    louder[:, 6:] *= 3  # the last head's channels; the kernel of three reaches one channel into the head before
    changed = light_gate(louder, query, key, heads=4) != gate
    assert changed.any(0).tolist() == [False, False, True, True]


def test_no_query_means_half_the_value():
    x, shortcut, query, key, value, decay, heads = arguments(6, 3, 4, 4)
    half = light_update(x, None, query * 0, key, value, None, heads)
    torch.testing.assert_close(half * 2, torch.nn.functional.conv2d(x, value, padding=1, groups=6))
    full = light_update(x, shortcut, query * 0, key, value, decay, heads)
    torch.testing.assert_close(full - half, decay[:, None, None] * shortcut)


def test_unrolled_recurrence_is_the_weighted_sum_of_earlier_values():
    """o_t = sum over l of beta_l gate_{t-l} v_{t-l}, with beta_l the product of the l last lambdas."""
    blocks = [arguments(4, 2, 3, 3) for _ in range(4)]
    carried, own = None, []
    for x, _, query, key, value, decay, heads in blocks:
        own.append(light_update(x, None, query, key, value, None, heads))
        carried = light_update(x, carried, query, key, value, decay if carried is not None else None, heads)
    decays = [block[5] for block in blocks]
    expected = torch.zeros_like(own[0])
    beta = torch.ones(4, dtype=torch.float64)
    for back in range(4):
        expected += beta[:, None, None] * own[3 - back]
        beta = beta * decays[3 - back]
    torch.testing.assert_close(carried, expected)
