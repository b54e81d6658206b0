"""What `mrla.fuse` folds, what it leaves, and that nobody can tell from the answers. Every norm has random numbers."""

import copy
import io
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import attach_coverage as coverage
import pytest
import timm
import torch
import torchvision
from conftest import sweep_but
from timm.layers import BatchNormAct2d, Conv2dSame, Linear, StdConv2d, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

import mrla
from mrla.deploy import foldable, fusing
from mrla.ops import LayerMixer, MRLALight

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)
EXAMPLE = (2, 3, 64, 64)


def _timm(architecture: str, **numbers) -> Callable[..., nn.Module]:
    return lambda: timm.create_model(architecture, num_classes=7, **numbers)


def _torchvision(architecture: str) -> Callable[..., nn.Module]:
    return lambda: torchvision.models.get_model(architecture, num_classes=7)


# How many norms a network has, and how many of them come straight behind a layer.
NETWORKS = {
    "timm resnet18": (_timm("resnet18", channels=(8, 16, 24, 32)), 21, 21),
    "timm resnet50": (_timm("resnet50", channels=(8, 16, 24, 32)), 53, 53),
    "timm test_resnet": (_timm("test_resnet"), 15, 15),
    "timm efficientnet": (_timm("test_efficientnet"), 13, 13),
    "timm tinynet": (_timm("tinynet_e"), 31, 31),
    "timm tf_mobilenetv3": (_timm("tf_mobilenetv3_small_minimal_100"), 34, 34),  # Conv2dSame
    "timm mobilenetv3": (_timm("mobilenetv3_small_050"), 34, 34),
    "timm regnet": (_timm("regnetx_002", w0=16, group_size=8, depth=8), 29, 29),
    "timm repvgg": (_timm("repvgg_a0"), 61, 44),  # 17 blocks add a norm alone to the convolutions
    "timm densenet": (_timm("densenet121", growth_rate=8), 121, 59),  # half of the norms stand in front
    "timm efficientvit_msra": (_timm("efficientvit_m0"), 113, 112),  # one in front of the classifier
    "timm convnext": (_timm("test_convnext"), 0, 0),
    "timm vit": (_timm("test_vit", img_size=64), 0, 0),
    "torchvision resnet18": (_torchvision("resnet18"), 20, 20),
    "torchvision mobilenet_v2": (_torchvision("mobilenet_v2"), 52, 52),
    "torchvision regnet": (_torchvision("regnet_x_400mf"), 71, 71),
}
USUAL = ("timm resnet18", "timm tf_mobilenetv3", "timm repvgg", "timm densenet", "timm vit", "torchvision mobilenet_v2")
WITH_MIXERS = ("timm resnet50", "timm tinynet", "timm regnet", "timm vit", "torchvision resnet18")


def network(name: str) -> nn.Module:
    made = NETWORKS[name][0]()
    coverage.randomise(made)
    return made.eval()


def small() -> nn.Module:
    return network("timm resnet18")


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


@torch.no_grad()
def assert_same(fused: nn.Module, model: nn.Module, shape=EXAMPLE, tolerance=1e-5) -> None:
    image = torch.randn(shape).to(next(iter(model.state_dict().values())))
    expected = model(image)
    assert (fused(image) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", sweep_but(USUAL, NETWORKS))
def test_every_norm_behind_a_layer_is_folded_and_the_network_says_the_same(name):
    model, count, folded = network(name), *NETWORKS[name][1:]
    assert len(norms(model)) == count
    fused = mrla.fuse(model, EXAMPLE)
    assert len(norms(fused)) == count - folded
    assert_same(fused, model)
    old, new = set(model.state_dict()), set(fused.state_dict())
    assert all(key.endswith(".bias") for key in new - old)
    gone = {key.rpartition(".")[0] for key in old - new}
    assert gone == set(norms(model)) - set(norms(fused))


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("name", sweep_but(("timm tinynet", "timm vit"), WITH_MIXERS))
def test_mixers_stay_as_they_are(name, method):
    model = mrla.attach(NETWORKS[name][0](), method, example=EXAMPLE)
    coverage.randomise(model)
    fused = mrla.fuse(model.eval(), EXAMPLE)
    in_mixers = {key for key in model.state_dict() if ".mrla." in key}
    assert in_mixers
    assert all(torch.equal(fused.state_dict()[key], model.state_dict()[key]) for key in in_mixers)
    assert set(norms(fused)) == {norm for norm in norms(model) if ".mrla." in norm}
    assert_same(fused, model)
    assert_same(mrla.detach(copy.deepcopy(fused)), mrla.detach(copy.deepcopy(model)))


class OneLayerMixer(LayerMixer):
    """With a layer and a norm that could be folded."""

    place = None

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x, shortcut=None, memory=None, *, grid=None):
        return x + self.branch(x), None

    def reset_parameters(self, init):
        pass


