"""What a block hears of which: the weights, and recurrences written out, against the update that they make."""

import pytest
import torch
from torch import nn

from mrla.ops import (
    ChainPlace,
    Contribution,
    DepthwiseMixer,
    LayerAttention,
    LayerMixer,
    MRLABase,
    MRLALight,
    attention_over_layers,
    weighted_sum,
)

CHANNELS, LENGTH = 8, 4


def chain(kind: type[LayerMixer], **options) -> list:
    mixers = []
    for index in range(LENGTH):
        place = ChainPlace(index, LENGTH)
        mixer = kind(CHANNELS, place=place, init="released", **options).eval()  # type: ignore[call-arg]
        for parameter in mixer.parameters():
            nn.init.normal_(parameter)
        for norm in mixer.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        mixers.append(mixer)
    return mixers


def outputs(shape=(3, CHANNELS, 5, 4)) -> list[torch.Tensor]:
    return [torch.randn(shape) for _ in range(LENGTH)]


@torch.no_grad()
def passed(mixers, given):
    """What each mixer hears, and its update; each block's output is given, and its shortcut is what came before."""
    memory, shortcut, found, updates = None, torch.randn_like(given[0]), [], []
    first = shortcut
    for mixer, x in zip(mixers, given, strict=True):
        found.append(mixer.contributions(x, shortcut, memory))
        update, _ = mixer.update(x, shortcut if mixer.uses_shortcut else None, memory)
        updates.append(update)
        shortcut, memory = mixer(x, shortcut, memory)
    return found, updates, first


@pytest.mark.parametrize("carry", ["output", "shortcut"])
def test_lights_recurrence_written_out_makes_its_update(carry):
    mixers = chain(MRLALight, carry=carry, heads=CHANNELS)
    for mixer in mixers:
        # Values that are the block's output: a source's weight then multiplies one map. Nothing that a magnitude hides.
        nn.init.zeros_(mixer.value_weight)
        mixer.value_weight.data[:, :, 1, 1] = 1
        nn.init.zeros_(mixer.norm.bias)
        nn.init.zeros_(mixer.norm.running_mean)
        mixer.norm.weight.data.abs_()
        if mixer.decay is not None:
            mixer.decay.data.abs_()
    given = outputs()
    found, updates, first = passed(mixers, given)
    heard = attention_over_layers(found)
    assert heard.shape == (3, CHANNELS, LENGTH, LENGTH + 1)
    assert heard.isnan()[..., 0].all() == (carry == "output")
    for at, update in enumerate(updates):
        weights = heard[:, :, at].nan_to_num().permute(0, 2, 1)
        assert torch.allclose(weighted_sum(weights, [first, *given]), update, atol=1e-4), at


def test_signs_do_not_cancel():
    decay = torch.tensor([1.0, -1.0])
    heard = Contribution(torch.ones(1, 1, 1), decay=decay, carries_update=True)
    assert attention_over_layers([heard._replace(decay=None), heard])[0, 0, 1].tolist()[1:] == [1, 1]


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
@pytest.mark.parametrize("last", [None, 1, 3])
@pytest.mark.parametrize("kind", [MRLABase, LayerAttention])
def test_what_attention_weighs_makes_its_update(kind, last, weighting):
    mixers, given = chain(kind, heads=2, last=last, weighting=weighting), outputs()
    for mixer in mixers[1:]:  # with tied values, exact's update is a sum of them too
        mixer.value_weight = mixers[0].value_weight
    found, updates, _ = passed(mixers, given)
    heard = attention_over_layers(found)
    values = [nn.functional.conv2d(x, mixers[0].value_weight, padding=1, groups=CHANNELS) for x in given]
    for at, update in enumerate(updates):
        expected = [float("nan")] * (LENGTH + 1)
        asked = range(max(0, at + 1 - (last or LENGTH)), at + 1)
        assert [source - 1 for source in range(1, LENGTH + 1) if not heard[0, 0, at, source].isnan()] == list(asked)
        weights = heard[:, :, at, [source + 1 for source in asked]].permute(0, 2, 1)
        assert torch.allclose(weighted_sum(weights, [values[source] for source in asked]), update, atol=1e-4)
        assert len(expected) == heard.shape[-1]


