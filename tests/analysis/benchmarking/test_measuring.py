"""What a benchmark measures, on quantities that do not depend on how fast the machine is."""

import copy
import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import mrla
from mrla.analysis.benchmarking import arms as benchmark_arms
from mrla.analysis.benchmarking import candidates as benchmark_candidates
from mrla.analysis.benchmarking.arms import NO_NUMBA, Arm, at_depth, build_network, calibrate_bn, read_arm
from mrla.analysis.benchmarking.blocks import block_at, longest_chain
from mrla.analysis.benchmarking.candidates import Work, classify, compiling, prepare
from mrla.analysis.benchmarking.measuring import _checked
from mrla.analysis.benchmarking.plots import draw_benchmark
from mrla.analysis.benchmarking.points import sweep_settings
from mrla.analysis.benchmarking.rounds import measure_memory, order, peak_bytes, saved_bytes, summarise, time_rounds
from mrla.analysis.benchmarking.tables import table, title
from mrla.deploy.formats import contract
from mrla.deploy.formats import onnx as onnx_format
from mrla.ops import LayerMixer


def small() -> nn.Module:
    return timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=5)


SHORT = {"image_size": 32, "batch_size": 2, "rounds": 2, "warmup": 1, "threads": 1}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> mrla.analysis.Benchmark:
    arms = ("plain", "light", "light+reference", "base", "plain+fused", "light+fused")
    out = tmp_path_factory.mktemp("bench")
    return mrla.benchmark(small(), arms, **{**SHORT, "rounds": 4}, out=out)


def test_json_holds_everything_and_is_what_is_returned(measured):
    content = json.loads((measured.folder / "bench.json").read_text())
    assert content == measured.content
    assert set(content) == {
        *("theme", "date", "hardware", "versions", "commit", "changed", "configuration", "notes", "note", "points"),
        "seconds",
    }
    assert content["date"].endswith("+00:00")
    assert content["hardware"]["threads"] == 1
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    configuration = content["configuration"]
    assert configuration["model"] == "ResNet"
    assert (configuration["batch_size"], configuration["image_size"], configuration["seed"]) == (2, 32, 0)
    assert configuration["optimizer"] == {"name": "SGD", "lr": 0.001, "momentum": 0.9}
    (point,) = content["points"]
    assert point["input_shape"] == [2, 3, 32, 32]
    assert {path.name for path in measured.folder.iterdir()} == {"bench.json", "bench.png", "bench.svg"}


def test_it_is_shown_in_a_few_words(measured):
    assert len(repr(measured)) < 500
    assert f"'light (inference, ratio)={measured.ratio('light'):.3f}"[1:].rstrip("0") in repr(measured)
    assert "ResNet" in measured._repr_html_()


