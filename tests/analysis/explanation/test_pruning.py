"""What `mrla.prune` takes off, on what evidence, and what it says of that."""

import copy

import pytest
import torch
from known_effects import COLLAPSING, DECISIVE, NARROW, REDUNDANT, images, known_effects, mixed
from test_effects import awake, batches, network

import mrla
from mrla.analysis.explanation import pruning
from mrla.analysis.explanation.effects import outcomes
from mrla.analysis.proportions import images_needed
from mrla.models import is_attached

ANY = 100
"""A margin that any network keeps."""


def test_those_whose_cut_costs_most_are_kept(tmp_path):
    model, loader = awake(awake(network("base"), "layer3.1"), "layer1.0"), batches()
    said = outcomes(model, loader)
    calls: list[tuple[int, int]] = []
    options = {"keep": 2, "margin": ANY, "on_progress": lambda done, total: calls.append((done, total))}
    pruned = mrla.prune(model, loader, **options)
    cost = {one["block"]: (-one["accuracy_change"]["mean"], one["loss_change"]["mean"]) for one in pruned.cuts}
    assert min(cost[block] for block in pruned.kept) >= max(cost[block] for block in pruned.removed)
    assert mixed(model) == list(pruned.kept)
    assert set(pruned.kept) | set(pruned.removed) == {one["block"] for one in pruned.cuts}
    assert pruned.before["loss"] == said.scores()["loss"]
    left = outcomes(model, loader)
    assert pruned.after["loss"] == pytest.approx(left.scores()["loss"])
    assert pruned.after["loss_change"]["mean"] == pytest.approx((left.losses - said.losses).mean(), abs=1e-9)
    assert pruned.after["parameters"] < pruned.before["parameters"]
    assert pruned.after["images_per_second"]["median"] > 0
    for scores in (pruned.before, pruned.after):
        assert scores["accuracy_interval"]["low"] < scores["accuracy"] < scores["accuracy_interval"]["high"]
    assert repr(pruned).startswith("Pruning(kept='2 of 8 mixers', accuracy='")
    assert len(repr(pruned)) < 500
    assert calls == [*((done, 30) for done in range(1, 31)), (30, 30)]  # three batches, the whole, eight cuts, the rest
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(mrla.load(mrla.save(model, tmp_path))(image), model(image))


def test_mixers_that_are_spared_alone_and_not_together():
    """In 0.1.0 an arm went from 57.9 to 10.9 %: each cut did nothing, all of them everything."""
    model, loader = known_effects(REDUNDANT), images(*COLLAPSING)
    pruned = mrla.prune(model, loader)
    assert pruned.before["accuracy"] == pytest.approx(0.579)
    assert [cut["loss_change"]["mean"] for cut in pruned.cuts] == [0.0] * 4
    assert len(pruned.kept) == 1
    assert mixed(model) == list(pruned.kept)
    assert pruned.after["accuracy"] == pytest.approx(0.579)
    assert outcomes(model, loader).scores()["accuracy"] == pytest.approx(0.579)
    assert [step["shown"] for step in pruned.steps] == [True, True, True, False]
    last = pruned.steps[-1]
    assert last["accuracy"] == pytest.approx(0.109)
    assert (last["gained"], last["lost"], last["images_needed"]) == (0, 470, None)
    assert last["accuracy_change"]["high"] < -0.4
    assert f"Without {pruned.kept[0]} too it is shown to lose more than 0.5 points" in pruned.verdict
    with pytest.raises(
        ValueError, match=r"accuracy is 10\.90 % \(95 % interval 9\.\d\d to 12\.\d\d\) in place of 57\.90"
    ):
        mrla.prune(model, loader, keep=0)
    assert mixed(model) == list(pruned.kept)


def test_a_mixer_that_moves_answers_and_hardly_the_loss_is_kept():
    model, loader = known_effects(DECISIVE), images(*NARROW)
    pruned = mrla.prune(model, loader)
    alone = pruned.cuts[2]
    assert alone["accuracy_change"]["mean"] == pytest.approx(-0.129)
    assert alone["loss_change"]["mean"] == pytest.approx(0.01, abs=0.005)
    assert alone["loss_change"]["low"] < 0  # the loss alone would let it go
    assert alone["shown"] == {"accuracy": "worse", "loss": "not resolved"}
    assert pruned.kept == ("blocks.2",)
    assert set(pruned.removed) == {"blocks.0", "blocks.1"}
    assert len(pruned.steps) == 2  # that mixer is not even tried
    with pytest.raises(ValueError, match=r"without 1 of 1 mixers the accuracy is 47\.10 %.*shown to lose more than"):
        mrla.prune(model, loader, keep=[])
    assert mrla.prune(model, loader, keep=0, margin=15.5).after["accuracy"] == pytest.approx(0.471)


