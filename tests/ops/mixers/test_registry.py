"""Methods of a user's own: registered, found out about, refused; and modules that the mixers of a chain share."""

import copy
import io
import pickle
from importlib.metadata import EntryPoint
from typing import Unpack

import pytest
import torch
from torch import nn

import mrla
from mrla.ops import METHODS, NO_METHODS, BranchMixer, ChainPlace, DepthwiseMixer, LayerMixer, MRLALight, options_of
from mrla.ops.mixers import registry
from mrla.ops.mixers.branch import BranchOptions


class Mean(BranchMixer):
    """The mean over space."""

    def update(self, x, shortcut, memory):
        return x.mean((2, 3), keepdim=True).expand_as(x), None

    def reset_kernels(self, init):
        pass


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The registry, put back afterwards."""
    monkeypatch.setattr(registry, "_entry_points_loaded", True)
    known = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(known)


def test_ours_are_registered_in_the_order_in_which_they_are_explained():
    assert list(METHODS) == ["light", "base", "exact", "dw"]


def test_a_registered_class_is_returned_and_known():
    assert mrla.register_method("mean")(Mean) is Mean
    assert registry.method_named("mean") is Mean
    assert registry.is_method("mean")


@pytest.mark.parametrize("name", [*METHODS])
def test_one_of_ours_is_taken_and_its_file_named(name):
    with pytest.raises(ValueError, match=rf"{name!r} is that of {METHODS[name].__name__} in .*mixers/\w+\.py"):
        mrla.register_method(name)(Mean)
    assert METHODS[name] is not Mean


def test_a_name_is_taken_once_and_its_file_named():
    mrla.register_method("mean")(Mean)
    with pytest.raises(ValueError, match=r"'mean' is that of Mean in .*test_registry\.py; .* for .*Other in"):

        @mrla.register_method("mean")
        class Other(Mean):
            pass


def test_the_same_class_defined_anew_takes_the_place_of_the_old_one():
    mrla.register_method("mean")(Mean)
    again = type("Mean", (Mean,), {"__module__": Mean.__module__, "__qualname__": Mean.__qualname__})
    assert mrla.register_method("mean")(again) is METHODS["mean"]


@pytest.mark.parametrize("name", [*NO_METHODS, "Mean", "my-mean", "", "base:last", "a b"])
def test_a_name_that_cannot_be_an_arm_is_refused(name):
    with pytest.raises(ValueError, match=r"must (be|have)"):
        mrla.register_method(name)(Mean)


def test_a_class_without_the_parts_of_the_contract_is_refused_and_they_are_named():
    class Unfinished(BranchMixer):
        pass

    class Bare(LayerMixer):
        pass

    with pytest.raises(TypeError, match=r"Unfinished in .*test_registry\.py has no reset_kernels, update"):
        mrla.register_method("unfinished")(Unfinished)
    with pytest.raises(TypeError, match=r"has no forward, reset_parameters"):
        mrla.register_method("bare")(Bare)
    assert not {"unfinished", "bare"} & set(METHODS)


@pytest.mark.unchecked
@pytest.mark.parametrize("thing", [nn.Linear, Mean.update, 3])
def test_what_is_no_mixer_is_refused(thing):
    with pytest.raises(TypeError, match=r"must be a class made of mrla\.ops\.LayerMixer"):
        mrla.register_method("thing")(thing)


def test_options_are_those_of_every_constructor_and_of_build_chain():
    class Wide(BranchMixer):
        def __init__(self, channels: int, *, width: int = 3, **options: Unpack[BranchOptions]):
            super().__init__(channels, **options)

    class Wider(Wide):
        @classmethod
        def build_chain(cls, sites, *, cell_dim=4, **options):
            return super().build_chain(sites, **options)

        def __init__(self, channels, *, depth=1, **options):
            super().__init__(channels, **options)

    of_every_branch = {"norm", "out_act", "drop_path", "init"}
    assert options_of(Mean) == of_every_branch | {"residual"}
    assert options_of(Wide) == of_every_branch | {"width"}
    assert options_of(Wider) == of_every_branch | {"width", "depth", "cell_dim"}
    assert options_of(MRLALight) == of_every_branch | {"head_dim", "heads", "carry", "value_act"}


def test_an_installed_package_names_its_methods(monkeypatch, tmp_path):
    (tmp_path / "their_methods.py").write_text(
        "import mrla\nfrom mrla.ops import DepthwiseMixer\n"
        "@mrla.register_method('theirs')\nclass Theirs(DepthwiseMixer):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_entry_points_loaded", False)
    named = [EntryPoint("theirs", "their_methods", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "entry_points", lambda group: named if group == registry.ENTRY_POINTS else [])
    assert not registry.is_method("plain")  # nothing is loaded for a name of ours
    assert registry.is_method("theirs")


def test_a_package_whose_module_does_not_import_is_named(monkeypatch):
    monkeypatch.setattr(registry, "_entry_points_loaded", False)
    named = [EntryPoint("theirs", "not_there_at_all", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "entry_points", lambda group: named)
    with pytest.raises(ValueError, match=r"not_there_at_all .*does not import \(ModuleNotFoundError"):
        registry.method_named("theirs")


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'light', 'base', 'exact', 'dw': got 'ligth'; did you mean 'light'"):
        registry.method_named("ligth")


def chain_of(length: int) -> tuple[list[DepthwiseMixer], nn.Module]:
    mixers = [DepthwiseMixer(4, place=ChainPlace(index, length)) for index in range(length)]
    cell = nn.Linear(4, 4)
    for mixer in mixers:
        mixer.share("cell", cell)
    return mixers, cell


def test_a_shared_module_is_registered_at_the_head_alone():
    mixers, cell = chain_of(3)
    assert all(mixer.cell is cell for mixer in mixers)
    names = [name for name, _ in nn.ModuleList(mixers).named_parameters() if "cell" in name]
    assert names == ["0.cell.weight", "0.cell.bias"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda chain: pickle.loads(pickle.dumps(chain)), lambda chain: _saved(chain)]
)
def test_copies_of_a_chain_share_one_copy(copied):
    mixers, cell = chain_of(3)
    twins = copied(nn.ModuleList(mixers))
    assert all(twin.cell is twins[0].cell for twin in twins)
    assert twins[0].cell is not cell
    assert torch.equal(twins[2].cell.weight, cell.weight)


def _saved(chain: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(chain, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_moving_the_chain_moves_it_for_all():
    mixers, _ = chain_of(2)
    nn.ModuleList(mixers).double()
    assert mixers[1].cell.weight.dtype is torch.float64


def test_another_mixer_registers_it_when_it_becomes_the_head():
    (_, second, third), cell = chain_of(3)
    second.move(ChainPlace(0, 2))
    third.move(ChainPlace(1, 2))
    assert list(second.state_dict()) == ["value_weight", "norm.weight", "norm.bias", *_statistics(), *_cell()]
    assert "cell.weight" not in third.state_dict()
    assert third.cell is cell
    second.move(ChainPlace(1, 3))
    assert "cell.weight" not in second.state_dict()
    assert second.cell is cell


def _statistics() -> list[str]:
    return [f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]


def _cell() -> list[str]:
    return ["cell.weight", "cell.bias"]