def test_results_follow_from_the_raw_times(measured):
    (point,) = measured.content["points"]
    assert len(point["rounds"]) == 4
    for quantity in ("inference", "training"):
        for arm in ("light", "base"):
            seconds = sorted(times[quantity][arm] for times in point["rounds"])
            ratios = sorted(times[quantity][arm] / times[quantity]["plain"] for times in point["rounds"])
            entry = point["results"][arm][quantity]
            assert entry["ms"]["median"] == pytest.approx(500 * (seconds[1] + seconds[2]))
            assert entry["ratio"]["median"] == pytest.approx((ratios[1] + ratios[2]) / 2)
            assert entry["ratio"]["p10"] == pytest.approx(0.7 * ratios[0] + 0.3 * ratios[1])
            assert entry["ratio"]["p90"] == pytest.approx(0.7 * ratios[3] + 0.3 * ratios[2])
            assert entry["images_per_second"] == pytest.approx(2000 / entry["ms"]["median"])
            assert entry["n"] == 4
    assert point["results"]["plain"]["inference"]["ratio"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    assert measured.ratio("light") == point["results"]["light"]["inference"]["ratio"]["median"]


def test_raw_times_stand_in_the_order_in_which_they_were_taken(measured):
    rounds = measured.content["points"][0]["rounds"]
    arms = measured.content["configuration"]["arms"]
    assert [list(times["inference"]) for times in rounds] == [order(arms, number) for number in range(4)]
    trained = [arm for arm in arms if "fused" not in arm]
    assert [list(times["training"]) for times in rounds] == [order(trained, number) for number in range(4)]


def test_a_fused_arm_has_no_training_step(measured):
    results = measured.content["points"][0]["results"]
    assert results["plain+fused"]["training"] is None
    assert results["plain+fused"]["memory"]["saved_for_backward_mb"] is None
    assert results["plain+fused"]["memory"]["peak_inference_mb"] > 0
    assert measured.ratio("plain+fused", "training") is None
    headings, lines = table(measured.content)
    fused = dict(zip(headings, next(line for line in lines if line[0] == "light+fused"), strict=True))
    assert fused["step\n(ms)"] == fused["training\nratio"] == fused["kept\n(MB)"] == fused["step\npeak MB"] == "-"
    assert fused["images/s"] != "-"


def test_states_leave_the_outputs_as_they_are(measured):
    results = measured.content["points"][0]["results"]
    assert results["light"]["max_abs_difference"] is None
    assert 0 <= results["light+reference"]["max_abs_difference"] < 1e-4
    assert 0 < results["light+fused"]["max_abs_difference"] < 1e-4


def test_more_is_kept_with_mixers(measured):
    results = measured.content["points"][0]["results"]
    kept = {arm: entry["memory"]["saved_for_backward_mb"] for arm, entry in results.items()}
    assert kept["plain"] < kept["light"] < kept["light+reference"]
    assert kept["plain"] < kept["base"]
    ratio = results["base"]["memory"]["saved_for_backward_ratio"]
    assert ratio == pytest.approx(kept["base"] / kept["plain"])
    for arm in ("plain", "base"):
        assert results[arm]["memory"]["peak_training_mb"] > kept[arm]


def test_the_title_tells_the_setting(measured):
    assert title(measured.content) == "ResNet, 2x3x32x32, float32, contiguous, cpu, 1 thread, 4 rounds"


def test_a_caller_s_network_and_the_number_of_threads_are_left_as_they_were(tmp_path, monkeypatch):
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads, chosen = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    mrla.benchmark(model, ("plain", "light"), **{**SHORT, "threads": 5}, out=tmp_path)
    assert chosen == [5, threads]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_what_is_asked_for_is_measured(tmp_path):
    result = mrla.benchmark(small(), ("plain", "dw"), **SHORT, quantities=["inference"], out=tmp_path)
    entry = result.content["points"][0]["results"]["dw"]
    assert entry["training"] is None
    assert entry["memory"] is None
    assert list(result.content["points"][0]["rounds"][0]) == ["inference"]
    assert table(result.content)[0] == ["arm", "images/s", "inference\nratio"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_and_layout_reach_weights_and_images(dtype, layout, tmp_path, monkeypatch):
    seen = []

    def noted(arm, network, work, *, training):
        seen.append((next(network.parameters()), work.images))
        return prepare(arm, network, work, training=training)

    monkeypatch.setattr("mrla.analysis.benchmarking.points.prepare", noted)
    mrla.benchmark(small(), ("plain", "light"), **SHORT, dtype=dtype, memory_format=layout, out=tmp_path)
    assert len(seen) == 2
    for weight, images in seen:
        assert weight.dtype == images.dtype == getattr(torch, dtype)
        for tensor in (weight, images):
            assert tensor.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_progress_counts_rounds(tmp_path):
    told = []
    mrla.benchmark(small(), ["plain"], **SHORT, out=tmp_path, on_progress=lambda *numbers: told.append(numbers))
    assert told == [(1, 3), (2, 3), (3, 3)]


# Arms


@pytest.mark.parametrize("method", ["light", "base", "exact", "dw"])
def test_methods_share_the_plain_network_s_weights_and_hide_no_work(method):
    plain = build_network("plain", "resnet18_cifar")
    attached = build_network(method, "resnet18_cifar")
    own = attached.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in plain.state_dict().items())
    norms = [module for module in attached.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.weight.abs().min() >= 0.5 for norm in norms)
    image = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(plain.eval()(image), attached.eval()(image))
    for module in attached.modules():
        if isinstance(module, LayerMixer):
            scales = [p for name, p in module.named_parameters() if p.ndim == 1 and not name.endswith("bias")]
            assert scales
            assert all((scale >= 0.5).all() for scale in scales)


def test_the_same_network_is_built_each_time_and_the_global_random_state_is_kept():
    state = torch.get_rng_state()
    one, other = (build_network("light", "resnet18_cifar").state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_statistics_come_from_the_images_each_norm_sees():
    first, second = nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3)
    images = 5 + 2 * torch.randn(8, 3, 4, 4)
    network = calibrate_bn(nn.Sequential(first, second), images)
    assert torch.allclose(first.running_mean, 0.1 * images.mean((0, 2, 3)))
    expected = (images - first.running_mean[:, None, None]).square().mean((0, 2, 3))
    assert torch.allclose(first.running_var, expected)
    # What the second norm sees is normed by the first one's new statistics.
    assert torch.allclose(second.running_mean, 0.1 * first(images).mean((0, 2, 3)), atol=1e-5)
    assert not network.training
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("method", ["light", "base", "exact"])
def test_no_map_of_a_deep_network_runs_off(method):
    image = torch.randn(2, 3, 32, 32)
    network = calibrate_bn(build_network(method, "resnet101"), image)
    assert 1e-3 < network(image).abs().max() < 1e3
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.running_mean.abs().max() > 0 for norm in norms)  # every one of them, the mixers' too