def test_48_images_show_nothing():
    model, loader = known_effects([0.0] * 3), images((48, 3.0, 0.0))
    before = copy.deepcopy(model.state_dict())
    pruned = mrla.prune(model, loader)
    assert pruned.removed == ()
    assert mixed(model) == list(pruned.kept) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [step["shown"] for step in pruned.steps] == [False]
    assert pruned.verdict.startswith("All 3 mixers stay: even without blocks.0, whose cut costs least,")
    assert "that takes at least 765 images" in pruned.verdict
    assert pruned.note.startswith("The same images chose")
    with pytest.raises(ValueError, match=r"at least 765 images.*allow more with --margin 7\.5$"):
        mrla.prune(model, loader, keep=1)
    assert mixed(model) == list(pruned.kept)
    assert mrla.prune(copy.deepcopy(model), loader, margin=7.5).kept == ()
    assert mrla.prune(copy.deepcopy(model), loader, keep=1, margin=7.5).kept == ("blocks.2",)


@pytest.mark.parametrize("more", [-1, 0])
def test_as_many_images_as_it_names_show_it(more):
    needed = images_needed(0, 0, 1, margin=0.01)
    assert needed is not None
    pruned = mrla.prune(known_effects([0.0] * 2), images((needed + more, 3.0, 0.0)), margin=1.0)
    assert (pruned.removed == ()) == (more < 0)


def test_what_looks_spared_when_cut_and_is_not_when_off_stays(monkeypatch):
    """The network that is left has the last word."""

    def broken(model, removed):
        with torch.no_grad():
            model.blocks[0].conv.bias[0] = -9.0
        return model

    model, loader = known_effects([0.0] * 2), images((900, 3.0, 0.0))
    monkeypatch.setattr(pruning, "_without", broken)
    pruned = mrla.prune(model, loader)
    assert pruned.removed == ()
    assert len(mixed(model)) == 2
    assert outcomes(model, loader).scores()["accuracy"] == 1
    assert pruned.after["accuracy"] == 1
    assert pruned.steps[0]["lost"] == 900


def test_a_loss_that_rises_without_a_changed_answer_is_said():
    model = known_effects([1.0])
    pruned = mrla.prune(model, images((450, 3.0, 2.0), (450, 3.0, 2.5)))
    assert pruned.kept == ()
    assert pruned.after["accuracy"] == 1
    assert pruned.after["shown"] == {"accuracy": "not resolved", "loss": "worse"}
    assert "its loss is shown to rise" in pruned.verdict


def test_none_kept_is_the_plain_network():
    model = network()
    pruned = mrla.prune(model, batches(), keep=0, margin=ANY)
    assert pruned.kept == ()
    assert not is_attached(model)
    assert mrla.attach(model) is model


def test_named_ones_are_kept_and_all_of_them_change_nothing():
    model, loader = awake(network(), "layer4.0"), batches()
    before = mixed(model)
    pruned = mrla.prune(model, loader, keep=before)
    assert pruned.removed == ()
    assert pruned.steps == []
    assert pruned.after["loss_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert pruned.note.startswith("The blocks were named")
    assert mrla.prune(model, loader, keep=["layer4.0"], margin=ANY).kept == ("layer4.0",)
    assert mixed(model) == ["layer4.0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 9}, "keep must be from 0 to 8, the mixers of this network: got 9"),
        ({"keep": -1}, "keep must be from 0 to 8"),
        ({"keep": ["layer9"]}, r"paths of blocks with a mixer: got 'layer9'; choose of layer1.0, "),
        ({"margin": -0.1}, r"margin must be the points of accuracy that may be lost, from 0 to 100: got -0\.1"),
        ({"margin": float("nan")}, "from 0 to 100: got nan"),
        ({"margin": 101}, "from 0 to 100: got 101"),
    ],
)
def test_bad_calls(options, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        mrla.prune(model, batches(), **options)
    assert len(mixed(model)) == 8
    with pytest.raises(ValueError, match="has no mixers"):
        mrla.prune(mrla.detach(model), batches())
