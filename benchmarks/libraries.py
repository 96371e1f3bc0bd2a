"""Cut models of timm and of transformers twice, as zoo.py does with torchvision's.

    pip install timm transformers                    which nothing else here needs
    python -m benchmarks.libraries                   one model of each architecture below
    python -m benchmarks.libraries bert regnet       those whose name contains one of these
    python -m benchmarks.libraries --markdown --why  a table to paste; what keeps its place, and why

Of timm, the smallest model (or nearly) of each architecture is measured, with images of 64 or 128
px if it accepts them; of transformers, tiny models built from configurations. Columns and exit code
are those of zoo.py; for text, px is the length of the sequence.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import BATCH, Result, measure_model, randomise, tell

# timm's byoanet is left out: with random weights, the softmaxes of its attention amplify rounding
# errors more than 10⁹ times.
TIMM = """
    cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny convmixer_1024_20_ks9_p14
    convnext_atto_rms cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2_21m cspnext_tiny
    davit_tiny deit3_small_patch16_224 densenet121 dla102x dpn68 edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0
    efficientvit_m1 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmlp_ti16_224 hardcorenas_b hgnetv2_b0
    hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto inception_v3 inception_v4
    lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0
    mobilenetv3_small_050 mobileone_s1 mobilevit_xxs mvitv2_tiny nest_tiny nextvit_small
    nf_regnet_b0 pit_ti_224 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_004_tv repghostnet_050
    repvit_m1 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 sam2_hiera_tiny selecsls42
    sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_cr_tiny_224 swinv2_tiny_window16_256 test_mambaout test_vit_relpos tf_efficientnet_b0
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny
    vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
""".split()

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _LAYERS | {"intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64}
_IMAGE = _LAYERS | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
_FOUR = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_MOBILE = {"depth_multiplier": 0.25, "image_size": 64}

# Model class without "For…" → the rest of the class's name, and its configuration's arguments.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Albert": ("ForSequenceClassification", _TEXT | {"embedding_size": 16}),
    "Bert": ("ForSequenceClassification", _TEXT),
    "CLIPVision": ("Model", _IMAGE),
    "ConvNext": ("ForImageClassification", _FOUR | {"image_size": 32}),
    "Dinov2": ("ForImageClassification", _LAYERS | {"image_size": 32, "patch_size": 8}),
    "DistilBert": (
        "ForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100},
    ),
    "EfficientNet": (
        "ForImageClassification",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 32, "hidden_dim": 320},
    ),
    "Electra": ("ForSequenceClassification", _TEXT | {"embedding_size": 16}),
    "Llama": ("ForCausalLM", _TEXT | {"num_key_value_heads": 2}),
    "MobileNetV1": ("ForImageClassification", _MOBILE),
    "MobileNetV2": ("ForImageClassification", _MOBILE),
    "Qwen2": ("ForCausalLM", _TEXT | {"num_key_value_heads": 2}),
    "RegNet": ("ForImageClassification", _STAGES | {"groups_width": 4}),
    "ResNet": ("ForImageClassification", _STAGES | {"layer_type": "basic"}),
    "Roberta": ("ForSequenceClassification", _TEXT),
    "Segformer": (
        "ForSemanticSegmentation",
        _FOUR | {"num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16},
    ),
    "Swin": (
        "ForImageClassification",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 4},
    ),
    "ViT": ("ForImageClassification", _IMAGE),
}


def of_timm(name: str) -> tuple[nn.Module, Tensor]:
    """Build a timm model in train mode, and the smallest images of a few sizes that it accepts."""
    import timm

    # At 64 px these end in 1 × 1, and a batch norm over two numbers amplifies rounding errors.
    smallest = 128 if name.startswith(("levit", "efficientvim")) else 64
    refused: Exception | None = None
    for px, sized in ((smallest, True), (smallest, False), (224, True), (224, False), (256, False)):
        size = {"img_size": px} if sized else {}
        try:
            model = timm.create_model(name, num_classes=10, drop_rate=0.0, **size)
            x = torch.randn(BATCH, 3, px, px)
            model.train()(x)
        except Exception as error:  # models raise all kinds of errors for unsuitable images
            refused = error
            continue
        for module in model.modules():
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
        return model, x
    raise ValueError(f"{name} takes no images of these sizes") from refused


def of_transformers(name: str) -> tuple[nn.Module, Tensor]:
    """Build a tiny model of transformers in train mode, and an input for it."""
    import transformers

    what, options = TRANSFORMERS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, name + what)(config)
    images = "Image" in what or "Segmentation" in what or name == "CLIPVision"
    if not images:
        return model.train(), torch.arange(16).view(BATCH, 8)
    px = options.get("image_size", 32)
    return model.train(), torch.randn(BATCH, 3, px, px)


def measure(
    name: str, build: Callable[[str], tuple[nn.Module, Tensor]], dtype: torch.dtype, seed: int
) -> Result:
    """Build a model, draw its parameters anew, and measure it as zoo.py does."""
    torch.manual_seed(seed)
    model, x = build(name)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    randomise(model, x)
    return measure_model(name, model, x, seed)


def main() -> int:
    """Measure what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of model names; none: all models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="the table again, as markdown")
    parser.add_argument("--why", action="store_true", help="why channels have to stay, by model")
    args = parser.parse_args()
    missing = [name for name in ("timm", "transformers") if find_spec(name) is None]
    if missing:
        print(f"missing: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    builders = dict.fromkeys(TIMM, of_timm) | dict.fromkeys(TRANSFORMERS, of_transformers)
    chosen = {
        name: partial(measure, name, build, torch.float64, args.seed)
        for name, build in builders.items()
        if not args.names or any(part.lower() in name.lower() for part in args.names)
    }
    return tell(chosen, args.why, args.markdown)


if __name__ == "__main__":
    sys.exit(main())