def test_a_pair_inside_a_mixer_stays():
    mixer = OneLayerMixer()
    assert foldable(mixer.branch, EXAMPLE)
    assert foldable(mixer, EXAMPLE) == []


@pytest.mark.parametrize(("name", "count"), [("resnet18", 20), ("resnet50", 53)])
def test_foldable_names_layers_and_norms_in_order(name, count):
    pairs = foldable(timm.create_model(name))
    assert len(pairs) == count
    assert pairs[:2] == [("conv1", "bn1"), ("layer1.0.conv1", "layer1.0.bn1")]


def test_the_network_stays_as_it_was():
    model = mrla.attach(small()).train()
    model.layer1.eval()  # a part that is frozen
    model.bn1.weight.requires_grad_(False)
    seen = []
    model.layer2.register_forward_hook(lambda *_: seen.append(0))
    state, anatomy = copy.deepcopy(model.state_dict()), coverage.anatomy(model)
    modules, modes = list(model.modules()), [module.training for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in modules]
    wanted, random_state = [one.requires_grad for one in model.parameters()], torch.get_rng_state()
    fused = mrla.fuse(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert coverage.anatomy(model) == anatomy
    assert list(model.modules()) == modules
    assert [module.training for module in model.modules()] == modes
    assert [dict(module._forward_hooks) for module in modules] == hooks
    assert [one.requires_grad for one in model.parameters()] == wanted
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    theirs = {tensor.data_ptr() for tensor in (*fused.parameters(), *fused.buffers())}
    assert not theirs & {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def test_the_copy_is_in_eval_mode_and_wants_no_gradient():
    fused = mrla.fuse(timm.create_model("test_efficientnet").train())
    assert not any(module.training for module in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())


# Layers with norms.


def pair(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layer=layer, norm=norm))


def behind(layer: nn.Module, norm: nn.Module | None = None) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(pair(layer, norm or nn.BatchNorm2d(8)))


CONV = nn.Conv2d(3, 8, 3)
FOLDED = {
    "conv1d": (behind(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 9)),
    "conv2d": (behind(CONV), EXAMPLE),
    "conv2d without bias": (behind(nn.Conv2d(3, 8, 3, bias=False)), EXAMPLE),
    "conv2d with groups": (behind(nn.Conv2d(6, 8, 3, groups=2)), (2, 6, 9, 7)),
    "conv2d of reflected borders": (behind(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")), EXAMPLE),
    "conv2d same": (behind(Conv2dSame(3, 8, 3, stride=2)), (2, 3, 9, 7)),
    "conv3d": (behind(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8)), (2, 3, 4, 5, 6)),
    "transposed 1d": (behind(nn.ConvTranspose1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 9)),
    "transposed 2d with groups": (behind(nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2)), (2, 6, 9, 7)),
    "linear": (behind(nn.Linear(5, 8), nn.BatchNorm1d(8)), (4, 5)),
    "timm's linear": (behind(Linear(5, 8, bias=False), nn.BatchNorm1d(8)), (4, 5)),
    "norm without weights": (behind(CONV, nn.BatchNorm2d(8, affine=False)), EXAMPLE),
    "norm with another epsilon": (behind(CONV, nn.BatchNorm2d(8, eps=0.5)), EXAMPLE),
    "norm and activation": (behind(CONV, BatchNormAct2d(8)), EXAMPLE),
    "sync": (behind(CONV, nn.SyncBatchNorm(8)), EXAMPLE),
    "sync and activation": (behind(CONV, convert_sync_batchnorm(BatchNormAct2d(8))), EXAMPLE),
    "frozen": (behind(CONV, FrozenBatchNorm2d(8)), EXAMPLE),
    "frozen and activation": (behind(CONV, freeze_batch_norm_2d(BatchNormAct2d(8))), EXAMPLE),
}


def randomized(model: nn.Module) -> nn.Module:
    """Random numbers in the norms, frozen ones too, whose weights are buffers."""
    coverage.randomise(model)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_mean") and isinstance(module.weight, Tensor):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model.eval()


@pytest.mark.parametrize("kind", FOLDED)
def test_kinds_that_are_folded(kind):
    make, shape = FOLDED[kind]
    model = randomized(make())
    assert foldable(model, shape) == [("layer", "norm")]
    fused = mrla.fuse(model, shape)
    assert not hasattr(fused.norm, "running_mean")
    assert_same(fused, model, shape)


def test_the_activation_keeps_its_key_and_what_does_nothing_is_an_identity():
    model = randomized(pair(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer="prelu")))
    fused = mrla.fuse(model, EXAMPLE)
    assert set(fused.state_dict()) == {"layer.weight", "layer.bias", "norm.act.weight"}
    plain = mrla.fuse(pair(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, apply_act=False)), EXAMPLE)
    assert type(plain.norm) is nn.Identity


