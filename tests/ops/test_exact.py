"""Layer attention as the paper defines it against plain loops, and against MRLA-base."""

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
from oracles.naive import naive_exact_updates

from mrla.ops import OutputMemory, base_update, depthwise_value, exact_update


@pytest.mark.parametrize(("length", "channels", "heads", "size", "kernel_size", "options"), CHAINS)
def test_a_chain_equals_naive_in_values_and_gradients(length, channels, heads, size, kernel_size, options):
    chain = random_chain(length, channels, *size, kernel_size)
    assert_same_values_and_gradients(
        lambda leaves: run_chain(exact_update, Chain.of(leaves), heads, **options),
        lambda leaves: naive_exact_updates(*Chain.of(leaves), heads, **options),
        *chain.tensors(),
    )


@given(
    length=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 3, 8]),
    head_dim=st.integers(1, 4),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    kernel_size=st.sampled_from([3, 5, 7]),
    weighting=st.sampled_from(["softmax", "sigmoid"]),
    value_act=st.sampled_from([None, "gelu", "relu"]),
    last=st.sampled_from([None, 1, 2, 3]),
    seed=st.integers(0, 2**16),
)
@FEW
def test_kernels_tied_over_the_blocks_make_it_base(
    length, heads, head_dim, height, width, kernel_size, weighting, value_act, last, seed
):
    torch.manual_seed(seed)
    chain = random_chain(length, heads * head_dim, height, width, kernel_size)

    def updates(step, leaves):
        *xs, query, key, value = leaves
        tied = Chain(xs, [query] * length, [key] * length, [value] * length)
        return run_chain(step, tied, heads, weighting=weighting, value_act=value_act, last=last)

    assert_same_values_and_gradients(
        lambda leaves: updates(exact_update, leaves),
        lambda leaves: updates(base_update, leaves),
        *chain.xs,
        chain.query_weights[0],
        chain.key_weights[0],
        chain.value_weights[0],
    )


def test_untied_kernels_do_not():
    chain = random_chain(3, 4)
    first, *others = zip(run_chain(exact_update, chain, 2), run_chain(base_update, chain, 2), strict=True)
    torch.testing.assert_close(*first)
    assert all((exact - base).abs().max() > 1e-3 for exact, base in others)


@pytest.mark.parametrize("value_act", [None, "gelu", "relu"])
@pytest.mark.parametrize("place", ["head of a chain", "window of one"])
def test_one_block_attends_to_itself(place, value_act):
    """Its output is its value, and its query and key hear nothing: exactly."""
    length, last = (1, None) if place == "head of a chain" else (3, 1)
    chain = Chain(*([tensor.requires_grad_() for tensor in part] for part in random_chain(length, 4, 3, 3)))
    out = run_chain(exact_update, chain, heads=2, value_act=value_act, last=last)[-1]
    torch.testing.assert_close(
        out, depthwise_value(chain.xs[-1], chain.value_weights[-1], value_act), atol=1e-15, rtol=0
    )
    out.square().sum().backward()
    assert chain.query_weights[-1].grad.abs().max() == 0
    assert chain.key_weights[-1].grad.abs().max() == 0
    assert chain.value_weights[-1].grad.abs().min() > 0


@pytest.mark.parametrize("value_act", [None, "gelu"])
def test_equal_keys_give_the_mean_of_the_values(value_act):
    chain = random_chain(4, 6, 3, 3)
    pooled = torch.randn(2, 6, 1, 1, dtype=torch.float64)
    chain = chain._replace(xs=[x - x.mean((2, 3), keepdim=True) + pooled for x in chain.xs])
    for t, out in enumerate(run_chain(exact_update, chain, heads=3, value_act=value_act), start=1):
        values = [depthwise_value(x, chain.value_weights[t - 1], value_act) for x in chain.xs[:t]]
        torch.testing.assert_close(out, torch.stack(values).mean(0))


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_the_order_of_the_blocks_before_does_not_matter(order, weighting):
    chain = random_chain(4, 4)
    outs, memories = run_chain_with_memories(exact_update, chain, 2, weighting=weighting)
    permuted = OutputMemory(*(tuple(part[s] for s in order) for part in memories[2]))
    *_, last_block = zip(*chain, strict=True)
    out, _ = exact_update(last_block[0], permuted, *last_block[1:], 2, weighting)
    torch.testing.assert_close(out, outs[-1])


