"""What cutting costs, on networks of which it is known."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_norms
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mrla
from mrla.analysis.explanation.effects import (
    Outcomes,
    changes,
    cut_records,
    limited,
    outcomes,
    outcomes_in,
    possible_cuts,
    without_mixers,
)
from mrla.analysis.proportions import paired_interval
from mrla.models.mixed_blocks import MIXER

SMALL = {"channels": (8, 8, 16, 16), "num_classes": 3}


def network(method: str = "light", **options) -> nn.Module:
    # With norms that do something: at timm's start a block hands on what it gets.
    return mrla.attach(randomise_norms(timm.create_model("resnet18", **SMALL)), method, **options).eval()


def batches(images: int = 12, batch_size: int = 5, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    shown = torch.randn(images, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(shown, torch.arange(images) % 3), batch_size=batch_size, **options)


def awake(model: nn.Module, block: str) -> nn.Module:
    """One mixer of an identity start does something."""
    mixer = model.get_submodule(f"{block}.{MIXER}")
    with torch.no_grad():
        for one in (mixer.scale, mixer.norm.weight):
            if one is not None:
                one.fill_(2.0)
    return model


def measured(model: nn.Module, loader: DataLoader) -> list[dict]:
    """The records of all that can be cut."""
    cuts = possible_cuts(model)
    whole, *found = outcomes_in(model, loader, [nullcontext, *(cut.of(model) for cut in cuts)])
    return cut_records(whole, found, cuts)


def test_what_can_be_cut():
    base = [(cut.block, cut.source, cut.lag) for cut in possible_cuts(network("base"), ["links"])]
    assert base == [(f"layer{at}.1", f"layer{at}.0", 1) for at in range(1, 5)]
    deep = mrla.attach(timm.create_model("resnet34", **SMALL), "base", last=3)
    assert [cut.source for cut in possible_cuts(deep, ["links"]) if cut.block == "layer3.4"] == ["layer3.2", "layer3.3"]
    light = possible_cuts(network(), ["links"])
    assert [cut.source for cut in light[:2]] == ["input", "layer1.0"]
    assert [cut.kind for cut in possible_cuts(network())] == ["mixers"] * 8 + ["links"] * 8 + ["heads"] * 8
    assert len(possible_cuts(network(heads=4), ["heads"])) == 32
    assert len(possible_cuts(network(carry="output"), ["links"])) == 4  # the head of a chain carries nothing
    assert possible_cuts(network("dw"), ["links", "heads"]) == []
    with pytest.raises(ValueError, match=r"cuts must be of mixers, links, heads: got 'head'"):
        possible_cuts(network(), ["head"])


def test_outcomes_are_each_images_own():
    model, loader = network(), batches()
    found = outcomes(model, loader)
    with torch.no_grad():
        logits = torch.cat([model(shown) for shown, _ in loader])
    labels = torch.arange(12) % 3
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    assert np.allclose(found.losses, losses, atol=1e-6)
    assert found.hits.tolist() == (logits.argmax(1) == labels).tolist()
    assert found.scores() == {"accuracy": found.hits.mean(), "loss": found.losses.mean()}
    scores = mrla.evaluate(model, loader)
    assert scores["loss"] == pytest.approx(found.scores()["loss"], abs=1e-5)
    assert outcomes(model, loader, images=7).labels.tolist() == labels[:7].tolist()
    model.train()
    assert np.array_equal(outcomes(model, loader).losses, found.losses)
    assert model.training


def test_a_mixer_that_does_nothing_costs_exactly_nothing():
    for one in measured(network(), batches()):
        assert one["loss_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert one["accuracy_change"]["mean"] == 0
        # Twelve images of which none changes do not show that there is no change.
        assert one["accuracy_change"]["low"] < -0.2
        assert one["shown"] == {"accuracy": "not resolved", "loss": "not resolved"}


@pytest.mark.parametrize("method", ["light", "base", "exact", "dw"])
def test_only_what_does_something_costs_something(method):
    model, loader = awake(network(method), "layer3.1"), batches()
    whole = outcomes(model, loader)
    records = measured(model, loader)
    # What only a norm's bias or another path computes differs by rounding.
    costly = [one for one in records if abs(one["loss_change"]["mean"]) > 1e-5]
    names = [tuple(one[name] for name in ("block", "source", "head") if name in one) for one in costly]
    alone, link, head = ("layer3.1",), ("layer3.1", "layer3.0"), ("layer3.1", 0)
    # Of base and exact a block without its mixer gives the next one no value either.
    expected = {"light": [alone, link, head], "dw": [alone]}.get(method, [("layer3.0",), alone, link, head])
    assert names == expected
    with without_mixers(model):
        bare = outcomes(model, loader)
    plain = outcomes(mrla.detach(copy.deepcopy(model)), loader)
    assert np.allclose(bare.losses, plain.losses, atol=1e-6)
    found = costly[names.index(alone)]
    assert found["loss"] == pytest.approx(bare.scores()["loss"], abs=1e-6)
    assert found["loss_change"]["mean"] == pytest.approx((plain.losses - whole.losses).mean(), abs=1e-6)


def test_the_interval_is_that_of_a_paired_t_test():
    from scipy.stats import ttest_rel

    model, loader = awake(network("base"), "layer2.0"), batches()
    whole = outcomes(model, loader)
    with without_mixers(model):
        found = outcomes(model, loader)
    once, four = changes(whole, found), changes(whole, found, comparisons=4)
    low, high = ttest_rel(found.losses, whole.losses).confidence_interval(0.95)
    assert (once["loss_change"]["low"], once["loss_change"]["high"]) == pytest.approx((low, high))
    low, high = ttest_rel(found.losses, whole.losses).confidence_interval(1 - 0.05 / 4)
    assert (four["loss_change"]["low"], four["loss_change"]["high"]) == pytest.approx((low, high))
    one = changes(outcomes(model, loader, images=1), outcomes(model, loader, images=1))
    assert one["loss_change"] == {"mean": 0.0, "low": None, "high": None}
    assert one["shown"]["loss"] == "not resolved"


def said(*groups: tuple[int, bool, float]) -> Outcomes:
    """So many images each, right or wrong, with so much loss."""
    counts, hits, losses = (np.array(values) for values in zip(*groups, strict=True))
    labels = np.zeros(counts.sum(), dtype=int)
    return Outcomes(losses=np.repeat(losses, counts), hits=np.repeat(hits, counts), labels=labels)


def test_the_interval_of_the_accuracy_is_that_of_the_images_that_change():
    whole, found = (
        said((70, True, 1.0), (30, False, 1.0)),
        said((55, True, 1.0), (15, False, 1.1), (5, True, 0.9), (25, False, 1.0)),
    )
    changed = changes(whole, found, comparisons=3)["accuracy_change"]
    assert changed["mean"] == pytest.approx(-0.1)
    assert (changed["low"], changed["high"]) == paired_interval(5, 15, 100, alpha=0.05 / 3)


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (said((60, True, 1.0), (40, False, 1.0)), {"accuracy": "not resolved", "loss": "not resolved"}),
        (said((30, True, 1.0), (70, False, 1.1)), {"accuracy": "worse", "loss": "worse"}),
        (said((90, True, 0.9), (10, False, 1.0)), {"accuracy": "better", "loss": "better"}),
        # What changes alike in all images has no spread by which it could be judged.
        (said((60, True, 1.5), (40, False, 1.5)), {"accuracy": "not resolved", "loss": "not resolved"}),
    ],
    ids=["nothing", "worse", "better", "no spread"],
)
def test_what_is_shown_is_what_the_intervals_leave_out(found, shown):
    assert changes(said((60, True, 1.0), (40, False, 1.0)), found)["shown"] == shown


def test_images_up_to_a_number():
    sizes = [[len(labels) for _, labels in limited(batches(), images)] for images in (None, 12, 7, 5, 1)]
    assert sizes == [[5, 5, 2], [5, 5, 2], [5, 2], [5], [1]]


def test_states_are_compared_on_the_same_images_and_each_is_read_once():
    model, loader = awake(network("base"), "layer3.1"), batches()
    cuts = possible_cuts(model, ["mixers"])
    read: list[int] = []

    def once():
        for shown, right in loader:
            read.append(len(right))
            yield shown, right

    passes: list[int] = []
    states = [nullcontext, *(cut.of(model) for cut in cuts)]
    found = outcomes_in(model, once(), states, on_pass=passes.append)
    assert read == [5, 5, 2]
    assert passes == [size for size in read for _ in states]
    for said, state in zip(found, states, strict=True):
        with state():
            assert np.allclose(outcomes(model, loader).losses, said.losses, atol=1e-6)
    order = torch.Generator().manual_seed(0)
    whole, *others = outcomes_in(model, batches(shuffle=True, generator=order), states)
    assert not np.array_equal(whole.labels, found[0].labels)
    expected = cut_records(found[0], found[1:], cuts)
    for one, other in zip(cut_records(whole, others, cuts), expected, strict=True):
        assert one["loss_change"]["mean"] == pytest.approx(other["loss_change"]["mean"], abs=1e-6)


def test_bad_calls():
    model = network()
    shuffled = batches(shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"same images in the same order each time.*use shuffle=False"):
        changes(outcomes(model, shuffled), outcomes(model, shuffled))
    with pytest.raises(ValueError, match="at least one image: it has none"):
        outcomes(model, [])
    segmenter = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"logits \(b, classes\): this Sequential gives a tensor \(5, 3, 32, 32\)"):
        outcomes(segmenter, batches())
