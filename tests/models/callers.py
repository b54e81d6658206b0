"""What other people do with the blocks of a network with mixers, each way with its proof.

`test_callers.py` runs all of them; ``python tests/models/callers.py --write`` runs them and writes the table in
``mrla/models/README.md``.
"""

import argparse
import contextlib
import copy
import functools
import io
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import mrla
from mrla.models import MixedBlock
from mrla.ops import LayerMixer

METHODS = ("light", "base", "exact", "dw")
# Narrow networks whose first chain has at least three blocks.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": functools.partial(
        timm.create_model, "resnet18", block_args={}, layers=(3, 1, 1, 1), channels=(8, 16, 16, 16), num_classes=5
    ),
    "vit": functools.partial(
        timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=24, num_classes=5
    ),
    "swin": functools.partial(
        timm.create_model,
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(4, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        drop_path_rate=0.0,
        num_classes=5,
    ),
    "convnext": functools.partial(
        timm.create_model, "convnext_atto", depths=(3, 1, 1, 1), dims=(8, 16, 16, 24), num_classes=5
    ),
}
CONTAINERS = {"resnet": "layer1", "vit": "blocks", "swin": "layers.0.blocks", "convnext": "stages.0.blocks"}


@dataclass
class Case:
    """One network with the mixers of one method, their weights random, and an image.

    Attributes:
        name: Of the network.
        method: Of the mixers.
        model: The network, in training mode without randomness.
        x: A batch of images.
        tokens: What goes into the first chain's container.
    """

    name: str
    method: str
    model: Any
    x: Tensor
    tokens: Tensor

    @property
    def has_memory(self) -> bool:
        """Whether mixers hand memory on."""
        return self.method in ("base", "exact")

    @property
    def container(self) -> Any:
        """What holds the first chain."""
        return self.model.get_submodule(CONTAINERS[self.name])

    @property
    def blocks(self) -> list[Any]:
        """Of the first chain."""
        return list(self.container.children())

    @property
    def block_class(self) -> type[nn.Module]:
        """The plain class of the blocks."""
        return self.blocks[0].plain_class

    @contextlib.contextmanager
    def refused_where_memory_is_lost(self, *words: str) -> Iterator[None]:
        """Expects one clear error of methods with memory, and none of others."""
        if not self.has_memory:
            yield
            return
        with refused(RuntimeError, CONTAINERS[self.name], *words):
            yield


@contextlib.contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    """Expects an error of one line that holds some words."""
    with pytest.raises(kind) as error:
        yield
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@functools.cache
def _made(name: str, method: str) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mrla.attach(NETWORKS[name](), method, init="released").train()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(("query_weight", "key_weight")):
                    parameter.mul_(0.1)
                elif parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        x = torch.randn(2, 3, 32, 32)
    entered: list[Tensor] = []
    handle = model.get_submodule(CONTAINERS[name]).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    copy.deepcopy(model)(x)
    model(x)
    handle.remove()
    return copy.deepcopy(model), x, entered[-1].detach()


def make(name: str, method: str) -> Case:
    """A case of its own, to be changed at will."""
    model, x, tokens = _made(name, method)
    return Case(name, method, copy.deepcopy(model), x, tokens.clone())


@dataclass(frozen=True)
class Caller:
    """A way of calling a network's blocks.

    Attributes:
        what: What people do.
        outcome: What happens then, for the table.
        prove: Raises unless it does.
        slow: Whether it compiles or exports.
    """

    what: str
    outcome: str
    prove: Callable[[Case], None]
    slow: bool = False


CALLERS: dict[str, Caller] = {}
REFUSED = "light, dw right; base, exact: one clear error"


def caller(what: str, outcome: str = "right", *, slow: bool = False) -> Callable[[Callable[[Case], None]], Any]:
    def add(prove: Callable[[Case], None]) -> Callable[[Case], None]:
        CALLERS[prove.__name__] = Caller(what, outcome, prove, slow)
        return prove

    return add


