"""A backend of another's: registered in a test, it serves attached networks with no file of `mrla` changed."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

import mrla
from mrla.ops import (
    Backend,
    LayerMemory,
    base_update,
    chosen_path,
    light_update,
    register_backend,
    torch_internals,
    use,
)
from mrla.ops.backend import BACKENDS
from mrla.ops.calls import BaseState, LightState, LightWeights
from mrla.ops.kernels.residual_epilogue import begin_by_torch


class Stub(Backend):
    """Torch's operators, with gradients by autograd: slow and short."""

    name = "stub"

    def __init__(self):
        self.done: list[str] = []

    def unavailable(self):
        """It runs everywhere."""
        return None

    def supports(self, call):
        """All that is float32."""
        return call.x.dtype is torch.float32

    def begin(self, epilogue):
        """The norm by torch."""
        return begin_by_torch(epilogue)

    def light_forward(
        self,
        x,
        shortcut,
        weights,
        statistics,
        drop_scale,
        heads,
        eps,
        *,
        branch_norm=None,
        in_place=False,
        keep_state=True,
    ):
        """As `Backend` says."""
        self.done.append("light_forward")
        whole = x if branch_norm is None else torch.relu(x + shortcut)
        update = light_update(whole, shortcut, *weights[:4], heads)
        mean, variance = statistics or moments(update)
        b, c = x.shape[:2]
        means, gates, of_planes = (x.new_zeros(shape) for shape in ((b, c), (b, heads), (b, c, 5)))
        out = whole + normed(update, weights, mean, variance, eps, drop_scale)
        return out, LightState(means, gates, of_planes, mean, variance)

    def light_backward(
        self, gradient, x, shortcut, weights, state, drop_scale, eps, *, batch_statistics, branch_norm=None
    ):
        """As `Backend` says."""
        self.done.append("light_backward")

        def run(x, shortcut, tail_weight, tail_bias, *given):
            own = LightWeights(*given)
            whole = x
            if branch_norm is not None:
                statistics = (None, None) if branch_norm.training else (branch_norm.mean, branch_norm.spread)
                x = batch_norm(
                    x, *statistics, tail_weight, tail_bias, training=branch_norm.training, eps=branch_norm.eps
                )
                whole = torch.relu(x + shortcut)
            update = light_update(whole, shortcut, *own[:4], state.gates.shape[1])
            mean, variance = moments(update) if batch_statistics else (state.mean, state.variance)
            return whole + normed(update, own, mean, variance, eps, drop_scale)

        of_tail = (None, None) if branch_norm is None else (branch_norm.weight, branch_norm.bias)
        of_x, of_shortcut, of_weight, of_bias, *rest = gradients(run, gradient, x, shortcut, *of_tail, *weights)
        return of_x, of_shortcut, LightWeights(*rest), None if branch_norm is None else (of_weight, of_bias)

    def base_forward(
        self,
        x,
        shortcut,
        keys,
        values,
        weights,
        statistics,
        drop_scale,
        form,
        *,
        branch_norm=None,
        in_place=False,
        keep_value=True,
    ):
        """As `Backend` says."""
        self.done.append("base_forward")
        whole = x if branch_norm is None else torch.relu(x + shortcut)
        memory = LayerMemory(tuple(keys), tuple(values)) if keys else None
        weighting = "softmax" if form.softmax else "sigmoid"
        update, after = base_update(whole, memory, *weights[:3], form.heads, weighting)
        mean, variance = statistics or moments(update)
        branch = normed(update, weights, mean, variance, form.eps, drop_scale)
        branch = torch.relu(branch) if form.rectify else branch
        branch = branch if weights.scale is None else branch * weights.scale[:, None, None]
        nothing = x.new_zeros(x.shape[:2])
        key, attn = after.keys[-1].flatten(1), x.new_zeros(len(x), form.heads, len(values) + 1)
        return whole + branch, BaseState(after.values[-1], key, nothing, attn, nothing, mean, variance)

    def base_backward(self, *_: Any, **__: Any) -> Any:
        """Not tried here."""
        raise NotImplementedError


def moments(update: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(update, (0, 2, 3), correction=0)
    return mean, variance


def normed(update, weights, mean, variance, eps, drop_scale) -> Tensor:
    out = (update - mean[:, None, None]) / (variance + eps).sqrt()[:, None, None]
    out = out * weights.norm_weight[:, None, None] + weights.norm_bias[:, None, None]
    return out if drop_scale is None else out * drop_scale[:, None, None, None]


def gradients(run, gradient, *inputs):
    """Those of all inputs that are there."""
    with torch.enable_grad():
        given = [None if one is None else one.detach().requires_grad_() for one in inputs]
        wanted = [one for one in given if one is not None]
        found = iter(torch.autograd.grad(run(*given), wanted, gradient))
    return [None if one is None else next(found) for one in given]


@pytest.fixture
def stub():
    """A registered stub, gone afterwards."""
    made = register_backend(Stub())
    yield made
    del BACKENDS["stub"]


def attached(method: str) -> nn.Module:
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3)
    model = mrla.attach(model, method, init="released")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1) if name.endswith("weight") else parameter.normal_(std=0.1)
    return model


