"""Which of timm's families, and which of torchvision's builders, keep the promises of `mrla.attach`.

    python benchmarks/attach_coverage.py [--families vit* ...] [--out benchmarks/results/NAME.json]

For one small network of each family: its chains, the seconds that finding them takes, and for each method what became
of each promise, `"kept"` or what happened instead:

- `eval`, `train`: the network says the same bit for bit, and its running statistics move alike;
- `bfloat16`: likewise, in both modes, for a network in bfloat16;
- `gradients`: every new parameter has a gradient within two steps, but those that the mixer says are silent;
- `checkpoint`: old keys keep names and order, a plain checkpoint loads, and only `*.mrla.*` is missing;
- `detach`: a second `attach` is refused, and `detach` gives the original back bit for bit.

Parameters that start at zero or one are random first, and so are running statistics: a zero would hide a mistake.
`tests/models/test_invariants.py` asks all of this of every network.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models._registry import _module_to_models
from torch import Tensor, nn

import mrla
from mrla.models import NAMED, find_chains
from mrla.ops import LayerMixer

METHODS = ("light", "base", "exact")
PROMISES = ("eval", "train", "bfloat16", "gradients", "checkpoint", "detach")
# The smallest of each family by parameters, but where its stages hold one block each, or it is very slow (HaloNet).
SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "botnet26t_256",
    "byobnet": "gernet_s",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "tinynet_e",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_nano_rw_256",
    "metaformer": "poolformer_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nfnet_l0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest26d",
    "resnet": "resnet18",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s1",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t vgg11 vit_b_16 wide_resnet50_2"
).split()


# Rows and columns of the images: not square, so that a forgotten grid or a wrong axis does not fit.
SIZE = (64, 96)
SIZES = {
    **dict.fromkeys(("timm/coat", "timm/convit"), (64, 64)),
    **dict.fromkeys(("timm/pit", "timm/volo", "torchvision/vit_b_16"), (64, 64)),
    **dict.fromkeys(("timm/inception_resnet_v2", "timm/inception_v4"), (96, 128)),
    "timm/deepseek_vit": (56, 84),
    "timm/efficientformer": (224, 224),
    "timm/levit": (224, 224),
    "timm/sequencer": (56, 112),
    "torchvision/maxvit_t": (224, 224),
}
# Networks that are built for one size of image.
BUILT_FOR_A_SIZE = (
    "beit byoanet cait coat convit deit efficientformer_v2 eva gcvit maxxvit mlp_mixer pit swin_transformer "
    "swin_transformer_v2 swin_transformer_v2_cr visformer vision_transformer vision_transformer_hybrid "
    "vision_transformer_relpos vitamin volo"
).split()
# Of those, the ones that nowhere say which size it is: `attach` needs an example.
SIZE_NOT_TOLD = [f"timm/{family}" for family in ("byoanet", "efficientformer_v2", "gcvit", "volo")]
NARROW = {"embed_dim": 192, "num_heads": 3}
ARGUMENTS: dict[str, dict[str, Any]] = {
    **{f"timm/{family}": {"img_size": SIZES.get(f"timm/{family}", SIZE)} for family in BUILT_FOR_A_SIZE},
    "timm/beit": {**NARROW, "img_size": SIZE},
    **{f"timm/{family}": NARROW for family in ("naflexvit", "qwen3_vit", "vision_transformer_sam")},
    "timm/deepseek_vit": {**NARROW, "depth": 6},
    "timm/gemma4_vit": {**NARROW, "intermediate_size": 768},
    "timm/mobilenetv5": {"channel_multiplier": 0.25},
    "torchvision/vit_b_16": {"image_size": 64},
    "torchvision/googlenet": {"init_weights": False},
    "torchvision/inception_v3": {"init_weights": False},
}


def networks() -> dict[str, Callable[[], nn.Module]]:
    """One small network for each family of timm and each builder of torchvision, by name."""
    missing = {family for family in _module_to_models if not set(_module_to_models[family]) & set(NAMED)} - set(
        SMALLEST
    )
    if missing:
        raise ValueError(f"a timm family has no network here: {', '.join(sorted(missing))}; add its smallest")
    builders = {f"timm/{family}": (timm.create_model, name) for family, name in SMALLEST.items()}
    builders |= {f"torchvision/{name}": (torchvision.models.get_model, name) for name in TORCHVISION}
    return {name: partial(build, model, **ARGUMENTS.get(name, {})) for name, (build, model) in builders.items()}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Other weights and statistics for every norm and layer scale, and no weight that is all zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and not name.endswith("bias"):
            # A layer scale starts near zero; many of them near one would add up to what saturates a mixer's gate.
            parameter.uniform_(0.5, 1.5) if parameter.mean() > 0.1 else parameter.uniform_(0.05, 0.15)
        elif parameter.ndim < 2 or not parameter.any():
            parameter.normal_(std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


@dataclass(frozen=True)
class Plain:
    """A network without mixers, and what it says to two images in eval and in train mode."""

    network: nn.Module
    image: Tensor
    answers: dict[bool, Any]
    example: tuple[int, ...] | None

    def attach(self, method: str) -> nn.Module:
        """A copy with mixers."""
        return mrla.attach(copy.deepcopy(self.network), method, example=self.example)


def plain_answers(network: nn.Module, image: Tensor, example: tuple[int, ...] | None) -> Plain:
    """The network with its answers; where it does not give finite ones, the reason stands in place of the answer."""
    answers: dict[bool, Any] = {}
    for training in (False, True):
        try:
            outputs, state = answer(copy.deepcopy(network), image, training)
            finite = all(output.isfinite().all() for output in outputs)
            answers[training] = (outputs, state) if finite else "plain: not finite"
        except Exception as error:  # whatever a foreign network raises
            answers[training] = f"plain: {_said(error)}"
    return Plain(network, image, answers, example)


def answer(network: nn.Module, image: Tensor, training: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a network says, and its state afterwards; always with the same random numbers."""
    torch.manual_seed(1)
    with torch.no_grad():
        return tensors(network.train(training)(image)), network.state_dict()


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, which may be a tuple of a library's own."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output or () for tensor in tensors(part)]