# Layers with norms that must not be folded: `layer` and `norm` would be a pair but for one thing.


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Tensor] = lambda net, x: net.norm(net.layer(x)), **parts: nn.Module):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        for name, part in parts.items():
            self.add_module(name, part)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def read_twice(net, x):
    between = net.layer(x)
    return net.norm(between) + between


def read_by_name(net, x):
    between = net.layer(x)
    return torch.add(input=between, other=net.norm(between))


def through_a_view(net, x):
    return net.norm(net.layer(x)[:])


def given_out(net, x):
    between = net.layer(x)
    return {"out": net.norm(between), "features": [between]}


def written_into(net, x):
    between = net.layer(x)
    between[:, :, 0] = 0
    return net.norm(between)


def written_into_after(net, x):
    between = net.layer(x)
    out = net.norm(between)
    return out, between.relu_()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def read_by_a_function(net, x):
    between = net.layer(x)
    return net.norm(between) + Doubled.apply(between)


def layer_twice(net, x):
    return net.norm(net.layer(net.layer(x)))


def norm_twice(net, x):
    return net.norm(net.norm(net.layer(x)))


def weight_used_elsewhere(net, x):
    return net.norm(net.layer(x)) + conv2d(x, net.layer.weight, padding=1)


def norm_weight_used_elsewhere(net, x):
    return net.norm(net.layer(x)) * net.norm.weight[:, None, None]


def tied() -> nn.Module:
    net = Net()
    net.other = nn.Conv2d(3, 3, 3, padding=1)
    net.other.weight = net.layer.weight
    return net


def registered_twice(name: str) -> nn.Module:
    net = Net()
    net.again = nn.ModuleDict({"it": net.get_submodule(name)})
    return net


def hooked(name: str, before: bool = False) -> nn.Module:
    net = nn.Sequential(OrderedDict(layer=nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 1))), norm=nn.BatchNorm2d(3)))
    module = net.get_submodule(name)
    if before:
        module.register_forward_pre_hook(lambda module, args: (args[0].clone() + 1,))
    else:
        module.register_forward_hook(lambda module, args, output: output + 1)
    return net


class Plus(nn.Module):
    def forward(self, x):
        return x + 1


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


def parametrised() -> nn.Module:
    net = Net()
    parametrize.register_parametrization(net.layer, "weight", Plus())
    return net


def norm_in_front() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))


