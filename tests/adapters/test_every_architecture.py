"""The contract of sources on one small model of every timm family and on every torchvision classification model.

Random weights and small inputs: what is checked is that layers, maps, the default layer, CAM, Grad-CAM, saliency and a
unit in the middle are right or refused, not what a trained model sees. The README states how many pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from random_weights import QuickInitialisation

import torchloupe as tl
from torchloupe_core.borrow import kept_randomness

# What does not pass, and why. A model that passes after all fails its test.
KNOWN: dict[str, str] = {}

# Of each module of timm.models the variant with the fewest parameters, or nearly: of some the least one cannot take a
# small input.
FAMILIES = {
    "beit": "beit_base_patch16_224",
    "byoanet": "eca_botnext26ts_256",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
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
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
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
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
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
SIZE, SMALL = 96, 64  # pixels, of timm's and of torchvision's

# Larger inputs, where the last map would have but one position or the model takes no other.
SIZES = {
    "timm/crossvit_tiny_240": 240,
    "timm/csatv2": 256,
    "timm/deepseek_vit_412m": 84,  # patches of 14
    "timm/eca_botnext26ts_256": 256,
    "timm/efficientformer_l1": 224,
    "timm/efficientvit_m0": 128,
    "timm/inception_resnet_v2": 160,
    "timm/inception_v3": 160,
    "timm/inception_v4": 160,
    "timm/sam2_hiera_tiny": 128,
    "timm/shvit_s1": 128,
    "torchvision/alexnet": 96,
    "torchvision/inception_v3": 160,
    "torchvision/maxvit_t": 224,
    "torchvision/vit_b_32": 128,
    "torchvision/vit_h_14": 56,
    "torchvision/vit_l_32": 128,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "timm/deepseek_vit_412m": {"depth": 2},  # cut down: 2 of its 32 blocks, all alike, since there is no smaller one
    "timm/sam2_hiera_tiny": {"window_spec": (4, 4, 4, 2)},  # windows that divide the smaller maps, as its own divide
    "timm/samvit_base_patch16_224": {"window_size": 3},  # those of its own input size
    "torchvision/googlenet": {"init_weights": False},  # which draws with scipy, for minutes
    "torchvision/inception_v3": {"init_weights": False},
}

TIMM = [f"timm/{name}" for name in FAMILIES.values()]
TORCHVISION = [f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)]


@pytest.fixture(scope="module")
def quick() -> Iterator[QuickInitialisation]:
    yield QuickInitialisation()


def _parameter(name: str) -> Any:
    known = KNOWN.get(name)
    return pytest.param(
        name, id=name, marks=[pytest.mark.xfail(strict=True, raises=AssertionError, reason=known)] if known else []
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", map(_parameter, [*TIMM, *TORCHVISION]))
def test_keeps_what_every_source_promises(name: str, quick: QuickInitialisation) -> None:
    source, _, model = name.partition("/")
    size, options = SIZES.get(name, SIZE if source == "timm" else SMALL), dict(OPTIONS.get(name, {}))
    if source == "timm" and timm.get_pretrained_cfg(model).fixed_input_size and size != native(model):
        options["img_size"] = size
    elif source == "torchvision" and model.startswith("vit_"):
        options["image_size"] = size
    quick.start = 0  # the same weights whichever tests ran before
    with kept_randomness(), quick:
        torch.manual_seed(0)  # torch.nn.init draws behind the back of a function mode
        handle = tl.load(name, pretrained=False, input_size=(3, size, size), **options)
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    tl.checks.check_source(handle, noise)


def native(model: str) -> int:
    return timm.get_pretrained_cfg(model).input_size[-1]  # type: ignore[no-any-return]


def test_every_family_is_there() -> None:
    assert sorted(FAMILIES) == sorted(timm.list_modules())
    for family, name in FAMILIES.items():
        assert name in timm.list_models(module=family)
    assert len(TORCHVISION) >= 80
    assert {*KNOWN, *SIZES, *OPTIONS} <= {*TIMM, *TORCHVISION}


def test_the_readme_states_how_many_pass() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    stated = re.search(r"(\d+) of (\d+)\s+timm\s+families\s+and\s+(\d+)\s+of\s+(\d+)\s+torchvision", readme)
    assert stated is not None
    passing = [len([name for name in names if name not in KNOWN]) for names in (TIMM, TORCHVISION)]
    assert [int(number) for number in stated.groups()] == [passing[0], len(TIMM), passing[1], len(TORCHVISION)]
    assert passing[0] >= 0.95 * len(TIMM)
