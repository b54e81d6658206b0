import pytest
import timm
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

import mrla
from mrla.train import Optim
from mrla.train.schedule import lr_factor, make_optimizer, make_schedule


def rates(optim: Optim, *, epochs: int, steps_per_epoch: int) -> list[float]:
    """The learning rate in every step of a run, as the optimizer has it."""
    optimizer = make_optimizer(nn.Linear(2, 2), optim)
    schedule = make_schedule(optimizer, optim, epochs=epochs, steps_per_epoch=steps_per_epoch)
    return stepped(optimizer, schedule, epochs * steps_per_epoch)


def stepped(optimizer: Optimizer, schedule: LRScheduler, steps: int, every: int = 1) -> list[float]:
    seen = []
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            schedule.step()
    return seen


def plain_sgd(lr: float) -> SGD:
    return SGD(nn.Linear(2, 2).parameters(), lr=lr)


@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_multistep_is_torchs(steps_per_epoch):
    optim = Optim(lr=0.3, schedule="multistep", milestones=(2, 5, 6), gamma=0.2)
    oracle = plain_sgd(0.3)
    expected = stepped(oracle, MultiStepLR(oracle, [2, 5, 6], gamma=0.2), 8 * steps_per_epoch, every=steps_per_epoch)
    assert rates(optim, epochs=8, steps_per_epoch=steps_per_epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 0.01])
@pytest.mark.parametrize("warmup", [0, 2])
def test_cosine_is_torchs_over_the_epochs_after_the_warmup(warmup, min_lr):
    optim = Optim(lr=0.3, schedule="cosine", min_lr=min_lr, warmup_epochs=warmup)
    steps = (6 - warmup) * 5
    oracle = plain_sgd(0.3)
    expected = stepped(oracle, CosineAnnealingLR(oracle, steps, eta_min=min_lr), steps)
    assert rates(optim, epochs=6, steps_per_epoch=5)[warmup * 5 :] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert lr_factor(30, optim=optim, epochs=6, steps_per_epoch=5) == pytest.approx(min_lr / 0.3)


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
def test_the_warmup_is_a_straight_line_from_a_hundredth(schedule):
    optim = Optim(lr=0.5, schedule=schedule, warmup_epochs=3, milestones=(4,))
    seen = torch.tensor(rates(optim, epochs=5, steps_per_epoch=4), dtype=torch.float64)
    assert seen[0] == pytest.approx(0.005)
    assert seen[12] == pytest.approx(0.5)
    assert torch.allclose(seen[:13].diff(), torch.tensor((0.5 - 0.005) / 12, dtype=torch.float64))


def test_constant_stays():
    assert rates(Optim(lr=0.2, schedule="constant"), epochs=3, steps_per_epoch=2) == [0.2] * 6


def test_a_milestone_inside_the_warmup_counts_after_it():
    optim = Optim(schedule="multistep", milestones=(1, 3), warmup_epochs=2)
    factors = [lr_factor(step, optim=optim, epochs=4, steps_per_epoch=1) for step in range(4)]
    assert factors[2:] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_is_torchs_with_the_given_numbers(name):
    optim = Optim(name=name, lr=0.02, momentum=0.8, betas=(0.8, 0.95), weight_decay=0.3)
    optimizer = make_optimizer(nn.Linear(2, 2), optim)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    if name == "sgd":
        assert type(optimizer) is SGD
        assert (group["momentum"], group["nesterov"]) == (0.8, False)
    else:
        assert type(optimizer) is AdamW
        assert group["betas"] == (0.8, 0.95)


def test_old_weights_learn_at_their_own_pace_through_the_whole_schedule():
    model = timm.create_model("resnet18", num_classes=3, channels=(8, 8, 8, 8))
    optim = Optim(lr=0.5, decay_vectors=True, old_lr_scale=0.1, schedule="multistep", milestones=(1,))
    optimizer = make_optimizer(model, optim, new=["layer4.*"])
    new, old = optimizer.param_groups
    assert {id(p) for p in new["params"]} == {id(p) for p in [*model.layer4.parameters(), *model.fc.parameters()]}
    schedule = make_schedule(optimizer, optim, epochs=2, steps_per_epoch=1)
    assert (new["lr"], old["lr"]) == pytest.approx((0.5, 0.05))
    optimizer.step()
    schedule.step()
    assert (new["lr"], old["lr"]) == pytest.approx((0.05, 0.005))


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_decay_reaches_what_it_should_and_every_parameter_once(decay_vectors):
    model = mrla.attach(timm.create_model("resnet18", num_classes=3, channels=(8, 8, 8, 8)), init="released")
    model.conv1.weight.requires_grad = False
    optimizer = make_optimizer(model, Optim(weight_decay=0.1, decay_vectors=decay_vectors))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(decay) == {id(p) for p in trained.values()}
    lambdas = [name for name in trained if name.endswith("mrla.decay")]
    assert len(lambdas) == 8
    assert {trained[name].shape for name in lambdas} == {(8,)}
    undecayed = {name for name, p in trained.items() if decay[id(p)] == 0}
    if decay_vectors:
        assert not undecayed
    else:
        assert undecayed == {name for name, p in trained.items() if p.ndim == 1}
        assert undecayed >= {*lambdas, "bn1.weight", "bn1.bias", "fc.bias"}
        assert not {"layer1.0.conv1.weight", "fc.weight"} & undecayed
