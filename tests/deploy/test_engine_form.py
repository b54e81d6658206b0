"""`engine_form` must say what the network says, and give ONNX Runtime a graph that it keeps in its own layout."""

import copy
from collections import Counter
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import randomise_norms
from torch import nn

import mrla
from mrla.deploy.engine_form import EngineLight, engine_form
from mrla.ops import ChainPlace, MRLABase, MRLALight, use

CHANNELS = (16, 16, 32, 32)


def randomised(model: nn.Module) -> nn.Module:
    """With norms and lambdas that hide nothing."""
    randomise_norms(model)
    for module in model.modules():
        if isinstance(module, MRLALight) and module.decay is not None:
            nn.init.normal_(module.decay)
    return model.eval()


def network(method: str = "light", **options) -> nn.Module:
    plain = timm.create_model("resnet18", channels=CHANNELS, num_classes=7)
    return randomised(mrla.attach(plain, method, **options))


def mixers(model: nn.Module) -> list[Any]:
    return [module.mrla for module in model.modules() if "mrla" in module._modules]


@torch.no_grad()
def assert_same(found: nn.Module, model: nn.Module, shape=(2, 3, 40, 56), tolerance=1e-5) -> None:
    image = torch.randn(shape).to(next(model.parameters()))
    expected = model(image)
    assert (found(image) - expected).abs().max() <= tolerance * expected.abs().max()


# One mixer, in float64: what is folded must be right to the last digits.

FORMS = {
    "default": (64, {}),
    "one head": (16, {"heads": 1}),
    "heads of one channel": (8, {"head_dim": 1}),
    "heads that are no whole block": (48, {"heads": 12}),
    "more heads than a block": (68, {"heads": 17}),
    "channels that are no whole block": (6, {"heads": 3}),
    "no shortcut": (16, {"has_shortcut": False}),
    "DropPath": (16, {"drop_path": 0.5}),
    "not the first": (16, {"place": ChainPlace(1, 3)}),
}


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (5, 12), (4, 3), (16, 9)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_mixer_says_the_same(form, size):
    channels, options = FORMS[form]
    mixer = randomised(MRLALight(channels, init="released", **options)).double()
    x, shortcut = torch.randn(2, 2, channels, *size, dtype=torch.float64)
    with torch.no_grad(), use("reference"):
        expected, _ = mixer(x, shortcut)
        found, ground = EngineLight(mixer)(x, shortcut)
        again, _ = EngineLight(mixer)(x, shortcut, ground)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(again, found)


def test_without_a_shortcut_at_hand_there_is_no_lambda_term():
    mixer = randomised(MRLALight(16, init="released"))
    x = torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(EngineLight(mixer)(x)[0], mixer(x)[0])