@pytest.mark.parametrize("name", ["resnet18_cifar_mrla_base", "torchvision/resnet18"])
def test_a_named_network_is_what_its_name_says(name):
    network = build_network(name, "never built")
    mixers = [module for module in network.modules() if isinstance(module, mrla.ops.MRLABase)]
    assert len(mixers) == (8 if "mrla" in name else 0)
    assert all(scale.min() >= 0.5 for mixer in mixers for scale in (mixer.norm.weight,))
    assert build_network("resnet18_cifar_mrla_base", "never built", in_chans=1).conv1.in_channels == 1


@pytest.mark.parametrize(
    ("text", "network", "states", "trains"),
    [
        ("plain", "plain", (), True),
        ("exact+reference", "exact", ("reference",), True),
        ("light+fused", "light", ("fused",), False),
        ("resnet50_mrla_light+compiled", "resnet50_mrla_light", ("compiled",), True),
        ("torchvision/resnet18+fused+compiled", "torchvision/resnet18", ("fused", "compiled"), False),
        ("resnet50.a1_in1k", "resnet50.a1_in1k", (), True),
    ],
)
def test_arms_are_read(text, network, states, trains):
    arm = read_arm(text)
    assert (arm.name, arm.network, arm.states, arm.trains) == (text, network, states, trains)


def test_a_folder_s_name_may_hold_a_plus(tmp_path):
    folder = mrla.save(small(), tmp_path / "a+b")
    assert read_arm(str(folder)) == Arm(str(folder), str(folder))
    network = build_network(str(folder), "never built")
    assert network.num_classes == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lihgt", "a network must be plain, light, .*got 'lihgt'; did you mean 'light'"),
        ("resnt50", "got 'resnt50'; did you mean 'resnet50'"),
        ("torchvision/resnt50", "torchvision/resnt50 cannot be built"),
        ("light+fusd", r"states must be of .*got 'fusd' in 'light\+fusd'; did you mean 'fused'"),
        ("light+fused+fused", "states of an arm must differ"),
        ("light+compiled+onnx", "runs in one engine"),
    ],
)
def test_unknown_arms_are_refused(text, message, monkeypatch):
    monkeypatch.setattr(contract, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=message):
        read_arm(text)