def test_the_memory_holds_the_very_outputs_and_hands_on_the_very_means():
    chain = random_chain(4, 4)
    _, memories = run_chain_with_memories(exact_update, chain, 2)
    for t, memory in enumerate(memories, start=1):
        assert len(memory.outputs) == len(memory.pooled) == t
        assert all(output is x for output, x in zip(memory.outputs, chain.xs[:t], strict=True))
        assert all(one is same for one, same in zip(memory.pooled, memories[-1].pooled[:t], strict=True))


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_a_window_bounds_the_memory_and_forgets_what_lies_before_it(last):
    chain = random_chain(5, 4)
    outs, memories = run_chain_with_memories(exact_update, chain, 2, last=last)
    # Block t + 1 asks itself and the last - 1 blocks before it.
    assert [len(memory.outputs) for memory in memories] == [min(t, last - 1) for t in range(1, 6)]
    assert [len(memory.pooled) for memory in memories] == [min(t, last - 1) for t in range(1, 6)]
    short = Chain(*(part[5 - last :] for part in chain))
    torch.testing.assert_close(outs[-1], run_chain(exact_update, short, 2)[-1])


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value_act", [None, "gelu"])
def test_gradcheck(weighting, value_act):
    leaves = [tensor.requires_grad_() for tensor in random_chain(2, 4, 2, 1).tensors()]

    def function(*inputs):
        return run_chain(exact_update, Chain.of(inputs), 2, weighting=weighting, value_act=value_act)[-1]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_float16_survives_sums_that_overflow_in_it(weighting):
    """Maps of size 3e4, with signs +, +, +, -: the sum over space overflows, and so does that of the first three."""
    xs = [sign * torch.empty(2, 4, 3, 3).uniform_(2.95e4, 3.05e4) for sign in (1, 1, 1, -1)]
    centre = torch.zeros(4, 1, 3, 3)
    centre[:, :, 1, 1] = 0.9
    key = torch.full((1, 1, 3), 1.18e-5)  # makes gates of 0.76 for the first three and 0.24 for the last
    chain = Chain(xs, [-key] * 4, [key] * 4, [centre] * 4).to(torch.float16)
    assert chain.xs[0].sum((2, 3)).isinf().all()
    assert (0.75 * chain.xs[0] + 0.75 * chain.xs[1] + 0.75 * chain.xs[2]).isinf().all()
    out = run_chain(exact_update, chain, 2, weighting=weighting)[-1]
    expected = naive_exact_updates(*chain.to(torch.float64), 2, weighting)[-1]
    assert out.dtype == torch.float16
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=40)  # one part in 1000 of values of 3e4


@pytest.mark.parametrize("options", [{}, {"weighting": "sigmoid"}, {"value_act": "gelu", "last": 2}], ids=str)
def test_bfloat16_agrees_with_float32(options):
    chain = random_chain(3, 8, 4, 4, dtype=torch.float32).to(torch.bfloat16)
    outs = run_chain(exact_update, chain, 2, **options)
    expected = run_chain(exact_update, chain.to(torch.float32), 2, **options)
    for out, full in zip(outs, expected, strict=True):
        assert out.dtype == torch.bfloat16
        assert (out.float() - full).norm() < 0.005 * full.norm()  # values and sum are rounded to 8 bits


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
)
@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_what_is_kept_for_backward_grows_with_the_blocks_and_not_with_their_square(weighting, dtype):
    def saved(length: int) -> float:
        chain = random_chain(length, 4, 16, 16, dtype=dtype)
        chain = Chain(*([tensor.requires_grad_() for tensor in part] for part in chain))
        map_bytes = chain.xs[0].untyped_storage().nbytes()
        return maps_saved_for_backward(lambda: run_chain(exact_update, chain, 2, weighting=weighting), map_bytes)

    assert [saved(length) for length in (2, 4, 8)] == [4, 8, 16]  # x_t and the sum that the convolution is given


def test_no_outputs_are_concatenated_and_one_convolution_makes_all_values():
    chain = random_chain(4, 4, 16, 16)
    with ConcatenatedMaps(chain.xs[0].numel()) as concatenated:
        run_chain(exact_update, chain, 2)
    assert concatenated.count == 0


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 4, 3)}, r"x must be a batch of maps .*got shape \(2, 4, 3\)"),
        ({"x": torch.randn(2, 6, 3, 3)}, r"value_weight must be \(c, 1, 3, 3\) for x with c = 6"),
        ({"query_weight": torch.randn(1, 1, 4)}, r"query_weight and key_weight must both be \(1, 1, k\) with k odd"),
        ({"key_weight": torch.randn(1, 1, 5)}, r"got \(1, 1, 3\) and \(1, 1, 5\)"),
        ({"heads": 3}, "heads must divide the channels: got heads=3, channels=4"),
        ({"x": torch.randn(2, 4, 3, 5)}, r"every output of the memory must have the shape of x, \(2, 4, 3, 5\)"),
        ({"x": torch.randn(1, 4, 3, 3)}, r"every output of the memory must have the shape of x, \(1, 4, 3, 3\)"),
        ({"last": 0}, "last must be at least 1 block.*got 0"),
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
    _, memory = exact_update(memory=None, **given)
    with pytest.raises(ValueError, match=message):
        exact_update(memory=memory, **{**given, **change})
