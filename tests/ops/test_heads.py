import pytest

from mrla.ops import channel_kernel_size, resolve_heads


@pytest.mark.parametrize(
    ("channels", "kernel_size"), [(8, 3), (16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (2048, 7)]
)
def test_kernel_size_is_the_published_rule(channels, kernel_size):
    assert channel_kernel_size(channels) == kernel_size


@pytest.mark.parametrize("channels", range(1, 200))
def test_default_width_always_divides_and_never_exceeds_the_wish(channels):
    heads = resolve_heads(channels, default=32)
    width = channels // heads
    assert heads * width == channels
    assert width <= 32
    assert not any(channels % other == 0 for other in range(width + 1, 33))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head_dim": 48}, r"head_dim must divide the channels: got head_dim=48, channels=64; try 32"),
        ({"head_dim": 128}, r"head_dim must divide.*got head_dim=128, channels=64; try 64"),
        ({"head_dim": 0}, r"head_dim must divide"),
        ({"heads": 3}, r"heads must divide the channels: got heads=3, channels=64; try 2"),
        ({"heads": -1}, r"heads must divide"),
        ({"heads": 2, "head_dim": 32}, r"give head_dim or heads, not both"),
    ],
)
def test_a_given_width_or_count_is_a_promise(given, message):
    with pytest.raises(ValueError, match=message):
        resolve_heads(64, **given)


def test_channels_must_be_positive():
    with pytest.raises(ValueError, match="channels must be positive"):
        resolve_heads(0)