@pytest.mark.parametrize(
    ("text", "missing", "message"),
    [
        ("light+onnx", {"onnxruntime"}, r"'onnx' needs onnxruntime, not installed here; pip install 'mrla\[export\]'$"),
        ("light+onnx", {"onnx", "onnxscript"}, r"needs onnx, onnxscript, not"),
        ("plain+openvino", {"openvino"}, r"needs openvino, not installed here; pip install 'mrla\[openvino\]'$"),
    ],
)
def test_a_missing_package_is_said_with_its_remedy(text, missing, message, monkeypatch):
    monkeypatch.setattr(contract, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(ValueError, match=message):
        read_arm(text)


@pytest.mark.parametrize(
    ("arms", "told"), [(("plain", "light"), True), (("plain", "dw"), False), (("plain", "base+reference"), False)]
)
def test_a_missing_numba_is_told_in_one_line(arms, told, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_arms, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    result = mrla.benchmark(small(), arms, **SHORT, quantities=["inference"], out=tmp_path)
    assert result.content["notes"] == ([NO_NUMBA] if told else [])


def test_the_reference_state_runs_on_the_reference_path():
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(mrla.ops.chosen_path())
            return images.flatten(1) * self.weight

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    work = Work(images=torch.randn(2, 1, 2, 2), objective=classify(torch.tensor([0, 1])), threads=1)
    candidate = prepare(Arm("x+reference", "x", ("reference",)), Spy(), work, training=True)
    assert seen == [mrla.ops.chosen_path(), "reference", "reference"]  # what it must agree with, itself, and a step
    seen.clear()
    for action in (candidate.infer, candidate.forward, candidate.step):
        assert action is not None
        action()
    assert seen == ["reference"] * 3


def test_a_state_that_changes_the_outputs_is_refused(monkeypatch):
    def wrong(model, example=None):  # in place: the check must not look at what it was given
        with torch.no_grad():
            model.fc.bias.add_(0.1)
        return model

    monkeypatch.setattr(mrla, "fuse", wrong, raising=False)
    work = Work(images=torch.randn(2, 3, 32, 32), objective=classify(torch.tensor([0, 1])), threads=1)
    with pytest.raises(ValueError, match=r"x\+fused must compute what x does: outputs differ by up to 0\.1"):
        prepare(Arm("x+fused", "x", ("fused",)), calibrate_bn(small(), work.images), work, training=False)


class Broken(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(3, 2)

    def forward(self, images):
        logits = self.layer(images.mean((2, 3)))
        return {"nan": logits * math.nan, "map": logits[..., None], "tuple": (logits, logits)}[self.how]


@pytest.mark.parametrize(
    ("how", "message"),
    [("nan", "outputs are not finite"), ("map", r"logits \(b, classes\)"), ("tuple", "must be one tensor: got tuple")],
)
def test_an_arm_that_does_not_run_is_named(how, message):
    work = Work(images=torch.randn(2, 3, 4, 4), objective=classify(torch.tensor([0, 1])), threads=1)
    with pytest.raises(ValueError, match=rf"the arm x does not run on 2x3x4x4 images of torch.float32.*{message}"):
        prepare(Arm("x", "x"), Broken(how), work, training=True)


def test_a_training_step_learns_and_inference_does_not_see_it():
    work = Work(images=torch.randn(4, 3, 8, 8), objective=classify(torch.tensor([0, 1, 2, 3])), threads=1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    candidate = prepare(Arm("x", "x"), network, work, training=True)
    assert candidate.step is not None
    before, first = candidate.infer(), candidate.step()
    last = [candidate.step() for _ in range(50)][-1]
    assert last < first
    assert torch.equal(candidate.infer(), before)
    assert all(tensor.grad is None for tensor in candidate.tensors)


@pytest.mark.sweep
def test_a_compiled_arm_computes_the_same(tmp_path):
    result = mrla.benchmark(small(), ("plain", "plain+compiled"), **{**SHORT, "rounds": 1}, out=tmp_path)
    entry = result.content["points"][0]["results"]["plain+compiled"]
    assert 0 <= entry["max_abs_difference"] < 1e-3
    assert entry["training"]["n"] == 1
    assert entry["memory"]["saved_for_backward_mb"] > 0


def test_compiled_arms_leave_torch_s_settings_and_a_caller_s_compiled_functions_alone(monkeypatch):
    import torch._dynamo

    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    limit = 8  # torch's own; whatever ran before in this process may have left another
    with torch._dynamo.config.patch(recompile_limit=limit):  # monkeypatch would delete it afterwards
        with compiling([Arm("plain", "plain"), Arm("light+fused", "light", ("fused",))]):
            assert torch._dynamo.config.recompile_limit == limit
        assert resets == []
        with compiling([Arm("plain+compiled", "plain", ("compiled",))]):
            assert torch._dynamo.config.recompile_limit > limit
        assert (torch._dynamo.config.recompile_limit, resets) == (limit, [1])


class StandInRuntime:
    """ONNX Runtime as far as it is used, on the network itself."""

    def __init__(self, network, error=0.0):
        self.network, self.error, self.options = network, error, []

    def SessionOptions(self):
        return SimpleNamespace()

    def InferenceSession(self, path, options, providers):
        assert providers == ["CPUExecutionProvider"]
        self.options.append(options)
        return self

    def get_inputs(self):
        return [SimpleNamespace(name="images")]

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map={})

    def run(self, outputs, feed):
        with torch.no_grad():
            return [self.network(torch.from_numpy(feed["images"])).numpy() + self.error]


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_an_onnx_arm_has_the_threads_of_the_others_and_must_agree_with_them(error, monkeypatch):
    work = Work(images=torch.randn(2, 3, 32, 32), objective=classify(torch.tensor([0, 1])), threads=3)
    network = calibrate_bn(small(), work.images)
    runtime = StandInRuntime(copy.deepcopy(network).eval(), error)
    monkeypatch.setattr(onnx_format, "import_module", lambda name: runtime)
    written = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=Path.touch)
    monkeypatch.setattr(torch.onnx, "export", lambda program, **options: written)
    arm = Arm("x+onnx", "x", ("onnx",))
    if error:
        with pytest.raises(ValueError, match=r"x\+onnx must compute what x does: outputs differ by up to 1 "):
            prepare(arm, network, work, training=True)
        return
    candidate = prepare(arm, network, work, training=True)
    assert candidate.step is None
    assert candidate.difference == 0
    assert [options.intra_op_num_threads for options in runtime.options] == [3]
    assert measure_memory(candidate, torch.device("cpu")) == dict.fromkeys(
        ("saved_for_backward", "peak_inference", "peak_training")
    )


# Rounds and memory


def test_order_is_fair():
    names = ["a", "b", "c"]
    rounds = [order(names, number) for number in range(6)]
    for name in names:
        assert sorted(turn.index(name) for turn in rounds) == [0, 0, 1, 1, 2, 2]
    assert [order(["a", "b"], number) for number in range(4)] == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]


def test_rounds_run_every_arm_once_for_each_quantity_and_leave_out_the_warm_up():
    calls = []

    def candidate(name, trains=True):
        return benchmark_candidates.Candidate(
            arm=Arm(name, name),
            infer=lambda: calls.append((name, "infer")),
            forward=None,
            step=(lambda: calls.append((name, "step"))) if trains else None,
            tensors=(),
            parameters=0,
            difference=None,
        )

    candidates = {"a": candidate("a"), "b": candidate("b", trains=False)}
    rounds = time_rounds(candidates, ["inference", "training"], torch.device("cpu"), rounds=2, warmup=1)
    assert len(rounds) == 2
    assert sorted(calls) == [("a", "infer")] * 3 + [("a", "step")] * 3 + [("b", "infer")] * 3
    assert [list(times) for times in rounds] == [["inference", "training"]] * 2
    results = summarise(candidates, [{"inference": {"b": 3.0, "a": 2.0}}, {"inference": {"a": 2.0, "b": 5.0}}], {}, 8)
    assert results["b"]["inference"]["ratio"]["median"] == 2.0
    assert results["b"]["inference"]["images_per_second"] == 2.0
    assert results["b"]["training"] is None


def test_bytes_kept_for_backward_by_hand():
    layer = nn.Conv2d(2, 3, 1, bias=False)
    image = torch.randn(4, 2, 5, 5)
    # The convolution keeps its input, the two exponentials one output each; the weight is there anyway.
    assert saved_bytes(lambda: layer(image).exp().exp(), layer.parameters()) == 4 * 4 * 25 * (2 + 3 + 3)
    assert saved_bytes(lambda: layer(image).exp().exp()) == 4 * (4 * 25 * (2 + 3 + 3) + 6)
    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: x[:5] * x[5:]) == 40  # two views, one storage


