"""The contract of a layer mixer, held by every method in every layout and form."""

import copy
import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from oracles.chains import random_chain
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mrla.ops import (
    METHODS,
    ChainPlace,
    DepthwiseMixer,
    LayerAttention,
    LayerMemory,
    LayerMixer,
    MRLABase,
    MRLALight,
    OutputMemory,
    base_update,
    depthwise_value,
    exact_update,
    from_map,
    light_update,
)

CHANNELS = 8
ROWS, COLUMNS = 5, 4


@dataclass(frozen=True)
class Setting:
    """A chain of mixers of one kind, and the features that go through it."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    length: int = 3
    class_token_only: bool = False

    def mixers(self, **more: Any) -> list[LayerMixer]:
        last = self.length - 1
        places = [ChainPlace(i, self.length, self.class_token_only and i == last) for i in range(self.length)]
        return [METHODS[self.method](CHANNELS, place=place, **{**self.options, **more}) for place in places]

    @property
    def layout(self) -> str:
        return self.options.get("layout", "NCHW")

    def features(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.layout == "NCHW":
            shape = (batch, CHANNELS, ROWS, COLUMNS)
        elif self.layout == "NHWC":
            shape = (batch, ROWS, COLUMNS, CHANNELS)
        else:
            rows, columns = self.grid or (4, 4)
            shape = (batch, self.options.get("num_prefix_tokens", 0) + rows * columns, CHANNELS)
        return torch.randn(shape, dtype=dtype)


def block(x: Tensor, layout: str) -> Tensor:
    """A block in which every token or pixel and every channel hears others."""
    axis = 1 if layout == "NCHW" else -1
    space = [other for other in range(1, x.ndim) if other != axis % x.ndim]
    return (x + 0.5 * x.roll(1, axis) + x.mean(space, keepdim=True)).tanh()


def run(mixers: list[LayerMixer], x: Tensor, setting: Setting) -> tuple[list[Tensor], list[Tensor]]:
    """What each block gave, and what its mixer made of it."""
    memory, blocks, outs = None, [], []
    for mixer in mixers:
        shortcut = x
        blocks.append(block(shortcut, setting.layout))
        x, memory = mixer(blocks[-1], shortcut, memory, grid=setting.grid)
        outs.append(x)
    return blocks, outs


def randomise(mixers: list[LayerMixer], keep_identity: bool = False) -> list[LayerMixer]:
    """Gives norms, and unless the identity is to be kept every scale, weights that hide nothing."""
    with torch.no_grad():
        for mixer in mixers:
            for name, module in mixer.named_modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(std=0.1)
                    module.running_var.uniform_(0.5, 1.5)
                last = name == "norm" and mixer.scale is None
                if "norm" in name.split(".")[-1] and not (keep_identity and last):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.1)
            if mixer.scale is not None and not keep_identity:
                mixer.scale.uniform_(0.5, 1.5)
    return mixers


FORMS = {
    "NCHW": Setting(""),
    "NCHW-layer": Setting("", {"norm": "layer"}),
    "NCHW-pre_layer": Setting("", {"norm": "pre_layer"}),
    "NHWC": Setting("", {"layout": "NHWC"}),
    "NHWC-batch-gelu": Setting("", {"layout": "NHWC", "norm": "batch", "out_act": "gelu"}),
    "NHWC-pre_layer": Setting("", {"layout": "NHWC", "norm": "pre_layer"}),
    "NLC": Setting("", {"layout": "NLC"}),
    "NLC-batch-5x3": Setting("", {"layout": "NLC", "norm": "batch"}, (5, 3)),
    "NLC-1-relu": Setting("", {"layout": "NLC", "num_prefix_tokens": 1, "out_act": "relu"}),
    "NLC-2-3x5": Setting("", {"layout": "NLC", "num_prefix_tokens": 2, "out_act": None}, (3, 5)),
    "NLC-pre_layer": Setting("", {"layout": "NLC", "norm": "pre_layer", "out_act": None}),
    "NLC-1-pre_layer": Setting("", {"layout": "NLC", "norm": "pre_layer", "num_prefix_tokens": 1, "out_act": None}),
    "NLC-2-pre_layer-2x6": Setting("", {"layout": "NLC", "norm": "pre_layer", "num_prefix_tokens": 2}, (2, 6)),
}
ONE_BY_ONE = {
    "light-output": Setting("light", {"carry": "output", "heads": 2}),
    "light-output-tokens": Setting("light", {"carry": "output", "layout": "NLC", "num_prefix_tokens": 1}),
    "light-output-pre_layer": Setting("light", {"carry": "output", "norm": "pre_layer"}),
    "light-no-shortcut": Setting("light", {"has_shortcut": False}),
    "light-no-shortcut-pre_layer": Setting("light", {"has_shortcut": False, "norm": "pre_layer"}),
    "light-deit": Setting("light", {"layout": "NLC", "num_prefix_tokens": 1, "norm": "pre_layer", "value_act": "gelu"}),
    "light-channel-wise": Setting("light", {"head_dim": 1}),
    "base-no-relu": Setting("base", {"out_act": None}),
    "base-channel-wise": Setting("base", {"head_dim": 1}),
    "base-sigmoid": Setting("base", {"weighting": "sigmoid", "value_act": "gelu"}),
    "base-last-1": Setting("base", {"last": 1}),
    "base-last-1-sigmoid": Setting("base", {"last": 1, "weighting": "sigmoid"}),
    "base-last-2": Setting("base", {"last": 2, "heads": 4}),
    "base-chain-of-one": Setting("base", length=1),
    "exact-channel-wise": Setting("exact", {"head_dim": 1}),
    "exact-sigmoid": Setting("exact", {"weighting": "sigmoid"}),
    "exact-last-1": Setting("exact", {"last": 1, "value_act": "gelu"}),
    "exact-last-1-sigmoid": Setting("exact", {"last": 1, "weighting": "sigmoid"}),
    "exact-last-2": Setting("exact", {"last": 2, "out_act": "relu"}),
    "exact-chain-of-one": Setting("exact", length=1),
    "dw-gelu": Setting("dw", {"value_act": "gelu", "out_act": "gelu"}),
}
ALL = {
    **{f"{method}-{name}": replace(form, method=method) for method in METHODS for name, form in FORMS.items()},
    **ONE_BY_ONE,
}
SETTINGS = [pytest.param(setting, id=name) for name, setting in ALL.items()]
UNREAD = [
    pytest.param(replace(setting, class_token_only=True), id=f"{name}-class-token-only")
    for name, setting in ALL.items()
    if setting.options.get("num_prefix_tokens")
]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_identity_start_is_bit_equal(setting, training, autocast):
    mixers = [mixer.train(training) for mixer in randomise(setting.mixers(), keep_identity=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        blocks, outs = run(mixers, 10 * setting.features(), setting)
    assert all(torch.equal(out, given) for given, out in zip(blocks, outs, strict=True))


@pytest.mark.parametrize("init", ["identity", "released", "notebook"])
@pytest.mark.parametrize("setting", [*SETTINGS, *UNREAD])
def test_every_parameter_learns_within_two_steps_but_those_that_cannot(setting, init):
    mixers = [mixer.double() for mixer in setting.mixers(init=init)]
    optimizer = torch.optim.SGD([p for mixer in mixers for p in mixer.parameters()], lr=0.1)
    x, target = setting.features(dtype=torch.float64), setting.features(dtype=torch.float64)
    read = slice(1) if setting.class_token_only else slice(None)
    named = [{f"{i}.{name}": p for name, p in mixer.named_parameters()} for i, mixer in enumerate(mixers)]
    parameters = {name: p for part in named for name, p in part.items()}
    gradients = dict.fromkeys(parameters, 0.0)
    for _ in range(2):
        optimizer.zero_grad()
        _, outs = run(mixers, x, setting)
        (outs[-1] - target)[:, read].square().mean().backward()
        for name, p in parameters.items():
            assert p.grad is not None, f"{name} is not in the graph"
            gradients[name] = max(gradients[name], p.grad.abs().max().item())
        optimizer.step()
    silent = {f"{i}.{name}" for i, mixer in enumerate(mixers) for name in mixer.zero_grad_parameters()}
    assert {name for name, size in gradients.items() if size == 0} == silent
    assert all(size > 1e-12 for name, size in gradients.items() if name not in silent)  # more than rounding


def test_who_is_silent():
    """The table itself, so that the test above cannot pass with an empty one."""

    def silent(method, index, **options):
        return METHODS[method](CHANNELS, place=ChainPlace(index, 3), **options).zero_grad_parameters()

    assert silent("base", 0) == ("query_weight",)
    assert silent("base", 1) == silent("base", 2) == silent("base", 0, weighting="sigmoid") == ()
    assert silent("base", 2, last=1) == ("query_weight", "key_weight")
    assert silent("exact", 0) == silent("exact", 2, last=1) == ("query_weight", "key_weight")
    assert silent("exact", 1) == silent("exact", 0, weighting="sigmoid") == ()
    assert silent("light", 0) == silent("dw", 0) == ()
    token = {"layout": "NLC", "num_prefix_tokens": 1, "place": ChainPlace(2, 3, unread=1)}
    assert set(DepthwiseMixer(8, **token).zero_grad_parameters()) == {"value_weight", "norm.weight", "norm.bias"}
    assert DepthwiseMixer(8, norm="pre_layer", **token).zero_grad_parameters() == ("value_weight",)
    assert set(MRLALight(8, norm="pre_layer", **token).zero_grad_parameters()) == {
        *("query_weight", "key_weight", "value_weight", "decay", "shortcut_norm.weight", "shortcut_norm.bias")
    }


@pytest.mark.parametrize("norm", ["batch", "layer", "pre_layer"])
@pytest.mark.parametrize("init", ["identity", "released"])
@pytest.mark.parametrize("layout", ["NHWC", "NLC"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_and_channels_last_maps_are_treated_as_maps(method, layout, init, norm):
    """The same parameters give the same, laid out otherwise, and get the same gradients."""
    maps = Setting(method, {"norm": norm, "init": init})
    other = Setting(method, {"norm": norm, "init": init, "layout": layout}, (ROWS, COLUMNS))
    chain = randomise([mixer.double() for mixer in maps.mixers()])
    twins = [mixer.double() for mixer in other.mixers()]
    for mixer, twin in zip(chain, twins, strict=True):
        twin.load_state_dict(mixer.state_dict())
    memory = twin_memory = None
    for mixer, twin in zip(chain, twins, strict=True):
        x, shortcut = maps.features(dtype=torch.float64), maps.features(dtype=torch.float64)
        out, memory = mixer(x, shortcut, memory)
        twin_out, twin_memory = twin(from_map(x, layout), from_map(shortcut, layout), twin_memory, grid=other.grid)
        torch.testing.assert_close(twin_out, from_map(out, layout))
    cotangent = torch.randn_like(out)
    (out * cotangent).sum().backward()
    (twin_out * from_map(cotangent, layout)).sum().backward()
    for mixer, twin in zip(chain, twins, strict=True):
        for one, same in zip(mixer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, same.grad)


@pytest.mark.parametrize("num_prefix_tokens", [1, 2])
@pytest.mark.parametrize("init", ["identity", "released"])
@pytest.mark.parametrize("norm", ["batch", "layer", "pre_layer"])
@pytest.mark.parametrize("method", METHODS)
def test_prefix_tokens_pass_by(method, norm, init, num_prefix_tokens):
    """Unchanged, or with their own LayerNorm added where the norm stands in front; the patches do not feel them."""
    tokens = Setting(method, {"layout": "NLC", "norm": norm, "init": init}, (ROWS, COLUMNS))
    prefixed = replace(tokens, options={**tokens.options, "num_prefix_tokens": num_prefix_tokens})
    mixers, twins = randomise(tokens.mixers()), prefixed.mixers()
    memory = twin_memory = None
    for mixer, twin in zip(mixers, twins, strict=True):
        twin.load_state_dict(mixer.state_dict())
        x, shortcut = prefixed.features(), prefixed.features()
        patches, shortcut_patches = x[:, num_prefix_tokens:], shortcut[:, num_prefix_tokens:]
        expected, memory = mixer(patches, shortcut_patches, memory, grid=tokens.grid)
        out, twin_memory = twin(x, shortcut, twin_memory, grid=tokens.grid)
        torch.testing.assert_close(out[:, num_prefix_tokens:], expected)
        prefix = x[:, :num_prefix_tokens]
        if norm == "pre_layer":
            normed = layer_norm(prefix, (CHANNELS,), mixer.input_norm.weight, mixer.input_norm.bias, eps=1e-6)
            added = normed if init == "released" else torch.mul(normed, mixer.scale)
            torch.testing.assert_close(out[:, :num_prefix_tokens], prefix + added)
        else:
            assert torch.equal(out[:, :num_prefix_tokens], prefix)


def test_a_square_is_found_without_a_grid():
    mixer = MRLALight(8, layout="NLC", num_prefix_tokens=1, init="released").eval()
    x = torch.randn(2, 17, 8)
    assert torch.equal(mixer(x, x)[0], mixer(x, x, grid=(4, 4))[0])
    assert not torch.equal(mixer(x, x)[0], mixer(x, x, grid=(2, 8))[0])


@pytest.mark.parametrize("setting", SETTINGS)
def test_drop_path_leaves_out_whole_images_in_training_only(setting):
    *_, mixer = randomise(replace(setting, length=1).mixers(init="released", drop_path=0.5))
    x = setting.features(batch=64)
    for training, (few, many) in ((True, (10, 54)), (False, (0, 0))):
        out, _ = mixer.train(training)(x, x, grid=setting.grid)
        dropped = (out == x).flatten(1).all(1)
        assert few <= dropped.sum() <= many


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("init", ["identity", "released"])  # the scale of the first is a float32 parameter
def test_autocast_keeps_the_residual_stream_in_its_dtype(setting, init, dtype):
    mixers = setting.mixers(init=init)
    with torch.autocast("cpu", dtype=dtype):
        for given in (dtype, torch.float32):
            _, outs = run(mixers, setting.features(dtype=given), setting)
            assert all(out.dtype == given for out in outs)
            assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_bfloat16_agrees_with_float32(setting, autocast):
    mixers = [mixer.eval() for mixer in randomise(setting.mixers(init="released"))]
    low = copy.deepcopy(mixers) if autocast else [copy.deepcopy(mixer).to(torch.bfloat16) for mixer in mixers]
    memory = low_memory = None
    for mixer, low_mixer in zip(mixers, low, strict=True):
        x, shortcut = setting.features().to(torch.bfloat16), setting.features().to(torch.bfloat16)
        out, memory = mixer(x.float(), shortcut.float(), memory, grid=setting.grid)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            low_out, low_memory = low_mixer(x, shortcut, low_memory, grid=setting.grid)
        assert low_out.dtype == torch.bfloat16
        assert (low_out.float() - out).norm() < 0.015 * out.norm()  # four roundings to 8 bits


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("setting", [param for param in SETTINGS if param.values[0].layout == "NCHW"])
def test_channels_last_memory_agrees(setting, training):
    mixers = [mixer.double().train(training) for mixer in randomise(setting.mixers(init="released"))]
    x = setting.features(dtype=torch.float64)
    _, expected = run(copy.deepcopy(mixers), x, setting)
    _, outs = run(mixers, x.contiguous(memory_format=torch.channels_last), setting)
    torch.testing.assert_close(outs, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_copies_and_loaded_mixers_give_the_same(setting):
    mixers = [mixer.eval() for mixer in randomise(setting.mixers())]
    loaded = [mixer.eval() for mixer in setting.mixers()]
    for mixer, empty in zip(mixers, loaded, strict=True):
        empty.load_state_dict(mixer.state_dict())
    x = setting.features()
    blocks, expected = run(mixers, x, setting)
    assert not any(torch.equal(given, out) for given, out in zip(blocks, expected, strict=True))
    for others in (loaded, copy.deepcopy(mixers), pickle.loads(pickle.dumps(mixers))):
        _, outs = run(others, x, setting)
        assert all(torch.equal(out, same) for out, same in zip(outs, expected, strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_mixer_keeps_nothing_of_a_call(setting):
    mixers = [mixer.eval() for mixer in randomise(setting.mixers())]
    x = setting.features()
    _, expected = run(mixers, x, setting)
    run(mixers, setting.features(batch=1), setting)
    _, again = run(mixers, x, setting)
    assert all(torch.equal(out, same) for out, same in zip(again, expected, strict=True))


def test_light_is_the_equation():
    mixer = MRLALight(16, heads=4, init="released").double().eval()
    x, shortcut = torch.randn(2, 16, 5, 4, dtype=torch.float64), torch.randn(2, 16, 5, 4, dtype=torch.float64)
    update = light_update(x, shortcut, mixer.query_weight, mixer.key_weight, mixer.value_weight, mixer.decay, 4)
    expected = x + update / (1 + 1e-5) ** 0.5  # running mean 0, variance 1
    torch.testing.assert_close(mixer(x, shortcut)[0], expected)


@pytest.mark.parametrize(("mixer_class", "step"), [(MRLABase, base_update), (LayerAttention, exact_update)])
@pytest.mark.parametrize("options", [{}, {"weighting": "sigmoid", "last": 2, "value_act": "gelu"}], ids=str)
def test_base_and_exact_are_the_equation(mixer_class, step, options):
    memory = own_memory = None
    for x in random_chain(3, 8, 5, 4).xs:
        mixer = mixer_class(8, heads=4, init="released", out_act="relu", **options).double().eval()
        kernels = (mixer.query_weight, mixer.key_weight, mixer.value_weight)
        update, memory = step(x, memory, *kernels, 4, **options)
        out, own_memory = mixer(x, None, own_memory)
        torch.testing.assert_close(out, x + (update / (1 + 1e-5) ** 0.5).relu())
    torch.testing.assert_close(own_memory, memory)


def test_released_deit_is_the_equation():
    """x + MRLA(LN(x), LN(s)), with GELU on the value and no norm behind."""
    mixer = MRLALight(8, head_dim=4, norm="pre_layer", value_act="gelu", init="released").double()
    randomise([mixer])
    x, shortcut = torch.randn(2, 8, 5, 4, dtype=torch.float64), torch.randn(2, 8, 5, 4, dtype=torch.float64)

    def normed(maps, norm):
        tokens = maps.movedim(1, -1)
        return layer_norm(tokens, (8,), norm.weight, norm.bias, eps=1e-6).movedim(-1, 1)

    update = light_update(
        normed(x, mixer.input_norm),
        normed(shortcut, mixer.shortcut_norm),
        *(mixer.query_weight, mixer.key_weight, mixer.value_weight, mixer.decay),
        heads=2,
        value_act="gelu",
    )
    torch.testing.assert_close(mixer(x, shortcut)[0], x + update)


def test_released_exact_is_the_normed_update_alone():
    mixer = LayerAttention(8, residual=False, init="released").double().eval()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], depthwise_value(x, mixer.value_weight) / (1 + 1e-5) ** 0.5)


def test_default_head_widths_are_the_methods_own():
    assert [METHODS[name](64).heads for name in ("light", "base", "exact")] == [2, 4, 2]
    assert [METHODS[name](24).heads for name in ("light", "base", "exact")] == [1, 2, 1]


def test_base_alone_has_the_released_relu():
    assert [METHODS[name](8).out_act for name in METHODS] == [None, "relu", None, None]


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


@pytest.mark.parametrize("init", ["identity", "released", "notebook"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_parameters_can_be_drawn_anew(setting, init):
    """As a mixer that is made with that start draws them."""
    torch.manual_seed(5)
    fresh = setting.mixers(init=init)
    used = randomise(setting.mixers(init=init))
    torch.manual_seed(5)
    for mixer in used:
        mixer.reset_parameters(init)
    for mixer, again in zip(fresh, used, strict=True):
        torch.testing.assert_close(again.state_dict(), mixer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_vector_is_a_vector_so_that_timm_does_not_decay_it(method):
    for norm in ("batch", "pre_layer"):
        for name, parameter in METHODS[method](8, norm=norm, out_act="relu").named_parameters():
            assert parameter.shape == (8,) or name in ("query_weight", "key_weight", "value_weight")


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_made_where_and_as_asked(method):
    for norm in ("batch", "layer", "pre_layer"):
        mixer = METHODS[method](8, norm=norm, out_act="gelu", device="meta", dtype=torch.float64)
        assert {(p.device.type, p.dtype) for p in mixer.parameters()} == {("meta", torch.float64)}


def test_methods_by_name():
    assert METHODS == {"light": MRLALight, "base": MRLABase, "exact": LayerAttention, "dw": DepthwiseMixer}
    assert all(issubclass(method, LayerMixer) for method in METHODS.values())


@pytest.mark.unchecked
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "NCWH"}, "layout must be one of 'NCHW', 'NHWC', 'NLC': got 'NCWH'"),
        ({"norm": "group"}, "norm must be one of None, 'batch', 'layer', 'pre_layer': got 'group'"),
        ({"init": "zero"}, "init must be one of 'identity', 'released', 'notebook': got 'zero'"),
        ({"value_act": "silu"}, "value_act must be one of None, 'gelu', 'relu': got 'silu'"),
        ({"out_act": "silu"}, "out_act must be one of None, 'gelu', 'relu': got 'silu'"),
        ({"drop_path": 1.0}, r"drop_path must be a probability in \[0, 1\): got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be a probability in \[0, 1\): got -0.1"),
        ({"num_prefix_tokens": 1}, "num_prefix_tokens counts tokens .* got 1 with layout='NCHW'"),
        ({"num_prefix_tokens": 2, "layout": "NHWC"}, "num_prefix_tokens counts tokens .* got 2 with layout='NHWC'"),
        ({"num_prefix_tokens": -1, "layout": "NLC"}, "num_prefix_tokens counts tokens .* got -1 with layout='NLC'"),
    ],
)
def test_bad_options_are_refused_at_construction(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](16, **options)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *[
            (method, options, message)
            for method in ("light", "base", "exact")
            for options, message in (
                ({"head_dim": 10}, "head_dim must divide the channels: got head_dim=10, channels=16; try 8"),
                ({"heads": 3}, "heads must divide the channels: got heads=3, channels=16; try 2"),
                ({"heads": 2, "head_dim": 8}, "give head_dim or heads, not both"),
            )
        ],
        *[
            (method, options, message)
            for method in ("base", "exact")
            for options, message in (
                ({"last": 0}, "last must be at least 1 block.*got 0"),
                ({"weighting": "max"}, "weighting must be one of 'softmax', 'sigmoid': got 'max'"),
            )
        ],
        ("light", {"carry": "input"}, "carry must be one of 'shortcut', 'output': got 'input'"),
        ("exact", {"residual": False}, "residual=False gives the update alone, .* got init='identity'"),
        (
            "exact",
            {"residual": False, "init": "released", "layout": "NLC", "num_prefix_tokens": 1},
            "residual=False gives the update alone, .* num_prefix_tokens=1; use init='released' on maps",
        ),
    ],
)
def test_a_methods_own_bad_options_are_refused_at_construction(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](16, **options)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("light", {"norm": "pre_layer"}, id="light-pre_layer"),
        pytest.param("base", {}, id="base-relu"),
        pytest.param("exact", {"residual": False}, id="exact-no-residual"),
        pytest.param("dw", {"out_act": "gelu"}, id="dw-gelu"),
    ],
)
def test_a_mixer_that_cannot_start_as_the_identity_says_so(method, options):
    mixer = METHODS[method](8, init="released", **options)
    with pytest.raises(ValueError, match="make it with init='identity'"):
        mixer.reset_parameters("identity")


@pytest.mark.unchecked
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["layer", "pre_layer"])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("NCHW", (2, 6, 5, 4)),
        ("NCHW", (2, 8, 5)),
        ("NCHW", (2, 5, 4, 8)),
        ("NHWC", (2, 5, 4, 6)),
        ("NHWC", (2, 9, 8)),
        ("NHWC", (2, 8, 5, 4)),
        ("NLC", (2, 9, 6)),
        ("NLC", (2, 3, 3, 8)),
        ("NLC", (9, 8)),
    ],
)
def test_features_of_other_channels_or_axes_are_refused(method, norm, layout, shape):
    message = rf"x must be {layout} with c = 8, as the mixer was made for: got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        METHODS[method](8, layout=layout, norm=norm)(torch.randn(shape))


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["light", "base", "exact", "dw"])
def test_maps_without_a_pixel_are_refused(method):
    with pytest.raises(ValueError, match=r"x must be a batch of maps .* h, w at least 1: got shape \(2, 8, 0, 4\)"):
        METHODS[method](8)(torch.randn(2, 8, 0, 4))


@pytest.mark.unchecked
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tokens", "prefix", "grid", "message"),
    [
        (12, 0, None, "without a grid the patch tokens must form a square: got 12 tokens"),
        (16, 1, None, "must form a square: got 16 tokens of which 1 are prefix tokens, 15 patches"),
        (12, 0, (3, 5), r"the grid must hold every patch token: got grid=\(3, 5\) for 12 tokens"),
        (12, 2, (3, 4), r"the grid must hold every patch token: got grid=\(3, 4\) .* 10 patches"),
    ],
)
def test_a_grid_that_does_not_hold_the_tokens_is_refused(method, tokens, prefix, grid, message):
    x = torch.randn(2, tokens, 8)
    with pytest.raises(ValueError, match=message):
        METHODS[method](8, layout="NLC", num_prefix_tokens=prefix)(x, x, grid=grid)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "shape", "other"),
    [
        pytest.param({}, (2, 8, 4, 4), (2, 8, 4, 2), id="NCHW-size"),
        pytest.param({}, (2, 8, 4, 4), (2, 6, 4, 4), id="NCHW-channels"),
        pytest.param({}, (2, 8, 4, 4), (1, 8, 4, 4), id="NCHW-batch"),
        pytest.param({"norm": "pre_layer"}, (2, 8, 4, 4), (2, 8, 4, 2), id="NCHW-pre_layer-size"),
        pytest.param({"layout": "NHWC"}, (2, 4, 4, 8), (2, 4, 2, 8), id="NHWC-size"),
        pytest.param({"layout": "NHWC"}, (2, 4, 4, 8), (2, 4, 4, 6), id="NHWC-channels"),
        pytest.param({"layout": "NLC"}, (2, 16, 8), (2, 9, 8), id="NLC-size"),
        pytest.param({"layout": "NLC"}, (2, 16, 8), (2, 16, 6), id="NLC-channels"),
    ],
)
def test_a_shortcut_of_another_shape_is_refused(options, shape, other):
    with pytest.raises(ValueError, match="must have the shape of x"):
        MRLALight(8, **options)(torch.randn(shape), torch.randn(other))


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["base", "exact", "dw"])
def test_a_shortcut_of_another_shape_is_refused_where_it_is_not_used_either(method):
    with pytest.raises(ValueError, match="must have the shape of x"):
        METHODS[method](8)(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 2))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("layout", "shape", "other"),
    [("NCHW", (2, 8, 4, 4), (2, 6, 4, 4)), ("NHWC", (2, 4, 4, 8), (2, 4, 4, 6)), ("NLC", (2, 16, 8), (2, 16, 6))],
)
def test_a_shortcut_of_other_channels_is_refused_before_its_norm(layout, shape, other):
    with pytest.raises(ValueError, match="must have the shape of x"):
        MRLALight(8, layout=layout, norm="pre_layer")(torch.randn(shape), torch.randn(other))


def maps(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 8, 4, 4))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("mixer", "memory", "message"),
    [
        pytest.param(
            MRLABase(8, place=ChainPlace(1, 3)),
            LayerMemory((torch.randn(2, 1, 8),) * 2, (maps(),) * 2),
            "the memory is from another chain: it holds 2 blocks, and 1 stand before this one in its chain of 3",
            id="base-too-long",
        ),
        pytest.param(
            MRLABase(8, place=ChainPlace(0, 3)),
            LayerMemory((torch.randn(2, 1, 8),), (maps(),)),
            "it holds 1 blocks, and 0 stand before this one",
            id="base-head",
        ),
        pytest.param(
            LayerAttention(8, place=ChainPlace(1, 3)),
            OutputMemory((maps(),) * 2, (torch.randn(2, 8),) * 2),
            "it holds 2 blocks, and 1 stand before this one",
            id="exact-too-long",
        ),
        pytest.param(
            MRLABase(8),
            OutputMemory((maps(),), (torch.randn(2, 8),)),
            "memory must be what a MRLABase before this one returned, .* got OutputMemory",
            id="base-of-exact",
        ),
        pytest.param(
            LayerAttention(8),
            LayerMemory((torch.randn(2, 1, 8),), (maps(),)),
            "memory must be what a LayerAttention before this one returned, .* got LayerMemory",
            id="exact-of-base",
        ),
        pytest.param(MRLABase(8), maps(), "what a MRLABase before this one .* got Tensor", id="base-of-light"),
        pytest.param(
            MRLALight(8, carry="output"),
            LayerMemory(),
            "memory must be what a MRLALight before this one returned, .* got LayerMemory",
            id="light-of-base",
        ),
        pytest.param(
            MRLALight(8, carry="output"),
            maps(2, 8, 2, 2),
            r"carried must have the shape of x, \(2, 8, 4, 4\): got \(2, 8, 2, 2\)",
            id="light-size",
        ),
        pytest.param(
            MRLALight(8, carry="output"),
            maps(1, 8, 4, 4),
            r"carried must have the shape of x, \(2, 8, 4, 4\): got \(1, 8, 4, 4\)",
            id="light-batch",
        ),
        pytest.param(
            MRLABase(8),
            LayerMemory((torch.randn(2, 1, 8),), (maps(2, 8, 2, 2),)),
            r"every value of the memory must have the shape of x, \(2, 8, 4, 4\): got \(2, 8, 2, 2\)",
            id="base-size",
        ),
        pytest.param(
            MRLABase(8, heads=2),
            LayerMemory((torch.randn(2, 4, 2),), (maps(),)),
            r"every key of the memory must be \(b, heads, head_dim\) = \(2, 2, 4\): got \(2, 4, 2\)",
            id="base-heads",
        ),
        pytest.param(
            LayerAttention(8),
            OutputMemory((maps(2, 6, 4, 4),), (torch.randn(2, 6),)),
            r"every output of the memory must have the shape of x, \(2, 8, 4, 4\): got \(2, 6, 4, 4\)",
            id="exact-channels",
        ),
        pytest.param(
            MRLALight(8, carry="output", place=ChainPlace(0, 3)),
            maps(),
            "the memory is from another chain",
            id="light-head",
        ),
        pytest.param(
            LayerAttention(8),
            OutputMemory((maps(),), (torch.randn(1, 8),)),
            "of the memory must",
            id="exact-means",
        ),
    ],
)
def test_a_memory_of_another_chain_is_refused(mixer, memory, message):
    with pytest.raises(ValueError, match=message):
        mixer(maps(), None, memory)


@pytest.mark.parametrize("init", ["identity", "released"])
@pytest.mark.parametrize("method", [MRLALight, MRLABase])
def test_made_on_meta_and_reset_without_words_it_starts_as_it_was_made_to(method, init):
    """`reset_parameters()` is what FSDP and timm's `init_weights` call behind `to_empty`."""
    mixer = method(32, init=init, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    mixer.reset_parameters()
    torch.manual_seed(0)
    for found, made in zip(mixer.state_dict().values(), method(32, init=init).state_dict().values(), strict=True):
        assert torch.equal(found, made)