LEFT = {
    "output read twice": lambda: Net(read_twice),
    "output read by name": lambda: Net(read_by_name),
    "output read by a function with its own gradient": lambda: Net(read_by_a_function),
    "read through a view": lambda: Net(through_a_view),
    "given to the caller": lambda: Net(given_out),
    "written into": lambda: Net(written_into),
    "written into after": lambda: Net(written_into_after),
    "layer called twice": lambda: Net(layer_twice),
    "norm called twice": lambda: Net(norm_twice),
    "layer registered twice": lambda: registered_twice("layer"),
    "norm registered twice": lambda: registered_twice("norm"),
    "weight tied": tied,
    "layer's weight used elsewhere": lambda: Net(weight_used_elsewhere),
    "norm's weight used elsewhere": lambda: Net(norm_weight_used_elsewhere),
    "hook on the layer": lambda: hooked("layer.conv"),
    "hook on the layer's container": lambda: hooked("layer"),
    "hook on the norm": lambda: hooked("norm"),
    "hook in front of the norm": lambda: hooked("norm", before=True),
    "weight standardised": lambda: Net(layer=StdConv2d(3, 3, 3, padding=1)),
    "a convolution of one's own": lambda: Net(layer=ScaledConv(3, 3, 1)),
    "weight parametrised": parametrised,
    "weight norm": lambda: Net(layer=weight_norm(nn.Conv2d(3, 3, 1))),
    "no running statistics": lambda: Net(norm=nn.BatchNorm2d(3, track_running_stats=False)),
    "another norm": lambda: Net(norm=nn.GroupNorm(1, 3)),
    "something between": lambda: Net(lambda net, x: net.norm(net.layer(x).relu())),
    "norm in front": norm_in_front,
    "a mixer's own": lambda: Net(
        lambda net, x: net.mixer(net.layer(x))[0], norm=nn.Identity(), mixer=MRLALight(3, heads=1, has_shortcut=False)
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_alone(case):
    torch.manual_seed(1)
    model = randomized(LEFT[case]())
    assert foldable(model, (2, 3, 8, 6)) == []
    fused = mrla.fuse(model, (2, 3, 8, 6))
    image = torch.randn(2, 3, 8, 6)
    expected, found = fusing.tensors_in(model(image)), fusing.tensors_in(fused(image))
    assert all(map(torch.equal, found, expected))
    assert list(fused.state_dict()) == list(model.state_dict())


def test_the_network_that_the_others_differ_from_is_folded():
    assert foldable(Net(), (2, 3, 8, 6)) == [("layer", "norm")]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (2, 4, 5)),  # the norm's channels are not the layer's
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(6)), (3, 6)),  # an image alone, taken for a batch
    ],
)
def test_a_norm_over_another_axis_is_left(model, shape):
    assert foldable(randomized(model), shape) == []


# Precision, layout, and what is done with the copy.


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)], ids=str
)
def test_dtypes_are_kept(dtype, tolerance):
    model = small().to(dtype)
    fused = mrla.fuse(model, EXAMPLE)
    assert norms(fused) == []
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}
    assert_same(fused, model, tolerance=tolerance)


def test_folding_is_done_in_float64():
    torch.manual_seed(2)
    model = randomized(pair(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    exact, fused = mrla.fuse(copy.deepcopy(model).double(), EXAMPLE), mrla.fuse(model, EXAMPLE)
    assert all(torch.equal(value.float(), fused.state_dict()[key]) for key, value in exact.state_dict().items())


def test_the_layout_in_memory_is_kept():
    fused = mrla.fuse(small().to(memory_format=torch.channels_last), EXAMPLE)
    assert fused.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_copy_is_copied_and_written(tmp_path):
    model = mrla.attach(small())
    fused = mrla.fuse(model, EXAMPLE)
    written = io.BytesIO()
    torch.save(fused.state_dict(), written)
    written.seek(0)
    other = mrla.fuse(mrla.attach(NETWORKS["timm resnet18"][0]()), EXAMPLE)
    other.load_state_dict(torch.load(written))
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), other, mrla.fuse(fused, EXAMPLE)):
        assert_same(again, model)
    with pytest.raises(ValueError, match="does not rebuild"):
        mrla.save(fused, tmp_path)


def test_made_in_inference_mode_it_takes_part_in_a_graph():
    with torch.inference_mode():
        fused = mrla.fuse(small(), EXAMPLE)
    image = torch.randn(EXAMPLE, requires_grad=True)
    fused(image).sum().backward()
    assert image.grad is not None
    assert not any(tensor.is_inference() for tensor in (*fused.parameters(), *fused.buffers()))


@pytest.mark.parametrize("with_mixers", [False, True])
def test_the_copy_is_exported(with_mixers):
    model = mrla.attach(small()) if with_mixers else small()
    coverage.randomise(model)
    fused = mrla.fuse(model.eval(), EXAMPLE)
    exported = torch.export.export(fused, (torch.randn(EXAMPLE),))
    assert_same(exported.module(), model)
    left = [str(node.target) for node in exported.graph.nodes if "batch_norm" in str(node.target)]
    assert len(left) == len(norms(fused))


# The check.

Pair = namedtuple("Pair", ("first", "second"))


@dataclass
class Said:
    logits: Tensor
    name: str = "said"