def run(model: Callable[..., Any], x: Tensor) -> Tensor:
    """The output for one batch, the first of several; statistics of norms stay as they were."""
    out = model(x)
    return out[0] if isinstance(out, (tuple, list)) else out


def gradients(model: Callable[..., Any], x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss in the input and the parameters, and the output."""
    x = x.clone().requires_grad_()
    for parameter in parameters.values():
        parameter.grad = None
    out = run(model, x * 1.0)
    out.square().sum().backward()
    none = torch.zeros(())
    found = {name: none if one.grad is None else one.grad.clone() for name, one in parameters.items()}
    return {**found, "input": none if x.grad is None else x.grad, "output": out.detach()}


def same(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Raises unless all numbers agree, relative to the largest."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            error = _difference(found[name], expected[name])
            assert error < tolerance, f"{name} differs by {error:.3g}"
        return
    error = _difference(found, expected)
    assert error < tolerance, f"differs by {error:.3g}"


def _difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, f"{tuple(found.shape)} for {tuple(expected.shape)}"
    return ((found - expected).abs().max() / (1e-3 + expected.abs().max())).item()


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def same_as_container(case: Case, call: Callable[[Tensor], Tensor]) -> None:
    """Output and gradients of the first chain, called in another way, are those of its container."""
    expected = gradients(case.container, case.tokens, parameters(case.container))
    same(gradients(call, case.tokens, parameters(case.container)), expected)


def same_as_network(case: Case, change: Callable[[Any], Any], names: Callable[[str], str] = lambda name: name) -> None:
    """Output and gradients of a network that `change` has changed are those of the network as it was."""
    twin = copy.deepcopy(case.model)
    expected = gradients(twin, case.x, parameters(twin))
    changed = change(case.model)
    found = gradients(changed, case.x, {names(name): one for name, one in changed.named_parameters()})
    same(found, expected)


def through(blocks: Any) -> Callable[[Tensor], Tensor]:
    """Blocks one after the other."""
    return lambda x: functools.reduce(lambda y, block: block(y), blocks, x)


# --- going over the blocks


@caller("a loop over `children()`, `_modules.values()`, the container itself; an index; a slice")
def blocks_one_by_one(case: Case) -> None:
    container = case.container
    same_as_container(case, through(container.children()))
    same_as_container(case, lambda x: through(container._modules.values())(x))
    same_as_container(case, lambda x: through(iter(container))(x))
    same_as_container(case, lambda x: through(container[at] for at in range(len(container)))(x))
    same_as_container(case, lambda x: container[2:](container[:2](x)))
    same_as_container(case, lambda x: through(getattr(container, str(at)) for at in range(len(container)))(x))


@caller("`nn.ModuleList` or `nn.Sequential` made of the blocks; `append`, `insert`, `del`")
def other_containers(case: Case) -> None:
    blocks = case.blocks
    same_as_container(case, nn.Sequential(*blocks))
    same_as_container(case, through(nn.ModuleList(blocks)))
    grown = nn.Sequential(*blocks[:1])
    for block in blocks[1:]:
        grown.append(block)
    grown.insert(1, nn.Identity())
    same_as_container(case, grown)
    del grown[1]
    same_as_container(case, grown)
    shorter = nn.Sequential(*blocks)
    del shorter[-1]
    same(run(shorter, case.tokens), run(through(blocks[:-1]), case.tokens))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@caller('`setattr(container, "0", Wrapper(block))`')
def wrapped_by_setattr(case: Case) -> None:
    def wrap(model: Any) -> Any:
        container = model.get_submodule(CONTAINERS[case.name])
        for name, block in list(container.named_children()):
            setattr(container, name, Wrapper(block))
        return model

    same_as_network(case, wrap, lambda name: name.replace(".inner", ""))


@caller("a block of the middle left out (LayerDrop)", "right: as `attach(..., without=[it])`")
def a_block_left_out(case: Case) -> None:
    path = f"{CONTAINERS[case.name]}.1"
    other = mrla.attach(NETWORKS[case.name](), case.method, without=[path], init="released").train()
    other.load_state_dict({key: case.model.state_dict()[key] for key in other.state_dict()})
    without = other.get_submodule(CONTAINERS[case.name])
    plain = nn.Sequential(*(block for at, block in enumerate(without.children()) if at != 1))
    kept = [block for at, block in enumerate(case.blocks) if at != 1]
    expected = gradients(plain, case.tokens, parameters(plain))
    found = gradients(through(kept), case.tokens, parameters(nn.Sequential(*kept)))
    same({**found}, dict(zip(found, expected.values(), strict=True)))


@caller("the block at a chain's head left out, or a block alone on a foreign tensor", REFUSED)
def the_head_left_out(case: Case) -> None:
    with case.refused_where_memory_is_lost("needs the memory of the blocks before it"):
        through(case.blocks[1:])(torch.randn_like(case.blocks[0](case.tokens)))
    with case.refused_where_memory_is_lost():
        case.blocks[2](torch.randn_like(case.blocks[0](case.tokens)))


@caller("`detach()`, `clone()`, `.data` or a copy between two blocks", REFUSED)
def a_new_tensor_between_blocks(case: Case) -> None:
    first, second, *_ = case.blocks
    tokens = case.tokens.clone().requires_grad_()
    for new in (Tensor.clone, Tensor.detach, lambda y: y.data, lambda y: y + 0, lambda y: y.detach().requires_grad_()):
        with case.refused_where_memory_is_lost("a new tensor was made"):
            second(new(first(tokens)))


@caller("operations in place between two blocks")
def in_place_between_blocks(case: Case) -> None:
    first, second, *_ = case.blocks
    with torch.no_grad():
        expected = second(first(case.tokens))
        same(second(first(case.tokens).add_(0.0)), expected)


class Twice(nn.Module):
    def __init__(self, network: Any, container: str):
        super().__init__()
        self.network = network
        blocks = network.get_submodule(container)
        parent = network.get_submodule(container.rpartition(".")[0])
        setattr(parent, container.rpartition(".")[2], nn.Sequential(blocks[0], blocks[1], blocks[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@caller("the same block twice in one forward pass", "refused by attach")
def a_block_twice(case: Case) -> None:
    network = Twice(mrla.detach(case.model), CONTAINERS[case.name])
    keys, classes = list(network.state_dict()), [type(module) for module in network.modules()]
    with refused(ValueError, f"{CONTAINERS[case.name]}.1 runs 2 times in one forward pass"):
        mrla.attach(network, case.method, example=(2, 3, 32, 32))
    assert list(network.state_dict()) == keys
    assert [type(module) for module in network.modules()] == classes


@caller("two networks that share blocks, with heads of their own")
def shared_blocks(case: Case) -> None:
    other = copy.copy(case.model)
    other._modules = dict(case.model._modules)
    expected = gradients(case.model, case.x, parameters(case.model))
    same(gradients(other, case.x, parameters(other)), expected)
    (run(case.model, case.x).sum() + run(other, case.x).sum()).backward()


# --- checkpointing


@caller("torch's `apply_activation_checkpointing`")
def activation_checkpointing(case: Case) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    def wrap(model: Any) -> Any:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, case.block_class))
        return model

    same_as_network(case, wrap, lambda name: name.replace("._checkpoint_wrapped_module", ""))


def _checkpointed(block: Callable[..., Any], reentrant: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(block, x, use_reentrant=reentrant)  # type: ignore[return-value]


@caller("`checkpoint(use_reentrant=False)` of a block, of the stage, one within the other")
def checkpoint_without_reentrance(case: Case) -> None:
    each = [_checkpointed(block, False) for block in case.blocks]
    same_as_container(case, through(each))
    same_as_container(case, _checkpointed(case.container, False))
    same_as_container(case, _checkpointed(through(each), False))


@caller("`checkpoint(use_reentrant=True)` of the stage")
def reentrant_checkpoint_of_the_stage(case: Case) -> None:
    same_as_container(case, _checkpointed(case.container, True))


@caller("`checkpoint(use_reentrant=True)` of single blocks", REFUSED + ", that says `use_reentrant=False`")
def reentrant_checkpoint_of_blocks(case: Case) -> None:
    each = [_checkpointed(block, True) for block in case.blocks]
    for blocks in (each, [each[0], *case.blocks[1:]]):
        with case.refused_where_memory_is_lost("use_reentrant=False"):
            same_as_container(case, through(blocks))


@caller("`checkpoint_sequential`, not reentrant")
def sequential_checkpoints(case: Case) -> None:
    same_as_container(case, lambda x: checkpoint_sequential(case.blocks, 2, x, use_reentrant=False))


@caller("`checkpoint_sequential(use_reentrant=True)`", REFUSED + ", that says `use_reentrant=False`")
def reentrant_sequential_checkpoints(case: Case) -> None:
    with case.refused_where_memory_is_lost("use_reentrant=False"):
        same_as_container(case, lambda x: checkpoint_sequential(case.blocks, 2, x, use_reentrant=True))


@caller("timm's `set_grad_checkpointing`")
def timms_checkpointing(case: Case) -> None:
    def switch(model: Any) -> Any:
        model.set_grad_checkpointing()
        return model

    same_as_network(case, switch)


@caller("`save_on_cpu` and other hooks on saved tensors")
def hooks_on_saved_tensors(case: Case) -> None:
    def call(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return case.container(x)

    same_as_container(case, call)


# --- several processes, devices, offloading


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of one."""
    if torch.distributed.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@caller("DDP with `static_graph`, with `find_unused_parameters`")
def distributed_data_parallel(case: Case) -> None:
    with one_process():
        for options in ({"static_graph": True}, {"find_unused_parameters": True}):
            one = make(case.name, case.method)
            same_as_network(
                one,
                lambda model, options=options: nn.parallel.DistributedDataParallel(model, **options),
                lambda name: name.removeprefix("module."),
            )


@caller("FSDP1 with auto-wrap by the block's class")
def fully_sharded_1(case: Case) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    twin = copy.deepcopy(case.model)
    expected = gradients(twin, case.x, {})
    with one_process(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(
            case.model, auto_wrap_policy=ModuleWrapPolicy({case.block_class}), device_id=torch.device("cpu")
        )
        same(gradients(wrapped, case.x, {}), expected)


@caller("FSDP2 `fully_shard` of every block, after attach and before")
def fully_sharded_2(case: Case) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = mrla.detach(copy.deepcopy(case.model))
    for before in (False, True):
        with one_process():
            mesh = init_device_mesh("cpu", (1,))
            model = copy.deepcopy(plain if before else case.model)
            for block in [module for module in model.modules() if isinstance(module, case.block_class)]:
                fully_shard(block, mesh=mesh)
            if before:
                mrla.attach(model, case.method, init="released")
            mixers = {path: one for path, one in model.named_modules() if isinstance(one, LayerMixer)}
            assert mixers.keys() == {path for path, one in case.model.named_modules() if isinstance(one, LayerMixer)}
            if before:
                for path, mixer in mixers.items():
                    mixer.load_state_dict(case.model.get_submodule(path).state_dict())
            twin = copy.deepcopy(case.model)
            same(gradients(model, case.x, {}), gradients(twin, case.x, {}))


@caller("DataParallel's replicas (`_replicate_for_data_parallel`)")
def data_parallel_replicas(case: Case) -> None:
    def replica_of(module: nn.Module) -> nn.Module:
        made: dict[nn.Module, nn.Module] = {one: one._replicate_for_data_parallel() for one in module.modules()}
        for one, replica in made.items():
            for name, child in one._modules.items():
                if child is not None:
                    setattr(replica, name, made[child])
            for name, parameter in one._parameters.items():
                setattr(replica, name, parameter)
            for name, buffer in one._buffers.items():
                setattr(replica, name, buffer)
        return made[module]

    replica = replica_of(copy.deepcopy(case.model).eval())
    same(run(replica, case.x), run(copy.deepcopy(case.model).eval(), case.x))


@caller("accelerate: `cpu_offload`, `dispatch_model`, hooks that move inputs")
def accelerated(case: Case) -> None:
    from accelerate import cpu_offload, dispatch_model
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = case.model.eval()
    with torch.no_grad():
        expected = run(model, case.x)
        same(run(cpu_offload(copy.deepcopy(model), execution_device="cpu"), case.x), expected)
        same(run(dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True), case.x), expected)
        hooked = copy.deepcopy(model)
        for module in hooked.modules():
            add_hook_to_module(module, ModelHook())
        same(run(hooked, case.x), expected)


@caller("a `forward` put on a block, its norm or its mixer by hand")
def patched_forwards(case: Case) -> None:
    model = case.model.eval()
    with torch.no_grad():
        expected = run(model, case.x)
        calls: list[str] = []
        patched = 0
        for path, module in list(model.named_modules()):
            if isinstance(module, (MixedBlock, LayerMixer, nn.BatchNorm2d, nn.LayerNorm)):
                own = module.forward

                def forward(*args: Any, own: Any = own, path: str = path, **kwargs: Any) -> Any:
                    calls.append(path)
                    return own(*args, **kwargs)

                module.forward = forward
                patched += 1
        same(run(model, case.x), expected)
        assert sorted(calls) == sorted(set(calls)), "called twice"
        assert len(calls) == patched


@caller("peft: LoRA with `modules_to_save` naming the mixers")
def lora(case: Case) -> None:
    from peft import LoraConfig, get_peft_model

    targets = {"resnet": "conv2", "vit": "qkv", "swin": "qkv", "convnext": "fc1"}
    config = LoraConfig(r=2, target_modules=[targets[case.name]], modules_to_save=["mrla"], init_lora_weights=True)
    model = case.model.eval()
    expected = run(model, case.x)
    tuned = get_peft_model(model, config)
    same(run(tuned, case.x), expected)
    run(tuned, case.x).square().sum().backward()
    mixers = {name: one for name, one in tuned.named_parameters() if "mrla.modules_to_save" in name}
    unused = {
        f"{path}.{name}"
        for path, one in tuned.named_modules()
        if isinstance(one, LayerMixer)
        for name in one.zero_grad_parameters()
    }
    assert mixers
    assert all(one.grad is not None for name, one in mixers.items() if name not in unused)


# --- graphs


@caller("`torch.compile(fullgraph=True)` of the network", slow=True)
def compiled(case: Case) -> None:
    torch._dynamo.reset()
    same_as_network(
        case,
        lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
        lambda name: name.removeprefix("_orig_mod."),
    )


@caller("`torch.compile` of every block by itself", slow=True)
def compiled_by_block(case: Case) -> None:
    torch._dynamo.reset()

    def compile_blocks(model: Any) -> Any:
        for block in [module for module in model.modules() if isinstance(module, MixedBlock)]:
            block.compile(fullgraph=True, backend="aot_eager")
        return model

    with torch._dynamo.config.patch(recompile_limit=64):
        same_as_network(case, compile_blocks)


@caller("`torch.export`, strict and not, and `torch.jit.trace`", slow=True)
def exported(case: Case) -> None:
    model, other = case.model.eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = run(model, other)
        for strict in (False, True):
            torch._dynamo.reset()
            program = torch.export.export(model, (case.x,), strict=strict)
            same(run(program.module(), other), expected)
        traced: Any = torch.jit.trace(model, case.x)
        same(run(traced, other), expected)


@caller("`torch.jit.script`", "refused: trace or export")
def scripted(case: Case) -> None:
    with refused(ValueError, "torch.jit.trace"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(case.model)


@caller("torch.fx: `symbolic_trace` of the network and of a block, graph modules pickled and traced again")
def traced_by_fx(case: Case) -> None:
    if case.name == "swin":
        return  # without mixers it does not trace either
    model = case.model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = run(model, case.x)
        graph = torch.fx.symbolic_trace(model)
        same(run(graph, case.x), expected)
        same(run(pickle.loads(pickle.dumps(graph)), case.x), expected)
        same(run(torch.fx.symbolic_trace(graph), case.x), expected)
        head = case.blocks[0]
        same(run(torch.fx.symbolic_trace(head), case.tokens), run(head, case.tokens))


@caller("torchvision's and timm's extractors: tensors at every node, stages and blocks within them", slow=True)
def extractors(case: Case) -> None:
    from timm.models._features import FeatureGetterNet
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model, stage = case.model.eval(), CONTAINERS[case.name]
    last = f"{stage}.{len(case.blocks) - 1}"
    outputs: dict[str, Tensor] = {}
    for path in (stage, last, f"{stage}.1"):
        model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: outputs.update({path: output}))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        final, maps = model.forward_intermediates(case.x)
        same(model.forward_head(final), run(model, case.x))
        assert all(isinstance(one, Tensor) for one in maps)
        for handle in [module for module in model.modules() if module._forward_hooks]:
            handle._forward_hooks.clear()
        if case.name in ("resnet",):
            found = IntermediateLayerGetter(model, {"layer1": "layer1"})(case.x)
            same(found["layer1"], outputs[stage])
        if case.name != "swin":
            paths = [stage, f"{stage}.1", last] if case.name != "vit" else [f"{stage}.1"]
            found = create_feature_extractor(model, paths)(case.x)
            for path in paths:
                same(found[path], outputs[path])
            names, _ = get_graph_node_names(model)
            blocks = [name for name in names if name.startswith(f"{stage}.1.")]
            found = create_feature_extractor(model, blocks)(case.x)
            assert all(isinstance(one, Tensor) for one in found.values() if not isinstance(one, (int, tuple)))
    wrapped = FeatureGetterNet(copy.deepcopy(model), out_indices=(0,))
    with torch.no_grad():
        _, (expected,) = model.forward_intermediates(case.x, indices=[0])
        same(wrapped(case.x)[0], expected)


@caller("`torch.func`: `functional_call`, `grad`, `vmap`, `jvp`")
def torch_func(case: Case) -> None:
    model = case.model.eval()
    state = {key: value.detach() for key, value in (*model.named_parameters(), *model.named_buffers())}

    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (x,))

    with torch.no_grad():
        expected = run(model, case.x)
        same(call(state, case.x), expected)
        each = torch.func.vmap(lambda x: call(state, x[None])[0])(case.x)
        same(each, expected)
    found = torch.func.grad(lambda x: call(state, x).square().sum())(case.x)
    same(found, gradients(model, case.x, {})["input"])
    if case.name == "vit":
        return  # torch's attention has no forward-mode derivative on a CPU
    model, x, direction = model.double(), case.x.double(), torch.randn_like(case.x).double()
    _, tangent, *_ = torch.func.jvp(model, (x,), (direction,))
    step = 1e-7
    with torch.no_grad():
        slope = (run(model, x + step * direction) - run(model, x - step * direction)) / (2 * step)
    same(tangent, slope)


