"""MRLA-base against plain loops, and against its own algebra."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.chains import (
    CHAINS,
    FEW,
    Chain,
    ConcatenatedMaps,
    assert_same_values_and_gradients,
    maps_saved_for_backward,
    random_chain,
    run_chain,
    run_chain_with_memories,
)
from oracles.naive import naive_base_updates

from mrla.ops import LayerMemory, base_update, depthwise_value, layer_weights, weighted_sum


@pytest.mark.parametrize(("length", "channels", "heads", "size", "kernel_size", "options"), CHAINS)
def test_a_chain_equals_naive_in_values_and_gradients(length, channels, heads, size, kernel_size, options):
    chain = random_chain(length, channels, *size, kernel_size)
    assert_same_values_and_gradients(
        lambda leaves: run_chain(base_update, Chain.of(leaves), heads, **options),
        lambda leaves: naive_base_updates(*Chain.of(leaves), heads, **options),
        *chain.tensors(),
    )


@pytest.mark.parametrize("value_act", [None, "gelu", "relu"])
@pytest.mark.parametrize("place", ["head of a chain", "window of one"])
def test_one_block_attends_to_itself(place, value_act):
    """Its output is its value, and its query and key hear nothing: exactly."""
    length, last = (1, None) if place == "head of a chain" else (3, 1)
    chain = Chain(*([tensor.requires_grad_() for tensor in part] for part in random_chain(length, 4, 3, 3)))
    out = run_chain(base_update, chain, heads=2, value_act=value_act, last=last)[-1]
    assert torch.equal(out, depthwise_value(chain.xs[-1], chain.value_weights[-1], value_act))
    out.square().sum().backward()
    assert chain.query_weights[-1].grad.abs().max() == 0
    assert chain.key_weights[-1].grad.abs().max() == 0
    assert chain.value_weights[-1].grad.abs().min() > 0


def test_equal_keys_give_the_mean_of_the_values():
    chain = random_chain(4, 6, 3, 3)
    pooled = torch.randn(2, 6, 1, 1, dtype=torch.float64)
    xs = [x - x.mean((2, 3), keepdim=True) + pooled for x in chain.xs]
    chain = chain._replace(xs=xs, key_weights=[chain.key_weights[0]] * 4)
    values = [depthwise_value(x, weight) for x, weight in zip(xs, chain.value_weights, strict=True)]
    for t, out in enumerate(run_chain(base_update, chain, heads=3), start=1):
        torch.testing.assert_close(out, torch.stack(values[:t]).mean(0))


def test_no_query_under_sigmoid_means_half_of_the_sum():
    chain = random_chain(3, 4)
    chain = chain._replace(query_weights=[0 * weight for weight in chain.query_weights])
    values = [depthwise_value(x, weight) for x, weight in zip(chain.xs, chain.value_weights, strict=True)]
    torch.testing.assert_close(run_chain(base_update, chain, heads=2, weighting="sigmoid")[-1], sum(values) / 2)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_the_order_of_the_blocks_before_does_not_matter(order, weighting):
    chain = random_chain(4, 4)
    outs, memories = run_chain_with_memories(base_update, chain, 2, weighting=weighting)
    permuted = LayerMemory(*(tuple(part[s] for s in order) for part in memories[2]))
    *_, last_block = zip(*chain, strict=True)
    out, _ = base_update(last_block[0], permuted, *last_block[1:], 2, weighting)
    torch.testing.assert_close(out, outs[-1])


def test_every_head_has_its_own_weights():
    chain = random_chain(2, 4)
    first, second = chain.xs
    louder = torch.cat((first[:, :2], 5 * first[:, 2:]), dim=1)
    tap = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64)  # so that heads do not hear one another
    chain = chain._replace(query_weights=[tap, tap], key_weights=[tap, tap])
    before = run_chain(base_update, chain, heads=2)[1]
    after = run_chain(base_update, chain._replace(xs=[louder, second]), heads=2)[1]
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert (after[:, 2:] - before[:, 2:]).abs().max() > 1e-3


def test_the_memory_hands_on_the_very_same_tensors():
    _, memories = run_chain_with_memories(base_update, random_chain(4, 4), 2)
    for t, (earlier, later) in enumerate(pairwise(memories), start=1):
        assert len(earlier.keys) == len(earlier.values) == t
        for part, longer in zip(earlier, later, strict=True):
            assert len(longer) == t + 1
            assert all(one is same for one, same in zip(part, longer[:-1], strict=True))


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_a_window_bounds_the_memory_and_forgets_what_lies_before_it(last):
    chain = random_chain(5, 4)
    outs, memories = run_chain_with_memories(base_update, chain, 2, last=last)
    # Block t + 1 asks itself and the last - 1 blocks before it.
    assert [len(memory.values) for memory in memories] == [min(t, last - 1) for t in range(1, 6)]
    assert [len(memory.keys) for memory in memories] == [min(t, last - 1) for t in range(1, 6)]
    short = Chain(*(part[5 - last :] for part in chain))
    torch.testing.assert_close(outs[-1], run_chain(base_update, short, 2)[-1])


def test_a_window_forgets_a_memory_that_is_longer_than_it():
    chain = random_chain(4, 4)
    _, memories = run_chain_with_memories(base_update, chain, 2)
    *_, last_block = zip(*chain, strict=True)
    out, memory = base_update(last_block[0], memories[2], *last_block[1:], 2, last=2)
    torch.testing.assert_close(out, run_chain(base_update, chain, 2, last=2)[-1])
    assert len(memory.values) == 1


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value_act", [None, "gelu"])
def test_gradcheck(weighting, value_act):
    leaves = [tensor.requires_grad_() for tensor in random_chain(2, 4, 2, 1).tensors()]

    def function(*inputs):
        return run_chain(base_update, Chain.of(inputs), 2, weighting=weighting, value_act=value_act)[-1]

    assert torch.autograd.gradcheck(function, leaves)


def loud_chain() -> Chain:
    """In float16: maps of size 3e4, whose sums overflow, and values of size 4e4 whose signs are +, +, -."""
    signs = [1, 1, -1]
    xs = [sign * torch.empty(2, 4, 3, 3).uniform_(2.5e4, 3.5e4) for sign in signs]
    along = [torch.full((1, 1, 3), sign * 3e-5) for sign in signs]
    depthwise = [torch.zeros(4, 1, 3, 3) for _ in signs]
    for kernel in depthwise:
        kernel[:, :, 1, 1] = 1.3
    return Chain(xs, along, along, depthwise).to(torch.float16)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_float16_survives_sums_that_overflow_in_it(weighting):
    chain = loud_chain()
    assert chain.xs[0].sum((2, 3)).isinf().all()
    last_block = [part[-1] for part in chain]
    _, memories = run_chain_with_memories(base_update, Chain(*(part[:2] for part in chain)), 2, weighting=weighting)
    out, memory = base_update(last_block[0], memories[-1], *last_block[1:], 2, weighting)
    if weighting == "sigmoid":
        assert (memory.values[0] + memory.values[1]).isinf().any()
    assert out.dtype == torch.float16
    expected = naive_base_updates(*chain.to(torch.float64), 2, weighting)[-1]
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=40)  # one part in 1000 of values of 4e4


@pytest.mark.parametrize("options", [{}, {"weighting": "sigmoid"}, {"value_act": "gelu", "last": 2}], ids=str)
def test_bfloat16_agrees_with_float32(options):
    chain = random_chain(3, 8, 4, 4, dtype=torch.float32).to(torch.bfloat16)
    outs = run_chain(base_update, chain, 2, **options)
    expected = run_chain(base_update, chain.to(torch.float32), 2, **options)
    for out, full in zip(outs, expected, strict=True):
        assert out.dtype == torch.bfloat16
        assert (out.float() - full).norm() < 0.005 * full.norm()  # values and sum are rounded to 8 bits


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
)
@pytest.mark.parametrize("options", [{}, {"value_act": "gelu"}, {"weighting": "sigmoid"}], ids=str)
def test_what_is_kept_for_backward_grows_with_the_blocks_and_not_with_their_square(options, dtype):
    def saved(length: int) -> float:
        chain = random_chain(length, 4, 16, 16, dtype=dtype)
        chain = Chain(*([tensor.requires_grad_() for tensor in part] for part in chain))
        map_bytes = chain.xs[0].untyped_storage().nbytes()
        return maps_saved_for_backward(lambda: run_chain(base_update, chain, 2, **options), map_bytes)

    per_block = 3 if "value_act" in options else 2  # x_t and v_t, and what the activation was given
    assert [saved(length) for length in (2, 4, 8)] == [2 * per_block, 4 * per_block, 8 * per_block]


def test_no_values_are_concatenated():
    chain = random_chain(4, 4, 16, 16)
    with ConcatenatedMaps(chain.xs[0].numel()) as concatenated:
        run_chain(base_update, chain, 2)
    assert concatenated.count == 0
    with ConcatenatedMaps(chain.xs[0].numel()) as concatenated:
        torch.stack(chain.xs)
    assert concatenated.count == 1


@given(
    batch=st.integers(1, 3),
    blocks=st.integers(1, 5),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 4),
    size=st.floats(0.1, 100),
    seed=st.integers(0, 2**16),
)
@FEW
def test_softmax_weights_are_shares_and_sigmoid_weights_are_light_gates(batch, blocks, heads, head_dim, size, seed):
    torch.manual_seed(seed)
    query, *keys = (size * torch.randn(blocks + 1, batch, heads, head_dim, dtype=torch.float64)).unbind()
    shares = layer_weights(query, keys)
    assert shares.shape == (batch, blocks, heads)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(batch, heads, dtype=torch.float64))
    gates = layer_weights(query, keys, "sigmoid")
    for s, key in enumerate(keys):
        torch.testing.assert_close(gates[:, s], ((query * key).sum(-1) / head_dim**0.5).sigmoid())


@given(blocks=st.integers(1, 5), heads=st.integers(1, 4), head_dim=st.integers(1, 4), seed=st.integers(0, 2**16))
@FEW
def test_weighted_sum_is_the_einsum(blocks, heads, head_dim, seed):
    torch.manual_seed(seed)
    weights = torch.randn(2, blocks, heads, dtype=torch.float64)
    maps = torch.randn(blocks, 2, heads * head_dim, 3, 2, dtype=torch.float64)
    assert_same_values_and_gradients(
        lambda leaves: [weighted_sum(leaves[0], leaves[1].unbind())],
        lambda leaves: [
            torch.einsum("btg,tbgdhw->bgdhw", leaves[0], leaves[1].unflatten(2, (heads, -1))).flatten(1, 2)
        ],
        weights,
        maps,
    )


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 4, 3)}, r"x must be a batch of maps .*got shape \(2, 4, 3\)"),
        ({"x": torch.randn(2, 4, 0, 3)}, r"x must be a batch of maps .*got shape \(2, 4, 0, 3\)"),
        ({"x": torch.randn(2, 6, 3, 3)}, r"value_weight must be \(c, 1, 3, 3\) for x with c = 6"),
        ({"query_weight": torch.randn(1, 1, 4)}, r"query_weight and key_weight must both be \(1, 1, k\) with k odd"),
        ({"key_weight": torch.randn(1, 1, 5)}, r"got \(1, 1, 3\) and \(1, 1, 5\)"),
        ({"heads": 3}, "heads must divide the channels: got heads=3, channels=4"),
        ({"heads": 0}, "heads must divide the channels: got heads=0"),
        ({"heads": 4}, r"every key of the memory must be .* = \(2, 4, 1\): got \(2, 2, 2\); .* other heads"),
        ({"x": torch.randn(2, 4, 3, 5)}, r"every value of the memory must have the shape of x, \(2, 4, 3, 5\)"),
        ({"x": torch.randn(1, 4, 3, 3)}, r"every value of the memory must have the shape of x, \(1, 4, 3, 3\)"),
        ({"last": 0}, "last must be at least 1 block.*got 0"),
        ({"last": -2}, "last must be at least 1 block.*got -2"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "x": torch.randn(2, 4, 3, 3),
        "query_weight": torch.randn(1, 1, 3),
        "key_weight": torch.randn(1, 1, 3),
        "value_weight": torch.randn(4, 1, 3, 3),
        "heads": 2,
    }
    _, memory = base_update(memory=None, **given)
    with pytest.raises(ValueError, match=message):
        base_update(memory=memory, **{**given, **change})