STRUCTURES = {
    "tensor": lambda out: out,
    "tuple": lambda out: (out[:1], out),
    "list": lambda out: [out[:1], None, out],
    "dict": lambda out: {"empty": out[:0], "logits": [out]},
    "named tuple": lambda out: Pair(out[:1], out),
    "dataclass": Said,
    "infinite in part": lambda out: out.masked_fill(torch.arange(8) == 0, -torch.inf),
    "whole numbers": lambda out: (1000 * out).long(),
    "complex": lambda out: torch.complex(out, out),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_wrong_fold_is_seen_whatever_the_output(structure, monkeypatch):
    model = randomized(Net(lambda net, x: STRUCTURES[structure](net.norm(net.layer(x)))))
    assert norms(mrla.fuse(model, (2, 3, 8, 8))) == []
    fold = fusing._fold

    def slightly_wrong(layer, norm):
        fold(layer, norm)
        layer.bias += 0.01

    monkeypatch.setattr(fusing, "_fold", slightly_wrong)
    with pytest.raises(ValueError, match=r"must not change what a network says: with 1 .*higher precision"):
        mrla.fuse(model, (2, 3, 8, 8))


def test_a_number_that_is_none_is_seen(monkeypatch):
    def wrong_in_part(layer, norm):
        layer.bias[0] = torch.nan

    monkeypatch.setattr(fusing, "_fold", wrong_in_part)
    with pytest.raises(ValueError, match=r"differs by inf of its largest output, and 1e-04 is allowed"):
        mrla.fuse(randomized(Net()), EXAMPLE)


def test_a_network_that_draws_random_numbers_is_fused():
    model = randomized(Net(lambda net, x: net.norm(net.layer(x)) + torch.rand_like(x)))
    before = torch.get_rng_state()
    assert norms(mrla.fuse(model, EXAMPLE)) == []
    assert torch.equal(torch.get_rng_state(), before)


def nothing_finite(net, x):
    return net.norm(net.layer(x)) * torch.nan


def reads_the_norm(net, x):
    return net.norm(net.layer(x)) * net.norm.eps


class Uncopied(Net):
    def __deepcopy__(self, memo):
        if any(isinstance(one, torch.nn.Parameter) and id(one) in memo for one in self.parameters()):
            return Net()  # the dry run's, which shares the weights
        raise RuntimeError("no copies")


@pytest.mark.parametrize(
    ("make", "example", "message"),
    [
        (small, (2, 4, 64, 64), r"ResNet does not run on \(2, 4, 64, 64\).*pass example=\(batch, ...\)"),
        (lambda: nn.Sequential(nn.Linear(5, 3)), None, r"does not run on .*pass example=\(batch, ...\)"),
        (lambda: nn.DataParallel(small()), None, "fuse before wrapping: DataParallel .* fuse first, then wrap"),
        (lambda: small().to("meta"), None, "meta device have no numbers to fold"),
        (lambda: Net(nothing_finite), EXAMPLE, "gives nothing finite; fuse it in float32"),
        (lambda: Net(lambda net, x: net.norm(net.layer(x)).shape), EXAMPLE, "gives no tensor"),
        (lambda: Net(reads_the_norm), EXAMPLE, r"must run on random images.*no attribute 'eps'.*mrla.deploy.foldable"),
        (Uncopied, EXAMPLE, r"Uncopied cannot be copied \(RuntimeError: no copies\).*make copy.deepcopy\(model\) work"),
    ],
    ids=["wrong shape", "no size", "wrapped", "meta", "nan", "no tensor", "reads the norm", "no copies"],
)
def test_bad_calls_say_what_to_do(make, example, message):
    with pytest.raises(ValueError, match=message):
        mrla.fuse(make(), example)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.compile, lambda model: torch.jit.trace(model, torch.randn(EXAMPLE))])
def test_compiled_and_scripted_networks_are_refused(wrap):
    with pytest.raises(ValueError, match="fuse first, then wrap"):
        mrla.fuse(wrap(small()), EXAMPLE)


@pytest.mark.parametrize(("model", "example"), [("resnet18", None), (Net(), torch.zeros(EXAMPLE))])
def test_wrong_kinds_of_arguments_are_type_errors(model, example):
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module: got str|pass example=\(2, 3, 64, 64\)"):
        mrla.fuse(model, example)