def test_folding_is_done_in_float64():
    mixer = randomised(MRLALight(16, init="released"))
    nn.init.constant_(mixer.norm.running_mean, 1.0)
    with torch.no_grad():
        found, exact = EngineLight(mixer), EngineLight(copy.deepcopy(mixer).double())
    for name in ("value", "bias", "decay", "query_key"):
        assert torch.equal(getattr(found, name), getattr(exact, name).float())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_lower_precisions_are_kept(dtype, tolerance):
    mixer = randomised(MRLALight(32, heads=2, init="released"))
    x, shortcut = torch.randn(2, 2, 32, 9, 9)
    with torch.no_grad():
        expected, _ = mixer(x, shortcut)
        found, _ = EngineLight(mixer.to(dtype))(x.to(dtype), shortcut.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_products_of_queries_and_keys_do_not_overflow_in_float16():
    mixer = randomised(MRLALight(32, heads=2, init="released")).half()
    x = (2000 * torch.randn(2, 32, 1, 1) + torch.randn(2, 32, 5, 5)).half()
    with torch.no_grad():
        assert EngineLight(mixer)(x)[0].isfinite().all()


# Networks.

NETWORKS = {
    "resnet18": lambda: network(),
    "heads": lambda: network(heads=2),
    "short chains": lambda: network(chain_length=1),
    "a block without": lambda: network(without=["layer1.0", "layer3.1"]),
    "DropPath": lambda: network(drop_path=0.3),
    "regnet": lambda: randomised(mrla.attach(timm.create_model("regnetx_002", w0=16, group_size=8, depth=8))),
    "convnext": lambda: randomised(mrla.attach(timm.create_model("test_convnext", num_classes=7))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_says_the_same(name):
    model = NETWORKS[name]()
    form = engine_form(model)
    assert mixers(form)
    assert all(isinstance(mixer, EngineLight) for mixer in mixers(form))
    assert_same(form, model)
    assert_same(engine_form(model.double()), model, tolerance=1e-9)


def test_block_by_block_it_says_the_same():
    model = network()
    form: Any = engine_form(model)
    x = torch.randn(2, 64, 9, 9)
    with torch.no_grad():
        expected = model.layer1(x)
        for step in form.layer1:
            x = step(x)
    torch.testing.assert_close(x, expected)


def test_the_ground_is_made_once_a_chain():
    form = engine_form(network())
    made = Counter()
    for mixer in mixers(form):
        at = mixer.place.index

        def counted(x, at=at, make=mixer._ground):
            made[at] += 1
            return make(x)

        mixer._ground = counted
    with torch.no_grad():
        form(torch.randn(1, 3, 64, 64))
    assert made == {0: 4}


def test_the_start_is_the_identity():
    plain = randomise_norms(timm.create_model("resnet18", channels=CHANNELS, num_classes=7)).eval()
    assert_same(engine_form(mrla.attach(copy.deepcopy(plain))), plain, tolerance=1e-6)


def test_the_network_stays_as_it_was():
    model = network().train()
    before, kinds = copy.deepcopy(model.state_dict()), [type(mixer) for mixer in mixers(model)]
    form = engine_form(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [type(mixer) for mixer in mixers(model)] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in form.modules())
    assert not any(parameter.requires_grad for parameter in form.parameters())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in form.state_dict().values() if tensor.numel()}


# What is not known stays.


class Louder(MRLALight):
    def update(self, x, shortcut, memory):
        update, memory = super().update(x, shortcut, memory)
        return 2 * update, memory


def hooked() -> nn.Module:
    model = network()
    for mixer in mixers(model):
        mixer.register_forward_hook(lambda module, given, out: None)
    return model


def louder() -> nn.Module:
    model = network()
    for mixer in mixers(model):
        mixer.__class__ = Louder
    return model


def without_statistics() -> nn.Module:
    model = network()
    for mixer in mixers(model):
        mixer.norm = nn.BatchNorm2d(mixer.channels, track_running_stats=False).eval()
    return model


UNKNOWN = {
    "base": lambda: network("base"),
    "exact": lambda: network("exact"),
    "depthwise": lambda: network("dw"),
    "the paper's carry": lambda: network(carry="output"),
    "an activation on values": lambda: network(value_act="gelu"),
    "an activation behind the norm": lambda: network(out_act="relu"),
    "LayerNorm": lambda: network(norm="layer"),
    "LayerNorm in front": lambda: network(norm="pre_layer"),
    "tokens": lambda: mrla.attach(timm.create_model("test_vit", img_size=64, num_classes=7)).eval(),
    "a hook": hooked,
    "a class made of light": louder,
    "a norm without statistics": without_statistics,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_mixers_that_it_does_not_know_stay(name):
    model = UNKNOWN[name]()
    form = engine_form(model)
    assert mixers(form)
    assert [type(mixer) for mixer in mixers(form)] == [type(mixer) for mixer in mixers(model)]
    assert_same(form, model, (2, 3, 64, 64), 1e-6)


def test_a_plain_network_is_copied():
    model = randomise_norms(timm.create_model("resnet18", channels=CHANNELS, num_classes=7))
    form = engine_form(model)
    assert form is not model
    assert not form.training
    assert_same(form, model.eval(), tolerance=0)


def test_among_mixers_of_another_kind_nothing_is_handed_on():
    model = network(blocks=["layer3"])
    length = len(model.layer3)
    assert length == 2
    last = model.layer3[1]
    last.mrla = MRLABase(32, place=ChainPlace(0, 1), init="released")  # light has left it no memory
    randomised(model)
    form = engine_form(model)
    assert [type(mixer) for mixer in mixers(form)] == [EngineLight, MRLABase]
    assert_same(form, model)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"engine_form needs a torch.nn.Module: got str"):
        engine_form("resnet18")  # type: ignore[arg-type]


def test_a_norm_without_statistics_is_refused():
    mixer = MRLALight(16, init="released")
    mixer.norm = nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(ValueError, match=r"mixer must have a BatchNorm on NCHW maps that keeps statistics"):
        EngineLight(mixer)


def test_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match=r"has no parameters to draw: reset the network's"):
        EngineLight(MRLALight(16)).reset_parameters("identity")


# ONNX Runtime.


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network, its engine form in a file of dynamic batch and sizes, and what ONNX Runtime makes of that."""
    torch.manual_seed(0)
    model = network(heads=2)
    file, optimised = (tmp_path_factory.mktemp("engine") / name for name in ("net.onnx", "optimised.onnx"))
    write(engine_form(model), file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return model, session, onnx.load(optimised)


def write(model: nn.Module, file) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
        )
        torch.onnx.export(program, dynamo=True, verbose=False).save(file)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 64, 64), (3, 3, 47, 90), (5, 3, 224, 33)], ids=str)
def test_the_engine_says_the_same_for_every_batch_and_size(exported, shape):
    model, session, _ = exported
    image = torch.randn(shape)
    with torch.no_grad():
        expected = model(image)
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_engine_keeps_every_map_in_its_own_layout(exported):
    model, _, optimised = exported
    nodes = optimised.graph.node
    count = Counter(node.op_type for node in nodes)
    # A map that left the layout would be added, multiplied, normed or rectified outside of it.
    assert count["Relu"] == count["BatchNormalization"] == 0
    mixing, chains = len(mixers(model)), 4
    assert (mixing, count["Mul"]) == (8, 2 * mixing)  # one of maps, one of pooled numbers
    assert count["Add"] == mixing + chains  # gates in their places; and ones
    # Out go the means of windows, one channel of zeros and their number a chain, and what the head pools.
    assert count["ReorderOutput"] <= mixing + 2 * chains + 1
    assert count["ReorderInput"] <= mixing + chains
