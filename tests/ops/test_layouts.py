"""Tokens and maps: one set of numbers, laid out in three ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.chains import FEW

from mrla.ops import from_map, resolve_grid, to_map


@given(side=st.integers(1, 40), prefix=st.integers(0, 5))
@FEW
def test_without_a_grid_the_patches_form_a_square(side, prefix):
    assert resolve_grid(side * side + prefix, prefix) == (side, side)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), prefix=st.integers(0, 5))
@FEW
def test_a_given_grid_is_taken_as_it_is(rows, columns, prefix):
    assert resolve_grid(rows * columns + prefix, prefix, (rows, columns)) == (rows, columns)


@pytest.mark.parametrize(
    ("tokens", "prefix", "grid", "message"),
    [
        (
            8,
            0,
            None,
            "without a grid the patch tokens must form a square: got 8 tokens of which 0 are prefix tokens, 8",
        ),
        (9, 1, None, r"got 9 tokens of which 1 are prefix tokens, 8 patches; pass grid=\(rows, columns\)"),
        (2, 2, None, "must form a square: got 2 tokens of which 2 are prefix tokens, 0 patches"),
        (1, 2, None, "must form a square: got 1 tokens of which 2 are prefix tokens, -1 patches"),
        (12, 0, (3, 5), r"the grid must hold every patch token: got grid=\(3, 5\) for 12 tokens"),
        (12, 1, (3, 4), r"got grid=\(3, 4\) for 12 tokens of which 1 are prefix tokens, 11 patches"),
        (12, 0, (-3, -4), r"the grid must hold every patch token: got grid=\(-3, -4\)"),
        (0, 0, (0, 4), r"the grid must hold every patch token: got grid=\(0, 4\)"),
    ],
)
def test_a_grid_that_does_not_hold_the_patches_is_refused(tokens, prefix, grid, message):
    with pytest.raises(ValueError, match=message):
        resolve_grid(tokens, prefix, grid)


@given(
    layout=st.sampled_from(["NCHW", "NHWC", "NLC"]),
    channels=st.integers(1, 5),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    prefix=st.integers(0, 2),
)
@FEW
def test_there_and_back_are_views_of_the_same_numbers(layout, channels, rows, columns, prefix):
    prefix = prefix if layout == "NLC" else 0
    shape = {
        "NCHW": (2, channels, rows, columns),
        "NHWC": (2, rows, columns, channels),
        "NLC": (2, prefix + rows * columns, channels),
    }[layout]
    x = torch.randn(shape)
    maps = to_map(x, layout, num_prefix_tokens=prefix, grid=(rows, columns))
    assert maps.shape == (2, channels, rows, columns)
    back = from_map(maps, layout)
    assert torch.equal(back, x[:, prefix:] if prefix else x)
    for view in (maps, back):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC"])
def test_there_is_the_inverse_of_back(layout):
    maps = torch.randn(2, 3, 4, 5)
    assert torch.equal(to_map(from_map(maps, layout), layout, grid=(4, 5)), maps)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_patches_lie_row_by_row_behind_the_prefix(prefix):
    tokens = torch.arange(2.0 * (prefix + 6) * 3).reshape(2, prefix + 6, 3)
    maps = to_map(tokens, "NLC", num_prefix_tokens=prefix, grid=(2, 3))
    for row in range(2):
        for column in range(3):
            assert torch.equal(maps[:, :, row, column], tokens[:, prefix + 3 * row + column])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("layout", "shape"), [("NCHW", (2, 9, 4)), ("NHWC", (2, 9, 4)), ("NLC", (2, 3, 3, 4)), ("NLC", (9, 4))]
)
def test_another_number_of_axes_is_refused(layout, shape):
    message = rf"features in layout {layout} have {len(layout)} axes: got shape \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        to_map(torch.randn(shape), layout)