def look_at(name: str, build: Callable[[], nn.Module], methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """What `attach` does with one network."""
    torch.manual_seed(0)
    network = build()
    randomise(network)
    row: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in network.parameters())}
    image = torch.randn(2, 3, *SIZES.get(name, SIZE))
    example = tuple(image.shape) if name in SIZE_NOT_TOLD else None
    begin = time.perf_counter()
    try:
        chains = find_chains(network, example=example)
    except ValueError as error:
        return {**row, "chains": 0, "reason": str(error)}
    row["seconds_to_find"] = round(time.perf_counter() - begin, 3)
    row["chains"] = len(chains)
    row["blocks"] = sum(len(chain.blocks) for chain in chains)
    row["layouts"] = sorted({chain.layout for chain in chains})
    row["without_shortcut"] = sum(len(chain.blocks) - len(chain.shortcuts) for chain in chains)
    plain = plain_answers(network, image, example)
    low = plain_answers(copy.deepcopy(network).bfloat16(), image.bfloat16(), example)
    for method in methods:
        row[method] = promises(plain, low, method)
    return row


def promises(plain: Plain, low: Plain, method: str) -> dict[str, str]:
    """What became of each promise: `"kept"`, or what happened instead. `low` is the same network in bfloat16.

    All of it happens to one network, in this order: it trains, gets the plain checkpoint back, and is detached.
    """
    found: dict[str, str] = {}
    try:
        attached = plain.attach(method)
        checks: dict[str, Callable[[], str]] = {
            "eval": lambda: says_the_same(plain, attached, (False,)),
            "train": lambda: says_the_same(plain, attached, (True,)),
            "bfloat16": lambda: says_the_same(low, low.attach(method), (False, True)),
            "gradients": lambda: learns(attached, plain.image),
            "checkpoint": lambda: loads_a_plain_checkpoint(plain, attached),
            "detach": lambda: comes_back(plain, attached),
        }
        for promise in PROMISES:
            found[promise] = checks[promise]()
    except Exception as error:  # what a row of the table is for
        found[PROMISES[len(found)]] = _said(error)
    return found


def says_the_same(plain: Plain, network: nn.Module, modes: tuple[bool, ...]) -> str:
    """Whether `network` says bit for bit what the plain one says, and its old state is the same afterwards."""
    for training in modes:
        expected = plain.answers[training]
        if isinstance(expected, str):
            return expected
        found = answer(network, plain.image, training)
        if not _same(found, expected):
            if not _same(answer(copy.deepcopy(plain.network), plain.image, training), expected):
                return "plain: not the same twice"
            logits = all(map(torch.equal, found[0], expected[0]))
            return f"other {'state' if logits else 'logits'} in {'train' if training else 'eval'} mode"
    return "kept"