def test_peak_by_hand():
    def action():
        first = torch.empty(1000)
        second = torch.empty(2000)
        del first
        third = torch.empty(500)
        return second, third

    assert peak_bytes(action, torch.device("cpu")) == 4 * 3000
    held = torch.empty(1000)
    assert peak_bytes(lambda: held.add_(1), torch.device("cpu")) < 100


# Sweeps


def points_of(tmp_path, **options):
    result = mrla.benchmark(small(), ("plain", "light"), **{**SHORT, "rounds": 1, **options}, out=tmp_path)
    return result.content["points"], result


def test_sweep_over_batches(tmp_path):
    points, result = points_of(tmp_path, sweep="batch", values=[4, 2])
    assert [(point["value"], point["input_shape"][0]) for point in points] == [(4, 4), (2, 2)]
    assert result.content["configuration"]["values"] == [4, 2]
    kept = [point["results"]["plain"]["memory"]["saved_for_backward_mb"] for point in points]
    assert kept[0] == pytest.approx(2 * kept[1], rel=0.02)
    headings, lines = table(result.content)
    assert headings[:2] == ["batch", "arm"]
    assert [line[:2] for line in lines] == [["4", "plain"], ["4", "light"], ["2", "plain"], ["2", "light"]]
    assert title(result.content).startswith("ResNet, images 3x32x32, float32")
    assert (tmp_path / "bench.svg").is_file()