def passed(model: nn.Module, x: Tensor, path: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output and gradients of a step."""
    model = copy.deepcopy(model)
    with use(path):
        out = model(x)
        out.square().sum().backward()
    found = {name: one.grad for name, one in model.named_parameters()}
    return out.detach(), {**found, **{name: one.clone() for name, one in model.named_buffers()}}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_light_goes_by_it_forward_and_backward_with_the_blocks_end(stub, training):
    model, x = attached("light").train(training), torch.randn(4, 3, 32, 32)
    out, found = passed(model, x, "stub")
    assert stub.done == ["light_forward"] * 8 + ["light_backward"] * 8
    expected, wanted = passed(model, x, "reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=2e-3, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_base_goes_by_it(stub):
    model, x = attached("base").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), use("stub"):
        out = model(x)
    assert stub.done == ["base_forward"] * 8
    with torch.no_grad(), use("reference"):
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.unchecked
def test_it_stands_in_a_compiled_graph(stub):
    from mrla.ops import MRLALight

    torch._dynamo.reset()
    mixer = MRLALight(4, heads=2, init="released").eval()
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad(), use("stub"):
        out, _ = torch.compile(mixer, backend="eager", fullgraph=True)(x, x)
    assert stub.done == ["light_forward"]
    with torch.no_grad(), use("reference"):
        torch.testing.assert_close(out, mixer(x, x)[0], rtol=1e-4, atol=1e-4)


def test_without_a_choice_the_first_that_supports_a_call_does_it(stub, monkeypatch):
    model, x = attached("light").eval(), torch.randn(2, 3, 32, 32)
    monkeypatch.setattr(type(BACKENDS["cpu"]), "supports", lambda self, call: False)
    with torch.no_grad():
        model(x)
    assert stub.done == ["light_forward"] * 8


def test_one_that_cannot_run_here_is_passed_over_and_refused_by_name(stub, monkeypatch):
    monkeypatch.setattr(stub, "unavailable", lambda: "the stub needs a machine of its own")
    with pytest.raises(ValueError, match="the stub needs a machine of its own"), use("stub"):
        pass
    with torch.no_grad():
        attached("light").eval()(torch.randn(2, 3, 32, 32))
    assert stub.done == []


def test_a_call_that_the_named_one_does_not_support_goes_by_torch(stub):
    model, x = attached("light").double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), use("stub"):
        out = model(x)
    assert stub.done == []
    assert torch.equal(out, model(x))


@pytest.mark.parametrize("name", ["stub", "cpu", "fused", "reference"])
def test_a_name_is_taken_once(stub, name):
    other = Stub()
    other.name = name
    with pytest.raises(ValueError, match=f"a backend must have a name of its own: '{name}'"):
        register_backend(other)
    assert BACKENDS["stub"] is stub


def test_an_unknown_path_is_refused_with_those_that_are_known(stub):
    with pytest.raises(ValueError, match="must be one of 'fused', 'reference', 'cpu', 'stub': got 'gpu'"), use("gpu"):
        pass


def test_the_paths_name(stub):
    assert chosen_path() == "fused"
    with use("stub"):
        assert chosen_path() == "stub"


@pytest.mark.parametrize("method", ["light", "base"])
def test_without_torchs_private_names_gradients_are_made_where_they_belong(method, monkeypatch):
    model, x = attached(method).train(), torch.randn(4, 3, 32, 32)
    out, usual = passed(model, x, "fused")
    monkeypatch.setattr(torch_internals, "can_defer_gradients", lambda: False)
    for name in ("will_run", "backward_pass", "graph_is_kept", "has_saved_tensor_hooks", "storage_users"):
        monkeypatch.delattr(torch_internals, name)
    again, found = passed(model, x, "fused")
    assert torch.equal(again, out)
    for name, gradient in usual.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_a_torch_that_does_not_tell_of_watchers_goes_by_its_own_operators(monkeypatch):
    assert not torch_internals.is_watched()
    monkeypatch.setattr(torch_internals, "_C", object())
    assert torch_internals.is_watched()
    assert not torch_internals.can_defer_gradients.__wrapped__()