def test_a_query_that_wants_one_block():
    """Keys that point elsewhere but for one block's: all weight is on that one."""
    mixers = chain(MRLABase, heads=1)
    for mixer in mixers:
        for weight in (mixer.query_weight, mixer.key_weight):
            nn.init.zeros_(weight)
            weight.data[..., weight.shape[-1] // 2] = 100
    given = [torch.full((1, CHANNELS, 2, 2), -1.0) for _ in range(LENGTH)]
    given[1] = -given[1]
    # Blocks 3 and 4 have negative queries: they turn away from block 2 and share what is left alike.
    found, _, _ = passed(mixers, given)
    heard = attention_over_layers(found)[0, 0]
    assert heard[1].nan_to_num().tolist() == [0, 0, 1, 0, 0]
    assert torch.allclose(heard[3].nan_to_num(), torch.tensor([0, 1 / 3, 0, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("kind", [MRLABase, LayerAttention])
def test_a_block_that_is_not_heard_is_as_if_it_were_not_there(kind):
    mixers, given = chain(kind, heads=2), outputs()
    memory = None
    with torch.no_grad():
        for mixer, x in zip(mixers[:3], given[:3], strict=True):
            _, memory = mixer(x, None, memory)
        assert mixers[3].max_lag == 3
        for lag in (1, 2, 3):
            assert memory is not None
            without = type(memory)(*(part[: 3 - lag] + part[3 - lag + 1 :] for part in memory))
            out, after = mixers[3].forward_ablated(given[3], None, memory, lag=lag)
            assert torch.allclose(out, mixers[3](given[3], None, without)[0], atol=1e-6)
            if after is not None:  # who comes next hears all of them
                assert len(after[0]) == 4
                assert all(one is other for one, other in zip(after[0][:3], memory[0], strict=True))
        with pytest.raises(ValueError, match=r"lag must be from 1 to 3.*got 4"):
            mixers[3].forward_ablated(given[3], None, memory, lag=4)
        with pytest.raises(ValueError, match=r"lag must be from 1 to 0, the blocks in the memory"):
            mixers[3].forward_ablated(given[3], None, None, lag=1)


@pytest.mark.parametrize("carry", ["output", "shortcut"])
def test_light_without_its_lambda_term(carry):
    mixer = chain(MRLALight, carry=carry)[1]
    x, shortcut, memory = (torch.randn(2, CHANNELS, 4, 4) for _ in range(3))
    with torch.no_grad():
        out, _ = mixer.forward_ablated(x, shortcut, memory if carry == "output" else None, lag=1)
        nn.init.zeros_(mixer.decay)
        expected, _ = mixer(x, shortcut, memory if carry == "output" else None)
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("kind", [MRLALight, MRLABase, LayerAttention])
def test_a_head_that_retrieves_nothing(kind):
    mixers, given = chain(kind, heads=2), outputs()
    memory = None
    with torch.no_grad():
        for mixer, x in zip(mixers[:2], given[:2], strict=True):
            _, memory = mixer(x, given[3], memory)
        args = given[2], given[3], memory
        whole, after = mixers[2](*args)
        update, _ = mixers[2].update(given[2], given[3] if mixers[2].uses_shortcut else None, memory)
        update[:, CHANNELS // 2 :] = 0
        out, after_cut = mixers[2].forward_ablated(*args, head=1)
        expected = mixers[2].norm(update)
        expected = given[2] + (expected.relu() if mixers[2].out_act else expected)
        assert torch.allclose(out, expected, atol=1e-6)
        assert torch.allclose(out[:, : CHANNELS // 2], whole[:, : CHANNELS // 2], atol=1e-5)
        if after is not None:  # who comes next hears all of it
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(after[1], after_cut[1], strict=True))
        both, _ = mixers[2].forward_ablated(*args, lag=1, head=1)
        link, _ = mixers[2].forward_ablated(*args, lag=1)
        assert torch.equal(both[:, : CHANNELS // 2], link[:, : CHANNELS // 2])
        assert torch.equal(both[:, CHANNELS // 2 :], out[:, CHANNELS // 2 :])
    with pytest.raises(ValueError, match=r"head must be one of the 2 heads.*got 2"):
        mixers[2].forward_ablated(*args, head=2)


@pytest.mark.parametrize("kind", [MRLALight, MRLABase, LayerAttention])
def test_nothing_cut_is_a_call(kind):
    mixers, given = chain(kind, heads=2), outputs()
    with torch.no_grad():
        out, _ = mixers[0].forward_ablated(given[0], given[1], None)
        assert torch.allclose(out, mixers[0](given[0], given[1], None)[0], atol=1e-5)


def test_a_mixer_that_becomes_the_head_of_its_chain():
    light, other = chain(MRLALight, carry="output")[1], chain(MRLALight)[1]
    for mixer in (light, other):
        mixer.move(ChainPlace(0, 3))
        assert mixer.place == ChainPlace(0, 3)
    assert light.decay is None  # as one that is made there
    assert light.max_lag == 0
    assert other.decay is not None
    base = chain(MRLABase)[1]
    assert base.zero_grad_parameters() == ()
    base.move(ChainPlace(0, 3))
    assert base.zero_grad_parameters() == ("query_weight",)


def test_how_long_the_terms_are():
    mixer = chain(MRLALight, heads=2)[1]
    x, shortcut = torch.randn(2, CHANNELS, 4, 4), torch.randn(2, CHANNELS, 4, 4)
    with torch.no_grad():
        update_norms = mixer.update_norms(x, shortcut)
        whole, _ = mixer.update(x, shortcut, None)
        attention, _ = mixer.update(x, None, None)
    assert torch.allclose(update_norms.attention, attention.flatten(1).norm(dim=1), rtol=1e-5)
    assert torch.allclose(update_norms.carried, (whole - attention).flatten(1).norm(dim=1), rtol=1e-5)
    assert mixer.update_norms(x) is None
    assert DepthwiseMixer(CHANNELS).update_norms(x) is None


@pytest.mark.parametrize(("mixer", "max_lag"), [
    (MRLALight(CHANNELS), 1),
    (MRLALight(CHANNELS, has_shortcut=False), 0),
    (MRLALight(CHANNELS, carry="output", place=ChainPlace(0, 3)), 0),
    (MRLABase(CHANNELS, place=ChainPlace(2, 3)), 2),
    (MRLABase(CHANNELS, place=ChainPlace(2, 3), last=2), 1),
    (MRLABase(CHANNELS), 0),
    (DepthwiseMixer(CHANNELS), 0),
])  # fmt: skip
def test_the_largest_lag_of_a_mixer(mixer, max_lag):
    assert mixer.max_lag == max_lag


def test_who_does_not_say_what_it_hears():
    x = torch.randn(1, CHANNELS, 4, 4)
    assert DepthwiseMixer(CHANNELS).contributions(x) is None
    with pytest.raises(
        ValueError, match="lag must be from 1 to 0, the blocks before this DepthwiseMixer that it reads: got 1"
    ):
        DepthwiseMixer(CHANNELS).forward_ablated(x, lag=1)
    with pytest.raises(ValueError, match="head must be one of the 0 heads of this DepthwiseMixer"):
        DepthwiseMixer(CHANNELS).forward_ablated(x, head=0)
    with pytest.raises(ValueError, match="a mixer that tells of its contributions: got none"):
        attention_over_layers([None])
    two, four = Contribution(torch.ones(1, 1, 2)), Contribution(torch.ones(1, 1, 4))
    with pytest.raises(ValueError, match=r"the same images and heads: got .*\(1, 1, 2\), \(1, 1, 4\)"):
        attention_over_layers([two, four])


@pytest.mark.parametrize("layout", ["NHWC", "NLC"])
def test_other_layouts_hear_the_same(layout):
    here, there = (
        MRLALight(CHANNELS, init="released", norm="layer"),
        MRLALight(CHANNELS, layout=layout, init="released"),
    )
    own = {name: weight for name, weight in here.state_dict().items() if not name.startswith("norm")}
    there.load_state_dict(own, strict=False)
    x, shortcut = torch.randn(2, CHANNELS, 4, 4), torch.randn(2, CHANNELS, 4, 4)
    moved = [map.permute(0, 2, 3, 1) for map in (x, shortcut)]
    moved = [map.flatten(1, 2) for map in moved] if layout == "NLC" else moved
    heard, expected = there.contributions(*moved), here.contributions(x, shortcut)
    assert heard is not None
    assert expected is not None
    assert torch.allclose(heard.weights, expected.weights)
    assert heard.residual_gain is None
    assert torch.allclose(there.update_norms(*moved).carried, here.update_norms(x, shortcut).carried)


def test_a_block_without_a_mixer_between():
    heard = Contribution(torch.full((1, 1, 1), 0.5), decay=torch.tensor([2.0]), residual_gain=torch.tensor([3.0]))
    # Of the bare block its output alone; what it was made of is not known.
    assert attention_over_layers([heard, None, heard])[0, 0, 2].nan_to_num(-1).tolist() == [-1, -1, 2, 0.5]
    carried = heard._replace(carries_update=True)
    # An update passes such a block by.
    found = attention_over_layers([carried._replace(decay=None), None, carried])[0, 0, 2]
    assert found.nan_to_num(-1).tolist() == [-1, 1, -1, 0.5]
    whole = attention_over_layers([heard, heard])[0, 0, 1].tolist()
    assert whole == [2 * 3 * 2, 2 * (1 + 3 * 0.5), 0.5]
