"""What `mrla.prune` takes off, and what it says of that."""

import pytest
import torch
from test_effects import awake, batches, network

import mrla
from mrla.analysis.explanation.effects import outcomes
from mrla.models import is_attached, mixed_chains


def mixed(model) -> list[str]:
    return [block for chain in mixed_chains(model) for block in chain.mixers]


def test_those_whose_cut_costs_most_are_kept(tmp_path):
    model, loader = awake(awake(network("base"), "layer3.1"), "layer1.0"), batches()
    said = outcomes(model, loader)
    calls: list[tuple[int, int]] = []
    pruned = mrla.prune(model, loader, keep=2, on_progress=lambda done, total: calls.append((done, total)))
    by_cost = sorted(pruned.cuts, key=lambda one: -one["loss_change"]["mean"])
    assert set(pruned.kept) == {one["block"] for one in by_cost[:2]}
    assert mixed(model) == list(pruned.kept)
    assert set(pruned.kept) | set(pruned.removed) == {one["block"] for one in pruned.cuts}
    assert pruned.before["loss"] == said.scores()["loss"]
    left = outcomes(model, loader)
    assert pruned.after["loss"] == pytest.approx(left.scores()["loss"])
    assert pruned.after["loss_change"]["mean"] == pytest.approx((left.losses - said.losses).mean(), abs=1e-9)
    assert pruned.after["parameters"] < pruned.before["parameters"]
    assert pruned.after["images_per_second"]["median"] > 0
    assert repr(pruned).startswith("Pruning(kept='2 of 8 mixers', accuracy='")
    assert len(repr(pruned)) < 500
    assert calls == [*((done, 30) for done in range(1, 31)), (30, 30)]  # three batches, the whole, eight cuts, the rest
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(mrla.load(mrla.save(model, tmp_path))(image), model(image))


def test_what_does_nothing_is_not_kept():
    model, loader = awake(network("base"), "layer2.1"), batches(images=40)
    said = outcomes(model, loader)
    # Right is what the network with this mixer says, so that to cut it must cost something.
    labels = torch.from_numpy(_said(model, loader))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(loader.dataset.tensors[0], labels), 20)
    pruned = mrla.prune(model, loader)
    assert pruned.kept in (("layer2.1",), ())
    assert (pruned.kept == ()) == (not is_attached(model))
    assert len(said.losses) == 40


def _said(model, loader):
    with torch.no_grad():
        return torch.cat([model(shown).argmax(1) for shown, _ in loader]).numpy()


def test_none_kept_is_the_plain_network():
    model = network()
    pruned = mrla.prune(model, batches(), keep=0)
    assert pruned.kept == ()
    assert not is_attached(model)
    assert mrla.attach(model) is model


def test_named_ones_are_kept_and_all_of_them_change_nothing():
    model, loader = awake(network(), "layer4.0"), batches()
    before = mixed(model)
    pruned = mrla.prune(model, loader, keep=before)
    assert pruned.removed == ()
    assert pruned.after["loss_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert mrla.prune(model, loader, keep=["layer4.0"]).kept == ("layer4.0",)
    assert mixed(model) == ["layer4.0"]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (9, "keep must be from 0 to 8, the mixers of this network: got 9"),
        (-1, "keep must be from 0 to 8"),
        (["layer9"], r"paths of blocks with a mixer: got 'layer9'; choose of layer1.0, "),
    ],
)
def test_bad_calls(keep, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        mrla.prune(model, batches(), keep=keep)
    assert len(mixed(model)) == 8
    with pytest.raises(ValueError, match="has no mixers"):
        mrla.prune(mrla.detach(model), batches())
