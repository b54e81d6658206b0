"""Queries, keys and values under what one may do to an image."""

import pytest
import torch
from torch.nn.functional import pad

from mrla.ops import depthwise_value, light_gate
from mrla.ops.projections import per_channel, pool, slide


def circular_value(x, kernel, value_act):
    """The value of an image that goes on at its other side."""
    return depthwise_value(pad(x, (1, 1, 1, 1), mode="circular"), kernel, value_act)[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize("value_act", [None, "gelu", "relu"])
@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (3, 1)], ids=str)
def test_rolling_the_image_rolls_the_values_and_leaves_the_gate(shift, value_act):
    x, kernel = torch.randn(2, 6, 5, 4, dtype=torch.float64), torch.randn(6, 1, 3, 3, dtype=torch.float64)
    rolled = torch.roll(x, shift, (2, 3))
    torch.testing.assert_close(
        circular_value(rolled, kernel, value_act), torch.roll(circular_value(x, kernel, value_act), shift, (2, 3))
    )
    query, key = torch.randn(2, 1, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(light_gate(rolled, query, key, 3), light_gate(x, query, key, 3))


def test_inside_an_image_padding_is_not_felt():
    x, kernel = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(depthwise_value(x, kernel)[inner], circular_value(x, kernel, None)[inner])


def test_channels_slide_past_the_kernel_with_zeros_beyond_the_ends():
    pooled = torch.tensor([[1.0, 2.0, 3.0]])
    left, right = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]])
    one, other = slide(pooled, left, right)
    assert one.tolist() == [[0.0, 1.0, 2.0]]
    assert other.tolist() == [[2.0, 3.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_and_what_follows_it_are_float32_under_autocast(dtype):
    x = torch.full((2, 4, 3, 3), 3e4)
    tap = torch.tensor([[[0.0, 3.0, 0.0]]])
    with torch.autocast("cpu", dtype=dtype):
        pooled = pool(x.to(dtype))
        (query,) = slide(pooled, tap)
    assert pooled.dtype == query.dtype == torch.float32
    torch.testing.assert_close(query, 3 * pooled)


def test_a_number_per_head_is_one_for_each_of_its_channels():
    per_head = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert per_channel(per_head, 6).shape == (2, 6, 1, 1)
    assert per_channel(per_head, 6).flatten(1).tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