# --- looking at it


@caller("forward and backward hooks on blocks: each once, with the block's own input and output")
def hooks_on_blocks(case: Case) -> None:
    seen: list[tuple[str, int]] = []
    expected = gradients(copy.deepcopy(case.model), case.x, {})
    for at, block in enumerate(case.blocks):
        block.register_forward_pre_hook(lambda _, args, at=at: seen.append(("before", at)))
        block.register_forward_hook(lambda _, args, output, at=at: seen.append(("after", at)))
        block.register_full_backward_pre_hook(lambda _, of_output, at=at: seen.append(("back before", at)))
        block.register_full_backward_hook(lambda _, of_input, of_output, at=at: seen.append(("back after", at)))
    same(gradients(case.model, case.x, {}), expected)
    assert sorted(seen) == sorted(set(seen))
    assert len(seen) == 4 * len(case.blocks)


@caller("forward hooks that replace a block's output by a new tensor")
def hooks_that_replace_outputs(case: Case) -> None:
    expected = gradients(copy.deepcopy(case.model), case.x, {})
    for block in case.blocks:
        block.register_forward_hook(lambda _, args, output: output * 1.0)
        block.register_forward_pre_hook(lambda _, args: (args[0] * 1.0, *args[1:]))
    same(gradients(case.model, case.x, {}), expected)