def learns(network: nn.Module, image: Tensor) -> str:
    """Whether every new parameter has a gradient within two steps from the start, but the silent ones, which have 0."""
    new = new_parameters(network.train())
    optimizer = torch.optim.SGD(new.values(), lr=0.1)
    unmoved = set(new)
    for _ in range(2):
        torch.manual_seed(1)
        outputs = tensors(network(image))
        loss = torch.stack([(one * torch.randn_like(one)).sum() / one.numel() ** 0.5 for one in outputs]).sum()
        gradients = torch.autograd.grad(loss, list(new.values()), allow_unused=True)
        for (name, parameter), gradient in zip(new.items(), gradients, strict=True):
            if gradient is None:
                return f"outside the graph: {name}"
            if not gradient.isfinite().all():
                return f"not finite: the gradient of {name}"
            if gradient.any():
                unmoved.discard(name)
            parameter.grad = gradient
        optimizer.step()
    silent = {
        f"{path}.{name}"
        for path, module in network.named_modules()
        if isinstance(module, LayerMixer)
        for name in module.zero_grad_parameters()
    }
    if unmoved - silent:
        return f"no gradient: {_some(sorted(unmoved - silent))}"
    return "kept" if unmoved == silent else f"not silent: {_some(sorted(silent - unmoved))}"


def loads_a_plain_checkpoint(plain: Plain, attached: nn.Module) -> str:
    """Whether old keys keep their names and order, and a plain checkpoint misses the new ones and nothing else."""
    old, new = plain.network.state_dict(), attached.state_dict()
    if [key for key in new if ".mrla." not in key] != list(old):
        return "other keys"
    missing, unexpected = attached.load_state_dict(old, strict=False)
    if unexpected or any(".mrla." not in key for key in missing) or not set(new_parameters(attached)) <= set(missing):
        return f"missing {missing[:3]}, unexpected {unexpected[:3]}"
    return "kept"


def comes_back(plain: Plain, attached: nn.Module) -> str:
    """Whether a second `attach` is refused with the remedy, and `detach` gives the original back."""
    try:
        mrla.attach(attached)
        return "attached twice"
    except ValueError as error:
        if "call mrla.detach(model) first" not in str(error):
            return f"a second attach gives no remedy: {error}"
    mrla.detach(attached.train(plain.network.training))
    if anatomy(attached) != anatomy(plain.network):
        return "other classes, attributes or hooks"
    old, new = plain.network.state_dict(), attached.state_dict()
    if list(old) != list(new) or not all(map(torch.equal, old.values(), new.values())):
        return "another state dict"
    return says_the_same(plain, attached, (False,))


def new_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `attach` has added, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if ".mrla." in name}


def anatomy(network: nn.Module) -> list[tuple[Any, ...]]:
    """Names, classes, attributes, hooks and modes of every module."""
    return [
        (name, type(module), vars(module).keys(), len(module._forward_hooks), module.training)
        for name, module in network.named_modules()
    ]


def _same(one: tuple[list[Tensor], dict[str, Tensor]], other: tuple[list[Tensor], dict[str, Tensor]]) -> bool:
    """Whether outputs and old state are the same bit for bit; `one` may have more state."""
    outputs = len(one[0]) == len(other[0]) and all(map(torch.equal, one[0], other[0]))
    return outputs and all(torch.equal(one[1][key], tensor) for key, tensor in other[1].items())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def main() -> None:
    """Looks at every network and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=["*"])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rows = {}
    for name, build in networks().items():
        if any(fnmatch(name, pattern) for pattern in options.families):
            begin = time.perf_counter()
            row = rows[name] = look_at(name, build)
            row["seconds"] = round(time.perf_counter() - begin, 1)
            print(name, _line(row), flush=True)
    for method in METHODS:
        for library in ("timm", "torchvision"):
            mine = [row for name, row in rows.items() if name.startswith(f"{library}/")]
            for promise in PROMISES:
                kept = sum(row.get(method, {}).get(promise) == "kept" for row in mine)
                print(f"{method}, {promise}: {kept} of {len(mine)} of {library}")
    if options.out is not None:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    """A row's chains, seconds and whatever was not kept."""
    if not row["chains"]:
        return row["reason"][:100]
    broken = {
        f"{method}.{promise}": what
        for method in METHODS
        for promise, what in row.get(method, {}).items()
        if what != "kept"
    }
    return f"{row['chains']} chains of {row['blocks']} blocks, {row['seconds']} s: {broken or 'all kept'}"


if __name__ == "__main__":
    main()
