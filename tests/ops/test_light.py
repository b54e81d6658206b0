"""MRLA-light against plain loops, against the released code and the notebook, and against its own algebra."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.chains import FEW, assert_same_values_and_gradients
from oracles.naive import naive_light_update
from safetensors.torch import load_file

from mrla.ops import depthwise_value, light_gate, light_update

GOLDEN = Path(__file__).parents[1] / "golden" / "modules"
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
@pytest.mark.parametrize("value_act", [None, "gelu", "relu"])
def test_fast_equals_naive_in_values_and_gradients(shape, value_act):
    *tensors, heads = arguments(*shape)
    assert_same_values_and_gradients(
        lambda leaves: [light_update(*leaves, heads, value_act)],
        lambda leaves: [naive_light_update(*leaves, heads, value_act)],
        *tensors,
    )


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


@given(
    depth=st.integers(1, 5),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 4),
    value_act=st.sampled_from([None, "gelu", "relu"]),
    seed=st.integers(0, 2**16),
)
@FEW
def test_unrolled_recurrence_is_the_weighted_sum_of_earlier_values(depth, heads, head_dim, value_act, seed):
    """o_t = sum over l of beta_l gate_{t-l} v_{t-l}, with beta_l = lambda_t ... lambda_{t-l+1} and beta_0 = 1."""
    torch.manual_seed(seed)
    channels = heads * head_dim
    blocks = [arguments(channels, heads, 3, 2) for _ in range(depth)]
    tensors = [block[part] for part in (0, 2, 3, 4, 5) for block in blocks]

    def parts(leaves):
        return [leaves[start : start + depth] for start in range(0, len(leaves), depth)]

    def recurrence(leaves):
        carried, outs = None, []
        for x, query, key, value, decay in zip(*parts(leaves), strict=True):
            decay = decay if carried is not None else None
            carried = light_update(x, carried, query, key, value, decay, heads, value_act)
            outs.append(carried)
        return outs

    def closed_form(leaves):
        xs, queries, keys, kernels, decays = parts(leaves)
        own = []
        for x, query, key, kernel in zip(xs, queries, keys, kernels, strict=True):
            gate = light_gate(x, query, key, heads).repeat_interleave(head_dim, dim=1)[:, :, None, None]
            own.append(gate * depthwise_value(x, kernel, value_act))
        return [
            sum(torch.stack([torch.ones_like(decays[0]), *decays[s + 1 : t + 1]]).prod(0)[:, None, None] * own[s]
                for s in range(t + 1))
            for t in range(depth)
        ]  # fmt: skip

    assert_same_values_and_gradients(recurrence, closed_form, *tensors)


def test_float16_rounds_the_sum_and_not_the_product():
    """x and lambda * carried both overflow on the way: pooled sums of 2.7e5, and a product of 9e4 in a sum of 5e4."""
    x = torch.full((1, 2, 3, 3), -4e4, dtype=torch.float16)
    carried = torch.full((1, 2, 3, 3), 3e4, dtype=torch.float16)
    tap, centre = torch.zeros(1, 1, 3, dtype=torch.float16), torch.zeros(2, 1, 3, 3, dtype=torch.float16)
    tap[..., 1], centre[:, :, 1, 1] = 1, 1
    decay = torch.full((2,), 3.0, dtype=torch.float16)
    assert (decay[:, None, None] * carried).isinf().all()
    out = light_update(x, carried, tap, tap, centre, decay, heads=1)  # a gate of one: q.k is 3.2e9
    torch.testing.assert_close(out, torch.full_like(out, 5e4))


def test_bfloat16_agrees_with_float32():
    *tensors, heads = arguments(8, 2, 4, 4, dtype=torch.float32)
    low = [tensor.to(torch.bfloat16) for tensor in tensors]
    out, full = light_update(*low, heads), light_update(*(tensor.float() for tensor in low), heads)
    assert out.dtype == torch.bfloat16
    assert (out.float() - full).norm() < 0.01 * full.norm()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": None}, "carried and decay belong together: got carried and no decay; give both or neither"),
        ({"carried": None}, "carried and decay belong together: got no carried and decay; give both or neither"),
        ({"carried": torch.randn(2, 4, 3, 2)}, r"carried must have the shape of x, \(2, 4, 3, 3\): got \(2, 4, 3, 2\)"),
        ({"carried": torch.randn(1, 4, 3, 3)}, r"carried must have the shape of x, \(2, 4, 3, 3\): got \(1, 4, 3, 3\)"),
        ({"decay": torch.randn(4, 1, 1)}, r"decay must be \(c,\) for x with c = 4 channels: got \(4, 1, 1\)"),
        ({"x": torch.randn(2, 9, 4)}, r"x must be a batch of maps .*got shape \(2, 9, 4\)"),
        ({"value_weight": torch.randn(4, 1, 5, 5)}, r"value_weight must be \(c, 1, 3, 3\).*got \(4, 1, 5, 5\)"),
        ({"query_weight": torch.randn(1, 1, 2)}, r"query_weight and key_weight must both be \(1, 1, k\) with k odd"),
        ({"key_weight": torch.randn(1, 1, 5)}, r"got \(1, 1, 3\) and \(1, 1, 5\)"),
        ({"heads": 3}, "heads must divide the channels: got heads=3, channels=4"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, carried, query, key, value, decay, heads = arguments(4, 2, 3, 3, dtype=torch.float32)
    given = {"x": x, "carried": carried, "query_weight": query, "key_weight": key, "value_weight": value}
    with pytest.raises(ValueError, match=message):
        light_update(**{**given, "decay": decay, "heads": heads, **change})