@caller("torchinfo's summary, captum's layer methods")
def summaries_and_attributions(case: Case) -> None:
    from captum.attr import LayerActivation, LayerGradCam, LayerGradientXActivation, LayerIntegratedGradients
    from torchinfo import summary

    model = case.model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = summary(copy.deepcopy(model), input_data=case.x, verbose=0)
        assert stats.total_params == sum(one.numel() for one in model.parameters())
        expected = run(model, case.x).detach()
        block = case.blocks[1]
        outputs: list[Tensor] = []
        handle = block.register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
        run(model, case.x)
        handle.remove()
        same(LayerActivation(model, block).attribute(case.x), outputs[0])
        for kind in (LayerGradientXActivation, LayerGradCam):
            assert torch.isfinite(kind(model, block).attribute(case.x, target=0)).all()
        whole = LayerIntegratedGradients(model, block).attribute(case.x, target=0, n_steps=2)
        assert torch.isfinite(whole).all()
        same(run(model, case.x).detach(), expected)


# --- copies and threads


@caller("`deepcopy`, pickle, `torch.save`, also of one block; what is carried is not saved with a tensor")
def copies(case: Case) -> None:
    model = case.model.eval()
    with torch.no_grad():
        expected = run(model, case.x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            same(run(one, case.x), expected, 1e-7)
            assert not any(isinstance(module, MixedBlock) for module in mrla.detach(one).modules())
        first, second, *_ = pickle.loads(pickle.dumps(case.blocks))
        out = first(case.tokens)
        same(second(out), case.blocks[1](case.blocks[0](case.tokens)), 1e-7)
        file = io.BytesIO()
        torch.save(out, file)
        size = file.tell()
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), out)
        assert size < 2 * out.numel() * 4 + 4000