def test_sweep_over_sizes(tmp_path):
    points, _ = points_of(tmp_path, sweep="resolution", values=[32, 64], quantities=["inference"])
    assert [point["input_shape"] for point in points] == [[2, 3, 32, 32], [2, 3, 64, 64]]


def test_sweep_over_depth_renames_model_and_arms():
    given = {**SHORT, "model": "resnet18_cifar", "arms": ["plain", "resnet18_cifar_mrla_light"], "device": "cpu"}
    setting = _checked(**given, quantities=["inference"], in_chans=None, dtype="float32", memory_format="contiguous")
    swept = sweep_settings(setting, "depth", [18, 50])
    assert [(value, each.model) for value, each in swept] == [(18, "resnet18_cifar"), (50, "resnet50_cifar")]
    assert [each.arms[1].network for _, each in swept] == ["resnet18_cifar_mrla_light", "resnet50_cifar_mrla_light"]
    assert {each.arms[1].name for _, each in swept} == {"resnet*_cifar_mrla_light"}
    with pytest.raises(ValueError, match=r"needs a ResNet by name.*got 'convnext_atto'"):
        at_depth("convnext_atto", 18)
    with pytest.raises(ValueError, match="got 'resnet20_cifar_mrla_light'; did you mean 'resnet50_cifar_mrla_light'"):
        sweep_settings(setting, "depth", [20])


def test_sweep_over_blocks(tmp_path):
    result = mrla.benchmark(
        small(), ("plain", "light", "base+reference"), **SHORT, sweep="blocks", values=[1, 3], out=tmp_path
    )
    points = result.content["points"]
    assert {point["block"] for point in points} == {"layer1.1"}
    assert points[0]["input_shape"] == [2, 8, 8, 8]
    assert all(point["results"]["base+reference"]["training"]["n"] == 2 for point in points)
    assert title(result.content).startswith("ResNet, layer1.1, 2x8x8x8, ")


