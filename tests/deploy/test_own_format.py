"""A format of one's own, in this file alone, is known to every function and command that reads or writes formats."""

import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import ExportedProgram

import mrla
from mrla.analysis.evaluation.prediction import predict
from mrla.analysis.evaluation.scoring import evaluate_checkpoint
from mrla.cli import main
from mrla.data.sources import Digits
from mrla.deploy import (
    ExportFormat,
    ExportMismatch,
    Facts,
    Opened,
    check_export,
    export,
    format_of,
    open_exported,
    register_format,
)
from mrla.deploy.formats import FORMATS
from mrla.train import Machine

CPU = Machine(accelerator="cpu", threads=1)


class ArraysFormat(ExportFormat):
    """Weights as numpy's arrays, and the graph as text: a list of torch's operators with the names of their inputs."""

    name = "arrays"
    suffix = ".arrays.npz"

    def __init__(self, scale: float = 1.0):
        self.scale = scale  # an option of the format, as a calibration would be

    def write(self, program: ExportedProgram, path: Path, facts: Facts) -> None:
        signature = program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        state: dict[str, Any] = {**program.state_dict, **program.constants}
        arrays = {name: state[key].detach().numpy() for name, key in held.items()}
        (last,) = signature.user_outputs
        nodes = [
            [node.name, _operator(node.target), _names(node.args), _names(dict(node.kwargs))]
            for node in program.graph.nodes
            if node.op == "call_function"
        ]
        (given,) = signature.user_inputs
        graph = json.dumps({"given": given, "nodes": nodes, "last": last, "scale": self.scale})
        texts = {"graph": np.array(graph), "facts": np.array(facts.to_json())}
        with path.open("wb") as file:
            np.savez(file, **texts, **{f"weight {name}": value for name, value in arrays.items()})

    def open(self, path: Path, *, threads: int, dtype: torch.dtype = torch.float32) -> Opened:
        with np.load(path, allow_pickle=False) as content:
            weights = {
                name.removeprefix("weight "): torch.from_numpy(content[name])
                for name in content.files
                if name.startswith("weight ")
            }
            return Opened(str(content["facts"]), (json.loads(str(content["graph"])), weights))

    def values(self, session: Any, images: Tensor) -> list[Tensor]:
        graph, weights = session
        known: dict[str, Any] = {**weights, graph["given"]: images}
        with torch.inference_mode():
            for name, target, args, kwargs in graph["nodes"]:
                call = operator.getitem if target == "getitem" else operator.attrgetter(target)(torch.ops)
                known[name] = call(*_known(args, known), **_known(kwargs, known))
        return [known[graph["last"]] * graph["scale"]]


def _operator(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target)


def _names(value: Any) -> Any:
    """Arguments as JSON: a node by its name, a dtype or layout by torch's."""
    if isinstance(value, torch.fx.Node):
        return {"node": value.name}
    if isinstance(value, (torch.dtype, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_names(one) for one in value]
    return {key: _names(one) for key, one in value.items()} if isinstance(value, dict) else value


def _known(value: Any, known: dict[str, Any]) -> Any:
    if isinstance(value, dict) and set(value) == {"node"}:
        return known[value["node"]]
    if isinstance(value, dict) and set(value) == {"torch"}:
        return getattr(torch, value["torch"])
    if isinstance(value, list):
        return [_known(one, known) for one in value]
    return {key: _known(one, known) for key, one in value.items()} if isinstance(value, dict) else value


@pytest.fixture
def registered():
    """The format, known for the length of a test."""
    register_format(ArraysFormat)
    yield
    del FORMATS[ArraysFormat.name]


def network() -> nn.Module:
    torch.manual_seed(0)
    options = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 10, "in_chans": 1}
    return timm.create_model("resnet18_cifar_mrla_light", **options).eval()


