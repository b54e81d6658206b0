"""Which of timm's families, and which of torchvision's builders, `mrla.attach` works on by itself.

    python benchmarks/attach_coverage.py [--families vit* ...] [--out benchmarks/results/NAME.json]

For one small network of each family: its chains, the seconds that finding them takes, and for each method whether the
network says the same bit for bit after `attach`, in eval mode, and is the same again after `detach`. Norms have random
weights and statistics first, for a zero would hide a mistake.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models._registry import _module_to_models
from torch import nn

import mrla
from mrla.models import NAMED, find_chains
from mrla.models.dry_run import input_sizes

METHODS = ("light", "base", "exact")
# The smallest of each family by parameters, but where its stages hold one block each.
SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
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


def networks() -> dict[str, Callable[[], nn.Module]]:
    """One small network for each family of timm and each builder of torchvision, by name."""
    missing = {family for family in _module_to_models if not set(_module_to_models[family]) & set(NAMED)} - set(
        SMALLEST
    )
    if missing:
        raise ValueError(f"a timm family has no network here: {', '.join(sorted(missing))}; add its smallest")
    found: dict[str, Callable[[], nn.Module]] = {
        f"timm/{family}": lambda name=name: timm.create_model(name) for family, name in SMALLEST.items()
    }
    for name in TORCHVISION:
        arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        found[f"torchvision/{name}"] = lambda name=name, arguments=arguments: torchvision.models.get_model(
            name, **arguments
        )
    return found


def randomise_norms(model: nn.Module) -> None:
    """Other weights and statistics for every norm."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 1 and "Norm" in type(module).__name__:
            nn.init.uniform_(weight, 0.5, 1.5)
            if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                module.get_buffer("running_mean").normal_(std=0.1)
                module.get_buffer("running_var").uniform_(0.5, 1.5)


def look_at(build: Callable[[], nn.Module], methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """What `attach` does with one network."""
    torch.manual_seed(0)
    plain = build().eval()
    randomise_norms(plain)
    row: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in plain.parameters())}
    begin = time.perf_counter()
    try:
        chains = find_chains(plain)
    except ValueError as error:
        return {**row, "chains": 0, "reason": str(error)}
    row["seconds_to_find"] = round(time.perf_counter() - begin, 3)
    row.update(
        chains=len(chains),
        blocks=sum(len(chain.blocks) for chain in chains),
        layouts=sorted({c.layout for c in chains}),
    )
    row["without_shortcut"] = sum(len(chain.blocks) - len(chain.shortcuts) for chain in chains)
    image = torch.randn(1, *input_sizes(plain)[0])
    with torch.no_grad():
        expected = plain(image)
        for method in methods:
            row[method] = _promise(plain, image, expected, method)
    return row


def _promise(plain: nn.Module, image: torch.Tensor, expected: Any, method: str) -> str:
    attached = copy.deepcopy(plain)
    try:
        mrla.attach(attached, method)
        if not _equal(attached(image), expected):
            return "other logits"
        mrla.detach(attached)
        return "equal" if _equal(attached(image), expected) else "other logits after detach"
    except Exception as error:  # what a row of the table is for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return all(_equal(a, b) for a, b in zip(one, other, strict=True))


def main() -> None:
    """Looks at every network and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=["*"])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rows = {}
    for name, build in networks().items():
        if any(fnmatch(name, pattern) for pattern in options.families):
            rows[name] = look_at(build)
            kept = {key: value for key, value in rows[name].items() if key != "reason"}
            print(name, kept, rows[name].get("reason", "")[:100], flush=True)
    for method in METHODS:
        for library in ("timm", "torchvision"):
            mine = [row for name, row in rows.items() if name.startswith(f"{library}/")]
            print(f"{method}: {sum(row.get(method) == 'equal' for row in mine)} of {len(mine)} of {library}")
    if options.out is not None:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
