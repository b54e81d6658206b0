import pytest
import torch
from torch import Tensor, nn

from mrla.analysis.measure import count_macs, measure_throughput, single_device
from mrla.train import Machine


class Recorder(nn.Module):
    """Notes its name, mode and batch at every call."""

    def __init__(self, name: str, calls: list[tuple[str, bool, int]]):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.name, self.calls = name, calls

    def forward(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.calls.append((self.name, self.training, len(images)))
        return self.norm(images)


@pytest.mark.parametrize(
    ("model", "input_size", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 6), 8 * 3 * 9 * 10 * 6),
        (nn.Conv2d(3, 8, 3, stride=2), (3, 11, 7), 8 * 3 * 9 * 5 * 3),
        (nn.Conv2d(8, 12, 3, padding=1, groups=4), (8, 5, 5), 12 * 2 * 9 * 25),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 4, 4), 6 * 9 * 16),
        (nn.Linear(7, 5), (7,), 35),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), (3, 2, 2), 4 * 3 * 4),
    ],
    ids=["conv", "stride", "groups", "depthwise", "linear", "norms do not count"],
)
def test_macs_by_hand(model, input_size, expected):
    assert count_macs(model, input_size) == expected


def test_macs_in_another_dtype():
    assert count_macs(nn.Linear(7, 5).bfloat16(), (7,)) == 35


def frozen_norm() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    model[1].eval()
    return model


@pytest.mark.parametrize("use", ["macs", "throughput"])
def test_leaves_the_network_as_it_was(use):
    model = frozen_norm()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def measure(images: Tensor) -> None:
        if use == "macs":
            count_macs(model, images.shape[1:])
        else:
            measure_throughput({"model": model}, images, rounds=1)

    measure(torch.randn(2, 3, 4, 4))
    assert [module.training for module in model.modules()] == [True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        measure(torch.randn(2, 5, 4, 4))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_throughput_takes_turns():
    calls: list[tuple[str, bool, int]] = []
    models = {name: Recorder(name, calls).train() for name in ("plain", "light")}
    result = measure_throughput(models, torch.randn(4, 3, 2, 2), rounds=3, warmup=2)
    assert calls == [("plain", False, 4), ("light", False, 4)] * 5
    assert list(result) == ["plain", "light"]
    for rate in result.values():
        assert 0 < rate.p10 <= rate.median <= rate.p90
        assert (rate.rounds, rate.batch_size, rate.threads) == (3, 4, torch.get_num_threads())


def test_rates_are_images_by_seconds(monkeypatch):
    seconds = iter([9.0, 0.5, 0.25, 1.0])  # the first one warms up
    monkeypatch.setattr("mrla.analysis.measure._timed", lambda model, images: next(seconds))
    rate = measure_throughput({"model": nn.Identity()}, torch.ones(2, 1), rounds=3, warmup=1)["model"]
    assert rate.median == 4.0
    assert (rate.p10, rate.p90) == pytest.approx((2.4, 7.2))


@pytest.mark.parametrize(
    ("images", "rounds", "got"), [(0, 3, "0 images, 3 rounds"), (2, 0, "2 images, 0 rounds"), (2, -1, "-1 rounds")]
)
def test_nothing_to_time(images, rounds, got):
    with pytest.raises(ValueError, match=f"there must be images and rounds to time: got .*{got}"):
        measure_throughput({"model": nn.Identity()}, torch.ones(images, 3), rounds=rounds)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_no_cpu(accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"machine.accelerator={accelerator} needs a CUDA GPU: none is here"):
        single_device(Machine(accelerator=accelerator))
    assert single_device(Machine(accelerator="auto", threads=1)).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert single_device(Machine(accelerator=accelerator)).type == "cuda"