@pytest.mark.usefixtures("registered")
def test_it_exports_verifies_predicts_and_evaluates(tmp_path):
    model, path = network(), tmp_path / "net.arrays.npz"
    facts = {"class_names": [str(digit) for digit in range(10)], "mean": (0.5,), "std": (0.25,)}
    made = mrla.export(model, path, format="arrays", input_size=(1, 16, 16), dynamic_size=False, **facts)
    assert (made.format, made.facts.dynamic, made.bound) == ("arrays", ("batch",), 1e-4)
    assert made.difference < 1e-5

    compared = check_export(path, model)
    assert [one.shape for one in compared] == [(1, 1, 16, 16), (2, 1, 16, 16), (3, 1, 16, 16)]
    images = torch.randn(4, 1, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(open_exported(path)(images), model(images), rtol=1e-4, atol=1e-5)

    Image.fromarray((np.random.default_rng(0).random((20, 20)) * 255).astype("uint8")).save(tmp_path / "one.png")
    (entry,) = predict(path, [tmp_path / "one.png"], tmp_path / "drawn", machine=CPU)
    assert set(entry["names"]) <= set(facts["class_names"])

    mrla.save(model, tmp_path / "saved", input_size=(1, 16, 16), **facts)
    of_file = evaluate_checkpoint(path, data=Digits(), batch_size=256, machine=CPU)
    of_network = evaluate_checkpoint(tmp_path / "saved", data=Digits(), batch_size=256, machine=CPU)
    for name in ("accuracy", "loss", "images"):
        assert of_file[name] == pytest.approx(of_network[name], rel=1e-4)
    assert "parameters" in of_network
    assert "parameters" not in of_file


@pytest.mark.usefixtures("registered")
def test_the_benchmark_runs_it(tmp_path):
    options: dict[str, Any] = {"image_size": 32, "batch_size": 2, "rounds": 1, "warmup": 0, "threads": 1}
    arms = ["plain", "plain+arrays", "plain+openvino", "plain+torch_export"]
    result = mrla.benchmark("test_resnet", arms, quantities=["inference"], out=tmp_path / "bench", **options)
    differences = [arm["max_abs_difference"] for arm in list(result.content["points"][0]["results"].values())]
    assert differences[0] is None
    assert all(difference < 1e-5 for difference in differences[1:])
    with pytest.raises(ValueError, match=r"one engine: got 'plain\+arrays\+onnx'; make arrays and onnx arms of"):
        mrla.benchmark("test_resnet", ["plain", "plain+arrays+onnx"], out=tmp_path / "bench", **options)


@pytest.mark.usefixtures("registered")
def test_the_command_line_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mrla.save(network(), tmp_path / "saved", input_size=(1, 16, 16), class_names=list("0123456789"))
    assert main(["export", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "One of onnx, torch_export, openvino, arrays" in said
    assert ".xml or .arrays.npz" in said
    assert main(["export", "saved", "--format", "arrays", "--dynamic_size", "false"]) == 0
    assert "saved.arrays.npz: arrays, against the network" in " ".join(capsys.readouterr().out.split())
    assert main(["eval", "saved.arrays.npz", "--data.kind", "digits", "--machine.accelerator", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert "parameters" not in said
    assert main(["bench", "--help"]) == 0
    assert "openvino, arrays" in " ".join(capsys.readouterr().out.split())
    assert main(["explain", "saved.arrays.npz"]) == 2
    assert "is an exported file, which mrla eval and mrla predict take" in capsys.readouterr().err


@pytest.mark.usefixtures("registered")
def test_it_may_be_made_with_arguments_and_what_differs_is_caught(tmp_path):
    path = tmp_path / "net.arrays.npz"
    with pytest.raises(ExportMismatch, match=r"not looked for in files of arrays; the same export with format='onnx'"):
        export(network(), path, format=ArraysFormat(scale=1.5), input_size=(1, 16, 16), dynamic_size=False)
    assert [file.name for file in tmp_path.iterdir()] == ["net.arrays.npz.failed"]


def test_a_name_or_suffix_that_is_taken_names_its_holder():
    def named(name: str, suffix: str) -> type[ExportFormat]:
        return type("Another", (ArraysFormat,), {"name": name, "suffix": suffix})

    before = dict(FORMATS)
    with pytest.raises(ValueError, match=r"'onnx' is that of OnnxFormat in .*formats/onnx\.py; .* for Another in .*py"):
        register_format(named("onnx", ".another"))
    with pytest.raises(ValueError, match=r"suffix of their own: '\.pt2' is that of TorchExportFormat in .*export\.py"):
        register_format(named("another", ".pt2"))
    with pytest.raises(ValueError, match=r"must begin with a dot, such as '\.onnx': Another in .* has 'npz'"):
        register_format(named("another", "npz"))
    with pytest.raises(ValueError, match="must have a name"):
        register_format(named("", ".another"))
    with pytest.raises(TypeError, match=r"must have open, values, write: ExportFormat has not"):
        register_format(ExportFormat)
    with pytest.raises(TypeError, match=r"a subclass of mrla\.deploy\.formats\.ExportFormat: got <class 'str'>"):
        register_format(str)  # type: ignore[type-var]
    assert before == FORMATS


@pytest.mark.usefixtures("registered")
def test_of_two_suffixes_the_longer_one_tells():
    class Short(ArraysFormat):
        name, suffix = "short", ".npz"

    register_format(Short)
    try:
        assert format_of("a.arrays.npz") is ArraysFormat
        assert format_of("a.npz") is Short
        assert format_of(".npz") is None
        assert format_of("a.pt2.zip") is None
    finally:
        del FORMATS["short"]
