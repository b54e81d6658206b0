"""What a compiler sees of an attached network: one graph, by torch's operators where the kernels do not apply."""

import pytest
import timm
import torch
from conftest import sweep_but

import mrla

pytestmark = pytest.mark.unchecked


@pytest.mark.parametrize("path", ["reference", "fused"])
@pytest.mark.parametrize("name", sweep_but(("test_resnet",), ("test_resnet", "test_vit", "test_convnext")))
@pytest.mark.parametrize("method", sweep_but(("light", "base"), ("light", "base", "exact")))
def test_an_attached_network_is_one_graph(method, name, path):
    """A GPU takes the reference path: no Python branch on data, so nothing that breaks its graph."""
    torch._dynamo.reset()
    size = 160 if name == "test_vit" else 64
    model = mrla.attach(timm.create_model(name), method, init="released")
    with mrla.ops.use(path):
        found = torch._dynamo.explain(model)(torch.randn(2, 3, size, size))
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    operators = {str(node.target) for graph in found.graphs for node in graph.graph.nodes if node.op == "call_function"}
    fused = {f"mrla.{method}.default", f"mrla.{method}"} & operators
    assert bool(fused) == (path == "fused" and name == "test_resnet" and method != "exact")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_benchmark_runs_on_a_gpu(tmp_path):
    arms = ("plain", "light", "base", "light+compiled")
    found = mrla.benchmark("resnet18_cifar", arms, device="cuda", rounds=2, batch_size=8, out=tmp_path / "bench")
    assert set(found.content["points"][0]["results"]) == set(arms)
