import pytest
import torch

from mrla.ops import METHODS, ChainPlace, DepthwiseMixer, MRLALight, light_update

SETTINGS = [
    pytest.param(MRLALight, {}, id="light"),
    pytest.param(MRLALight, {"carry": "output", "place": ChainPlace(1, 3)}, id="light-output"),
    pytest.param(MRLALight, {"norm": "layer", "heads": 4}, id="light-layernorm"),
    pytest.param(MRLALight, {"has_shortcut": False}, id="light-no-shortcut"),
    pytest.param(DepthwiseMixer, {}, id="dw"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("mixer_class", "options"), SETTINGS)
def test_identity_start_is_bit_equal(mixer_class, options, training):
    mixer = mixer_class(16, **options).train(training)
    x, shortcut, memory = (torch.randn(3, 16, 5, 4) for _ in range(3))
    assert torch.equal(mixer(x, shortcut, memory)[0], x)


@pytest.mark.parametrize("init", ["identity", "released", "notebook"])
@pytest.mark.parametrize(("mixer_class", "options"), SETTINGS)
def test_every_parameter_learns_within_two_steps(mixer_class, options, init):
    mixer = mixer_class(16, init=init, **options).double()
    optimizer = torch.optim.SGD(mixer.parameters(), lr=0.1)
    x, shortcut, memory, target = (torch.randn(4, 16, 5, 4, dtype=torch.float64) for _ in range(4))
    silent = set(dict(mixer.named_parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        (mixer(x, shortcut, memory)[0] - target).square().mean().backward()
        silent -= {name for name, p in mixer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert silent == set(mixer.silent_parameters())


def test_light_is_the_equation():
    mixer = MRLALight(16, heads=4, init="released").double().eval()
    x, shortcut = torch.randn(2, 16, 5, 4, dtype=torch.float64), torch.randn(2, 16, 5, 4, dtype=torch.float64)
    update = light_update(x, shortcut, mixer.query_weight, mixer.key_weight, mixer.value_weight, mixer.decay, 4)
    expected = x + update / (1 + 1e-5) ** 0.5  # running mean 0, variance 1
    torch.testing.assert_close(mixer(x, shortcut)[0], expected)


def test_carry_output_hands_its_update_on_and_has_no_lambda_at_the_head():
    head = MRLALight(16, carry="output", place=ChainPlace(0, 2))
    assert head.decay is None
    x = torch.randn(2, 16, 4, 4)
    _, memory = head(x, torch.randn_like(x))
    torch.testing.assert_close(
        memory, light_update(x, None, head.query_weight, head.key_weight, head.value_weight, None, heads=1)
    )
    follower = MRLALight(16, carry="output", place=ChainPlace(1, 2), init="released").eval()
    assert not torch.equal(follower(x, None, memory)[0], follower(x, None, 2 * memory)[0])


def test_drop_path_leaves_out_whole_images_in_training_only():
    mixer = MRLALight(8, drop_path=0.5, init="released")
    x = torch.randn(64, 8, 3, 3)
    dropped = (mixer(x, x)[0] == x).flatten(1).all(1)
    assert 10 < dropped.sum() < 54
    assert not (mixer.eval()(x, x)[0] == x).flatten(1).all(1).any()


@pytest.mark.parametrize(("mixer_class", "options"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_residual_stream_in_its_dtype(mixer_class, options, dtype):
    mixer = mixer_class(16, init="released", **options)
    x = torch.randn(2, 16, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        assert mixer(x.to(dtype), x.to(dtype), x.to(dtype))[0].dtype == dtype
        assert mixer(x, x, x)[0].dtype == torch.float32


@pytest.mark.parametrize(("mixer_class", "options"), SETTINGS)
def test_bfloat16_agrees_with_float32(mixer_class, options):
    mixer = mixer_class(16, init="released", **options).eval()
    x, shortcut, memory = (torch.randn(2, 16, 6, 6) for _ in range(3))
    expected = mixer(x, shortcut, memory)[0]
    low = mixer.to(torch.bfloat16)(*(tensor.to(torch.bfloat16) for tensor in (x, shortcut, memory)))[0]
    # bfloat16 carries 8 bits; three roundings of numbers up to about 8.
    torch.testing.assert_close(low.float(), expected, atol=0.15, rtol=0.03)


def test_released_start_is_drawn_as_measured():
    mixer = MRLALight(1024, init="released")
    assert abs(mixer.decay.std().item() - 1) < 0.1
    assert abs(mixer.value_weight.std().item() / (2 / (9 * 1024)) ** 0.5 - 1) < 0.05
    assert mixer.norm.weight.eq(1).all()


def test_notebook_start_is_drawn_as_measured():
    draws = torch.stack([MRLALight(64, init="notebook").decay.detach() for _ in range(300)])
    assert draws.abs().max() <= (6 / 65) ** 0.5
    assert abs(draws.std().item() - 0.17541) < 0.003
    queries = torch.stack([MRLALight(64, init="notebook").query_weight.detach() for _ in range(2000)])
    assert abs(queries.std().item() - 0.8165) < 0.02


def test_lambda_is_a_vector_so_that_timm_does_not_decay_it():
    mixer = MRLALight(32)
    assert mixer.decay.shape == (32,)
    assert mixer.norm.weight.shape == (32,)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 10}, "head_dim must divide the channels: got head_dim=10, channels=16; try 8"),
        ({"carry": "input"}, "carry must be one of 'shortcut', 'output': got 'input'"),
        ({"norm": "group"}, "norm must be one of 'batch', 'layer': got 'group'"),
        ({"init": "zero"}, "init must be one of"),
        ({"drop_path": 1.0}, r"drop_path must be a probability in \[0, 1\): got 1.0"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        MRLALight(16, **options)


def test_methods_by_name():
    assert METHODS == {"light": MRLALight, "dw": DepthwiseMixer}