@pytest.mark.parametrize("method", ["base", "exact"])
def test_a_block_hears_as_many_blocks_as_stand_before_it_and_its_gradient_reaches_them(method):
    plain = small()
    chain, name = longest_chain(plain, (2, 3, 32, 32))
    x = torch.randn(2, *chain.shape[1:])
    for position in (1, 4):
        block = block_at(small(), chain, name, method, position, x, seed=0).train()
        maps = [tensor for tensor in block.buffers(recurse=False) if tensor.ndim == 4]
        assert len(maps) == position - 1
        fed = []
        block._fed = lambda tensor, fed=fed: fed.append(tensor.detach().requires_grad_()) or fed[-1]
        block(x).sum().backward()
        assert all(tensor.grad is not None for tensor in fed)
        assert len(fed) >= position
    before = block.eval()(x)
    block.memory0.mul_(2)
    assert not torch.equal(block(x), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arms": []}, ValueError, "arms must be one or more different names: got none"),
        ({"arms": "plain,light"}, TypeError, "arms must be a sequence of names"),
        ({"arms": ["plain", "plain"]}, ValueError, "different names: got plain, plain"),
        ({"model": 3}, TypeError, "model must be a network's name or a network: got int"),
        ({"model": "resnt18"}, ValueError, "did you mean 'resnet18'"),
        ({"model": "resnet18_cifar_mrla_light"}, ValueError, "model must be a plain network"),
        ({"rounds": 0}, ValueError, "rounds must be from 1 to 1048576: got 0"),
        ({"rounds": 2.5}, TypeError, "rounds must be a whole number: got 2.5"),
        ({"warmup": -1}, ValueError, "warmup must be from 0 to 1048576: got -1"),
        ({"batch_size": 0}, ValueError, "batch_size must be from 1 to 1048576: got 0"),
        ({"threads": 0}, ValueError, "threads must be from 1 to 1024: got 0"),
        ({"threads": 10**400}, ValueError, "threads must be from 1 to 1024: got 1000"),
        ({"image_size": True}, TypeError, "image_size must be a whole number"),
        ({"in_chans": 4, "model": "torchvision/resnet18"}, ValueError, "in_chans must be the 3 channels"),
        ({"dtype": "float23"}, ValueError, "dtype must be one of .*got 'float23'; did you mean 'float32'"),
        ({"memory_format": "nhwc"}, ValueError, "memory_format must be one of contiguous, channels_last"),
        ({"device": "gpu"}, ValueError, "device must be one of cpu, cuda: got 'gpu'"),
        ({"device": "cpu:3"}, ValueError, "device must be one of cpu, cuda: got 'cpu:3'"),
        ({"device": "cuda:x"}, ValueError, "device must be cpu, cuda or cuda:NUMBER"),
        ({"device": "cuda:99"}, ValueError, "device must be one that torch sees: got 'cuda:99'.*take device cpu"),
        ({"quantities": ["speed"]}, ValueError, "quantities must be one of inference, training, memory"),
        ({"quantities": []}, ValueError, "quantities must be one or more"),
        ({"quantities": ["training"], "arms": ["plain+fused", "light"]}, ValueError, "has no training step"),
        ({"values": [1]}, ValueError, r"values are those of a sweep: got \[1\] and no sweep"),
        ({"sweep": "dept"}, ValueError, "sweep must be one of .*did you mean 'depth'"),
        ({"sweep": "batch", "values": []}, ValueError, "values must be different positive numbers: got none"),
        ({"sweep": "batch", "values": [2, 2]}, ValueError, "values must be different positive numbers: got 2, 2"),
        ({"sweep": "batch", "values": [0]}, ValueError, "values must be from 1 to 1048576: got 0"),
        ({"sweep": "batch", "values": ["x"]}, TypeError, "values must be a whole number: got 'x'"),
        ({"sweep": "blocks", "arms": ["plain", "light+fused"]}, ValueError, r"got 'light\+fused'; leave it out"),
        ({"sweep": "depth", "model": nn.Identity()}, ValueError, "got a Identity of your own"),
        ({"model": "vit_tiny_patch16_224", "arms": ["plain"]}, ValueError, "the arm plain does not run on 3x32x32"),
    ],
)
def test_refused_with_rule_and_remedy_and_nothing_written(options, error, message, tmp_path):
    given = {"model": "resnet18_cifar", "arms": ("plain", "light"), **SHORT, **options}
    with pytest.raises(error, match=message):
        mrla.benchmark(given.pop("model"), given.pop("arms"), **given, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_measuring(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="the output folder must be writable"):
        mrla.benchmark(small(), ["plain"], **SHORT, out=tmp_path / "file" / "out")


def test_pictures_of_equal_numbers_are_equal(measured, tmp_path):
    (_, svg), (_, again) = (draw_benchmark(measured.content, tmp_path / name) for name in ("one", "two"))
    assert svg.read_bytes() == again.read_bytes()
    text = svg.read_text()
    for label in ("inference, relative to plain", "training step, relative to plain", "light+reference"):
        assert f"<!-- {label} -->" in text
