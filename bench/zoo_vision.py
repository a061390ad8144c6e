"""Do models of timm and torchvision, unmodified, give the same loss and gradients when pipelined?

Random weights, small images, eval mode; `--train` for train mode, with stochastic depth off. A table in Markdown goes to
stdout.

Run: python bench/zoo_vision.py [names ...] [--train] [--check]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tried import LAYOUTS, Case, table, try_all

INSTALL = "pip install timm and the torchvision of this torch (0.28 for 2.13), then run this again"
ROWS, CLASSES = 4, 10

TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet50": (64, {}),
    "densenet121": (32, {}),
    "inception_v3": (96, {"init_weights": False, "aux_logits": False}),
    "googlenet": (64, {"init_weights": False, "aux_logits": False}),
    "mobilenet_v3_small": (64, {}),
    "efficientnet_b0": (64, {}),
    "convnext_tiny": (64, {}),
    "regnet_y_400mf": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "vit_b_32": (64, {"image_size": 64}),
}
"""By function of `torchvision.models`: image size, and options."""

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "vgg11_bn": (32, {"mlp_ratio": 0.03}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 4, "embed_dim": 96, "num_heads": 4}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 4}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 4}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 4}),
    "pvt_v2_b0": (64, {}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (2, 2)}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "levit_128s": (64, {"img_size": 64}),
    "mobilevit_xxs": (64, {}),
    "edgenext_xx_small": (64, {}),
    "convnextv2_atto": (64, {}),
    "nfnet_l0": (64, {}),
    "hrnet_w18_small": (64, {}),
    "dpn48b": (64, {}),
    "legacy_xception": (64, {}),
    "ghostnet_050": (64, {}),
    "repvgg_a0": (64, {}),
    "efficientnet_lite0": (64, {}),
    "resnetv2_50": (64, {}),
    "poolformer_s12": (64, {}),
}
"""By name in timm: image size, and options."""


def cross_entropy(outputs: Any, microbatch: Mapping[str, Any]) -> Tensor:
    """Return the mean over rows, of the main logits only: some models return more in train mode."""
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    return nn.functional.cross_entropy(logits, microbatch["target"])


def case(
    make: Callable[..., nn.Module], side: int, options: Mapping[str, Any], train: bool, double: bool, channels_last: bool
) -> Case:  # fmt: skip
    """Return a model with its images."""
    module = make(num_classes=CLASSES, **options).train(train)
    for part in module.modules():
        for name in {"StochasticDepth": ["p"], "DropPath": ["drop_prob"]}.get(type(part).__name__, []):
            vars(part)[name] = 0.0  # not all constructors have an option for it
    images = torch.randn(ROWS, 3, side, side)
    if double:
        module, images = module.double(), images.double()
    if channels_last:
        module, images = module.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layouts = [*LAYOUTS, (4, "1f1b")] if "resnet50" in str(make) else LAYOUTS
    return Case(module, {"x": images, "target": torch.randint(CLASSES, (ROWS,))}, cross_entropy, layouts)


def cases(train: bool, double: bool) -> dict[str, Callable[[], Case]]:
    """Return builders by name."""
    try:
        vision, timm = importlib.import_module("torchvision.models"), importlib.import_module("timm")
    except ImportError as error:
        raise SystemExit(f"error: {error}; {INSTALL}") from error
    found: dict[str, Callable[[], Case]] = {}
    for name, (side, options) in TORCHVISION.items():
        make = getattr(vision, name)
        found[f"torchvision {name}"] = partial(case, make, side, {"weights": None, **options}, train, double, False)
    for name, (side, options) in TIMM.items():
        make = partial(timm.create_model, name, pretrained=False)
        found[f"timm {name}"] = partial(case, make, side, options, train, double, False)
    make = vision.resnet50
    found["torchvision resnet50, channels_last"] = partial(case, make, 64, {"weights": None}, train, double, True)
    make = partial(timm.create_model, "densenet121", pretrained=False)
    found["timm densenet121, checkpointed"] = partial(
        case, make, 32, {"memory_efficient": True, "block_config": (2, 2, 2, 2)}, train, double, False
    )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which models, by the end of their names; all by default")
    parser.add_argument("--train", action="store_true", help="in train mode")
    parser.add_argument("--double", action="store_true", help="in fp64: tells rounding from mistakes")
    parser.add_argument("--check", action="store_true", help="ask af.check, too")
    given = parser.parse_args()
    every = cases(given.train, given.double)
    chosen = [name for name in every if not given.names or name.endswith(tuple(given.names))]
    print(table(try_all(every, chosen, checks=given.check)))