@caller("threads")
def threads(case: Case) -> None:
    model = case.model.eval()
    images = [torch.randn(1, 3, 32, 32) for _ in range(6)]
    with torch.no_grad():
        expected = [run(model, x) for x in images]
        with ThreadPoolExecutor(3) as pool:
            found = pool.map(torch.no_grad()(functools.partial(run, model)), images)
            for one, other in zip(found, expected, strict=True):
                same(one, other)


@caller("two views of one network before one backward pass")
def two_views(case: Case) -> None:
    model, other = case.model.eval(), torch.randn(2, 3, 32, 32)
    expected = [gradients(model, x, parameters(model)) for x in (case.x, other)]
    found = gradients(lambda x: torch.cat([run(model, x), run(model, other)]), case.x, parameters(model))
    for name in parameters(model):
        same(found[name], expected[0][name] + expected[1][name])


# --- the table


def row(name: str) -> str:
    return f"| {CALLERS[name].what} | {CALLERS[name].outcome} |"


def table() -> str:
    """The rows of all callers."""
    return "\n".join(["| what is done | with mixers |", "|---|---|", *map(row, CALLERS)])


BEGIN, END = "<!-- callers -->", "<!-- /callers -->"
README = Path(__file__).parents[2] / "mrla" / "models" / "README.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into mrla/models/README.md")
    parser.add_argument("--only", default="", help="callers whose name holds this")
    options = parser.parse_args()
    failed = 0
    for name, one in CALLERS.items():
        if options.only not in name:
            continue
        wrong = []
        for network in NETWORKS:
            for method in METHODS:
                try:
                    one.prove(make(network, method))
                except Exception as error:
                    wrong.append(f"{network} {method}: {type(error).__name__} {' '.join(str(error).split())[:200]}")
        failed += bool(wrong)
        print(f"{'WRONG' if wrong else 'as said'}: {name}", *wrong, sep="\n    ", flush=True)
    if options.write and not failed and not options.only:
        text = README.read_text()
        before, rest = text.split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
    return int(failed > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
