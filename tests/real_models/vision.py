"""Real networks for images: what timm, torchvision and the libraries beside them build.

Each entry says what somebody who has read the model's source would measure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.real_models.base import RealModel
from tests.real_models.torchvision_ops import let_detectors_run

CLASSES = 10


def _whole(weight: Tensor) -> Tensor:
    """A weight (out, in) or (out, in, *kernel): a neuron is one output unit."""
    return weight.flatten(1)


def _rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """Rows of a weight that several layers share."""
    return lambda weight: weight[start:stop].flatten(1)


def _columns(weight: Tensor) -> Tensor:
    """A weight (in, out), as in x @ weight."""
    return weight.T


def _rows_of_heads(heads: int, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """Rows that lie head by head, some of each head."""
    return lambda weight: weight.unflatten(0, (heads, -1))[:, start:stop].flatten(0, 1)


def _standardized(weight: Tensor) -> Tensor:
    """Each filter less its mean, as a convolution with weight standardization uses it.

    Its division by the deviation changes no direction.
    """
    filters = weight.flatten(1)
    return filters - filters.mean(1, keepdim=True)


def _images(count: int, size: int, channels: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, channels, size, size)


def _classify(size: int) -> Callable[[nn.Module], Tensor]:
    """The cross-entropy of four images."""

    def loss(model: nn.Module) -> Tensor:
        logits = model(_images(4, size))
        return functional.cross_entropy(logits, torch.arange(4))

    return loss


def _segment(size: int) -> Callable[[nn.Module], Tensor]:
    """The cross-entropy of each pixel of two images."""

    def loss(model: nn.Module) -> Tensor:
        logits = model(_images(2, size))
        labels = torch.zeros(2, size, size, dtype=torch.long)
        labels[:, : size // 2] = 1
        return functional.cross_entropy(logits, labels)

    return loss


# timm


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
        return model

    return build


def _timm_bit() -> nn.Module:
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    torch.manual_seed(0)
    return ResNetV2(
        layers=(1, 1),
        channels=(128, 256),
        stem_chs=32,
        num_classes=CLASSES,
        conv_layer=StdConv2d,
    )


def _timm_resnetv2() -> nn.Module:
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    torch.manual_seed(0)
    return ResNetV2(
        layers=(1, 1),
        channels=(64, 128),
        stem_chs=32,
        num_classes=CLASSES,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
    )


def _timm_eva_separate() -> nn.Module:
    from timm.models.eva import Eva

    torch.manual_seed(0)
    return Eva(
        img_size=28,
        patch_size=14,
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=CLASSES,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
    )


def _levit_loss(model: nn.Module) -> Tensor:
    """Both classifiers, the one for distillation too."""
    logits, distilled = model(_images(4, 64))
    labels = torch.arange(4)
    task = functional.cross_entropy(logits, labels)
    return task + functional.cross_entropy(distilled, labels)


def _build_levit() -> nn.Module:
    model = _timm("levit_128s", img_size=64)()
    model.set_distilled_training(True)
    return model


TIMM = (
    RealModel(
        name="timm: ViT-Tiny",
        imports=("timm",),
        build=_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
        loss=_classify(32),
        heads=("head",),
        shapes={
            "patch_embed.proj": (1, 192, 192),
            "blocks.0.attn.qkv.q": (1, 192, 192),
            "blocks.0.attn.qkv.k": (1, 192, 192),
            "blocks.0.attn.qkv.v": (1, 192, 192),
            "blocks.0.mlp.fc1": (1, 768, 192),
            "head": (1, 10, 192),
        },
        reads={
            "blocks.0.attn.qkv.q": ("blocks.0.attn.qkv.weight", _rows(0, 192)),
            "blocks.1.attn.qkv.v": ("blocks.1.attn.qkv.weight", _rows(384, 576)),
            "patch_embed.proj": ("patch_embed.proj.weight", _whole),
        },
        rest={"pos_embed": "embedding"},
    ),
    RealModel(
        name="timm: ResNetV2",
        imports=("timm",),
        build=_timm_resnetv2,
        loss=_classify(32),
        heads=("head.fc",),
        shapes={
            "stem.conv": (1, 32, 147),
            "stages.0.blocks.0.conv2": (1, 16, 144),
            "head.fc": (1, 10, 128),
        },
        reads={
            "stem.conv": ("stem.conv.weight", _whole),
            "stages.0.blocks.0.conv2": ("stages.0.blocks.0.conv2.weight", _whole),
            "head.fc": ("head.fc.weight", _whole),
        },
    ),
    RealModel(
        name="timm: BiT",
        imports=("timm",),
        build=_timm_bit,
        loss=_classify(32),
        heads=("head.fc",),
        shapes={
            "stem.conv": (1, 32, 147),
            "stages.0.blocks.0.conv2": (1, 32, 288),
            "head.fc": (1, 10, 256),
        },
        reads={
            "stem.conv": ("stem.conv.weight", _standardized),
            "stages.0.blocks.0.conv2": ("stages.0.blocks.0.conv2.weight", _standardized),
            "head.fc": ("head.fc.weight", _whole),
        },
    ),
    RealModel(
        name="timm: EVA-02, packed SwiGLU",
        imports=("timm",),
        build=_timm("eva02_tiny_patch14_224", img_size=28, depth=2),
        loss=_classify(28),
        heads=("head",),
        shapes={
            "blocks.0.attn.qkv.q": (1, 192, 192),
            "blocks.0.attn.qkv.k": (1, 192, 192),
            "blocks.0.attn.qkv.v": (1, 192, 192),
            "blocks.0.mlp.fc1.gate": (1, 512, 192),
            "blocks.0.mlp.fc1.up": (1, 512, 192),
            "blocks.0.mlp.fc2": (1, 192, 512),
        },
        reads={
            "blocks.0.attn.qkv.k": ("blocks.0.attn.qkv.weight", _rows(192, 384)),
            "blocks.0.mlp.fc1.gate": ("blocks.0.mlp.fc1.weight", _rows(0, 512)),
            "blocks.1.mlp.fc1.up": ("blocks.1.mlp.fc1.weight", _rows(512, 1024)),
        },
        rest={"pos_embed": "embedding"},
    ),
    RealModel(
        name="timm: EVA, separate projections",
        imports=("timm",),
        build=_timm_eva_separate,
        loss=_classify(28),
        heads=("head",),
        shapes={
            "blocks.0.attn.q_proj": (1, 48, 48),
            "blocks.0.mlp.fc1_g": (1, 192, 48),
            "blocks.0.mlp.fc1_x": (1, 192, 48),
        },
        reads={
            "blocks.0.attn.q_proj": ("blocks.0.attn.q_proj.weight", _whole),
            "blocks.0.mlp.fc1_g": ("blocks.0.mlp.fc1_g.weight", _whole),
            "blocks.0.mlp.fc1_x": ("blocks.0.mlp.fc1_x.weight", _whole),
        },
        rest={"pos_embed": "embedding"},
    ),
    RealModel(
        name="timm: SigLIP ViT with attention pooling",
        imports=("timm",),
        build=_timm("vit_base_patch16_siglip_224", img_size=32, depth=1, embed_dim=64, num_heads=2),
        loss=_classify(32),
        heads=("head",),
        shapes={
            "blocks.0.attn.qkv.q": (1, 64, 64),
            "attn_pool.q": (1, 64, 64),
            "attn_pool.kv.k": (1, 64, 64),
            "attn_pool.kv.v": (1, 64, 64),
        },
        reads={
            "attn_pool.q": ("attn_pool.q.weight", _whole),
            "attn_pool.kv.k": ("attn_pool.kv.weight", _rows(0, 64)),
            "attn_pool.kv.v": ("attn_pool.kv.weight", _rows(64, 128)),
        },
        rest={"pos_embed": "embedding"},
    ),
    RealModel(
        name="timm: EfficientNet-B0",
        imports=("timm",),
        build=_timm("efficientnet_b0"),
        loss=_classify(32),
        heads=("classifier",),
        shapes={
            "conv_stem": (1, 32, 27),
            "blocks.0.0.se.conv_reduce": (1, 8, 32),
            "blocks.1.0.conv_pw": (1, 96, 16),
        },
        reads={
            "conv_stem": ("conv_stem.weight", _whole),
            "blocks.0.0.se.conv_reduce": ("blocks.0.0.se.conv_reduce.weight", _whole),
            "blocks.1.0.conv_pw": ("blocks.1.0.conv_pw.weight", _whole),
        },
        rest={"*.conv_dw.weight": "depthwise"},
    ),
    RealModel(
        name="timm: ConvNeXt",
        imports=("timm",),
        build=_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 32, 48)),
        loss=_classify(32),
        heads=("head.fc",),
        shapes={
            "stem.0": (1, 16, 48),
            "stages.0.blocks.0.mlp.fc1": (1, 64, 16),
            "stages.1.downsample.1": (1, 32, 64),
        },
        reads={
            "stem.0": ("stem.0.weight", _whole),
            "stages.0.blocks.0.mlp.fc1": ("stages.0.blocks.0.mlp.fc1.weight", _whole),
            "stages.1.downsample.1": ("stages.1.downsample.1.weight", _whole),
        },
        rest={"*.conv_dw.weight": "depthwise"},
    ),
    RealModel(
        name="timm: Swin",
        imports=("timm",),
        build=_timm(
            "swin_tiny_patch4_window7_224",
            img_size=56,
            embed_dim=32,
            depths=(1, 2),
            num_heads=(2, 4),
        ),
        loss=_classify(56),
        heads=("head.fc",),
        shapes={
            "layers.0.blocks.0.attn.qkv.q": (1, 32, 32),
            "layers.0.blocks.0.attn.qkv.k": (1, 32, 32),
            "layers.0.blocks.0.attn.qkv.v": (1, 32, 32),
            "layers.1.downsample.reduction": (1, 64, 128),
        },
        reads={
            "layers.0.blocks.0.attn.qkv.q": ("layers.0.blocks.0.attn.qkv.weight", _rows(0, 32)),
            "layers.1.blocks.1.attn.qkv.k": ("layers.1.blocks.1.attn.qkv.weight", _rows(64, 128)),
            "layers.1.downsample.reduction": ("layers.1.downsample.reduction.weight", _whole),
        },
        rest={"*.relative_position_bias_table": "table"},
    ),
    RealModel(
        name="timm: LeViT",
        imports=("timm",),
        build=_build_levit,
        loss=_levit_loss,
        heads=("head.linear", "head_dist.linear"),
        # In each head 16 queries, 16 keys, 32 values; where the picture shrinks 16 keys, 64 values.
        shapes={
            "stem.conv1.linear": (1, 16, 27),
            "stages.0.blocks.0.attn.qkv.linear.q": (1, 64, 128),
            "stages.0.blocks.0.attn.qkv.linear.k": (1, 64, 128),
            "stages.0.blocks.0.attn.qkv.linear.v": (1, 128, 128),
            "stages.1.downsample.attn_downsample.kv.linear.k": (1, 128, 128),
            "stages.1.downsample.attn_downsample.kv.linear.v": (1, 512, 128),
            "stages.1.downsample.attn_downsample.q.ln.linear": (1, 128, 128),
        },
        reads={
            "stages.0.blocks.0.attn.qkv.linear.q": (
                "stages.0.blocks.0.attn.qkv.linear.weight",
                _rows_of_heads(4, 0, 16),
            ),
            "stages.0.blocks.0.attn.qkv.linear.v": (
                "stages.0.blocks.0.attn.qkv.linear.weight",
                _rows_of_heads(4, 32, 64),
            ),
            "stages.1.downsample.attn_downsample.kv.linear.k": (
                "stages.1.downsample.attn_downsample.kv.linear.weight",
                _rows_of_heads(8, 0, 16),
            ),
        },
        rest={
            "stages.[01].*.attention_biases": "table",
            "stages.2.downsample.*.attention_biases": "table",
        },
    ),
)


# torchvision


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=CLASSES)


def _vision_transformer() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=CLASSES,
    )


def _squeezenet() -> nn.Module:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    return squeezenet1_1(num_classes=CLASSES)


def _torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=32,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=CLASSES,
    )


def _fcn() -> nn.Module:
    from torchvision.models import resnet18
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    torch.manual_seed(0)
    layers = {"layer3": "aux", "layer4": "out"}
    backbone = IntermediateLayerGetter(resnet18(), layers)
    return FCN(backbone, FCNHead(512, 3), FCNHead(256, 3))


def _fcn_loss(model: nn.Module) -> Tensor:
    outputs = model(_images(2, 32))
    labels = torch.ones(2, 32, 32, dtype=torch.long)
    task = functional.cross_entropy(outputs["out"], labels)
    return task + 0.5 * functional.cross_entropy(outputs["aux"], labels)


def _faster_rcnn() -> nn.Module:
    let_detectors_run()
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
    )
    backbone.out_channels = 32
    return FasterRCNN(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        box_batch_size_per_image=16,
    )


def _faster_rcnn_loss(model: nn.Module) -> Tensor:
    images = _images(2, 64)
    boxes = torch.tensor([[4.0, 4.0, 28.0, 30.0], [20.0, 24.0, 60.0, 56.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    losses = model(list(images), [target, target])
    total: Tensor = sum(losses.values())
    return total


TORCHVISION = (
    RealModel(
        name="torchvision: ResNet-18",
        imports=("torchvision",),
        build=_resnet18,
        loss=_classify(32),
        heads=("fc",),
        shapes={"conv1": (1, 64, 147), "layer1.0.conv1": (1, 64, 576), "fc": (1, 10, 512)},
        reads={
            "conv1": ("conv1.weight", _whole),
            "layer2.0.downsample.0": ("layer2.0.downsample.0.weight", _whole),
            "fc": ("fc.weight", _whole),
        },
    ),
    RealModel(
        name="torchvision: ViT",
        imports=("torchvision",),
        build=_vision_transformer,
        loss=_classify(32),
        heads=("heads.head",),
        shapes={
            "conv_proj": (1, 64, 192),
            "encoder.layers.encoder_layer_0.self_attention.q": (1, 64, 64),
            "encoder.layers.encoder_layer_0.self_attention.k": (1, 64, 64),
            "encoder.layers.encoder_layer_0.self_attention.v": (1, 64, 64),
            "encoder.layers.encoder_layer_0.self_attention.out_proj": (1, 64, 64),
        },
        reads={
            "encoder.layers.encoder_layer_0.self_attention.q": (
                "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
                _rows(0, 64),
            ),
            "encoder.layers.encoder_layer_1.self_attention.v": (
                "encoder.layers.encoder_layer_1.self_attention.in_proj_weight",
                _rows(128, 192),
            ),
            "encoder.layers.encoder_layer_0.mlp.0": (
                "encoder.layers.encoder_layer_0.mlp.0.weight",
                _whole,
            ),
        },
        rest={"encoder.pos_embedding": "embedding"},
    ),
    RealModel(
        name="torchvision: SqueezeNet",
        imports=("torchvision",),
        build=_squeezenet,
        loss=_classify(64),
        heads=("classifier.1",),
        shapes={
            "features.0": (1, 64, 27),
            "features.3.squeeze": (1, 16, 64),
            "classifier.1": (1, 10, 512),
        },
        reads={
            "features.0": ("features.0.weight", _whole),
            "features.3.expand3x3": ("features.3.expand3x3.weight", _whole),
            "classifier.1": ("classifier.1.weight", _whole),
        },
    ),
    RealModel(
        name="torchvision: FCN with an auxiliary classifier",
        imports=("torchvision",),
        build=_fcn,
        loss=_fcn_loss,
        heads=("classifier.4", "aux_classifier.4"),
        shapes={"classifier.4": (1, 3, 128), "aux_classifier.4": (1, 3, 64)},
        reads={
            "backbone.conv1": ("backbone.conv1.weight", _whole),
            "classifier.4": ("classifier.4.weight", _whole),
            "aux_classifier.4": ("aux_classifier.4.weight", _whole),
        },
    ),
    RealModel(
        name="torchvision: Faster R-CNN",
        imports=("torchvision",),
        build=_faster_rcnn,
        loss=_faster_rcnn_loss,
        heads=(
            "rpn.head.cls_logits",
            "rpn.head.bbox_pred",
            "roi_heads.box_predictor.cls_score",
            "roi_heads.box_predictor.bbox_pred",
        ),
        shapes={
            "backbone.0": (1, 16, 27),
            "rpn.head.cls_logits": (1, 6, 32),
            "rpn.head.bbox_pred": (1, 24, 32),
            "roi_heads.box_predictor.cls_score": (1, 3, 1024),
            "roi_heads.box_predictor.bbox_pred": (1, 12, 1024),
        },
        reads={
            "rpn.head.bbox_pred": ("rpn.head.bbox_pred.weight", _whole),
            "roi_heads.box_predictor.cls_score": (
                "roi_heads.box_predictor.cls_score.weight",
                _whole,
            ),
            "backbone.2": ("backbone.2.weight", _whole),
        },
    ),
    RealModel(
        name="torchvision: Swin",
        imports=("torchvision",),
        build=_torchvision_swin,
        loss=_classify(32),
        heads=("head",),
        shapes={
            "features.1.0.attn.qkv.q": (1, 32, 32),
            "features.1.0.attn.qkv.k": (1, 32, 32),
            "features.1.0.attn.qkv.v": (1, 32, 32),
        },
        reads={
            "features.1.0.attn.qkv.q": ("features.1.0.attn.qkv.weight", _rows(0, 32)),
            "features.3.0.attn.qkv.v": ("features.3.0.attn.qkv.weight", _rows(128, 192)),
            "features.2.reduction": ("features.2.reduction.weight", _whole),
        },
        rest={"*.relative_position_bias_table": "table"},
    ),
)


# segmentation_models_pytorch


def _smp_unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    widths = (32, 24, 16, 8, 8)
    return smp.Unet("resnet18", encoder_weights=None, classes=3, decoder_channels=widths)


def _smp_deeplab() -> nn.Module:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    return smp.DeepLabV3Plus(
        "resnet18",
        encoder_weights=None,
        classes=3,
        decoder_channels=16,
        decoder_atrous_rates=(2, 4, 6),
    )


def _smp_segformer() -> nn.Module:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    return smp.Segformer(
        "mit_b0", encoder_weights=None, classes=3, decoder_segmentation_channels=32
    )


SEGMENTATION = (
    RealModel(
        name="segmentation_models_pytorch: U-Net",
        imports=("segmentation_models_pytorch",),
        build=_smp_unet,
        loss=_segment(32),
        heads=("segmentation_head.0",),
        shapes={
            "encoder.conv1": (1, 64, 147),
            "decoder.blocks.0.conv1.0": (1, 32, 6912),
            "segmentation_head.0": (1, 3, 72),
        },
        reads={
            "encoder.conv1": ("encoder.conv1.weight", _whole),
            "decoder.blocks.4.conv2.0": ("decoder.blocks.4.conv2.0.weight", _whole),
            "segmentation_head.0": ("segmentation_head.0.weight", _whole),
        },
    ),
    RealModel(
        name="segmentation_models_pytorch: DeepLabV3+",
        imports=("segmentation_models_pytorch",),
        build=_smp_deeplab,
        loss=_segment(64),
        heads=("segmentation_head.0",),
        shapes={
            "decoder.aspp.0.convs.0.0": (1, 16, 512),
            "decoder.aspp.0.convs.1.0.1": (1, 16, 512),
            "segmentation_head.0": (1, 3, 16),
        },
        reads={
            "decoder.aspp.0.convs.1.0.1": ("decoder.aspp.0.convs.1.0.1.weight", _whole),
            "decoder.block1.0": ("decoder.block1.0.weight", _whole),
            "segmentation_head.0": ("segmentation_head.0.weight", _whole),
        },
        rest={
            "decoder.aspp.0.convs.[123].0.0.weight": "depthwise",
            "decoder.aspp.1.0.weight": "depthwise",
            "decoder.block2.0.0.weight": "depthwise",
        },
    ),
    RealModel(
        name="segmentation_models_pytorch: SegFormer",
        imports=("segmentation_models_pytorch",),
        build=_smp_segformer,
        loss=_segment(64),
        heads=("segmentation_head.0",),
        shapes={
            "encoder.block1.0.attn.q": (1, 32, 32),
            "encoder.block1.0.attn.kv.k": (1, 32, 32),
            "encoder.block1.0.attn.kv.v": (1, 32, 32),
            "encoder.block1.0.attn.sr": (1, 32, 2048),
        },
        reads={
            "encoder.block1.0.attn.kv.k": ("encoder.block1.0.attn.kv.weight", _rows(0, 32)),
            "encoder.block2.1.attn.kv.v": ("encoder.block2.1.attn.kv.weight", _rows(64, 128)),
            "encoder.block1.0.attn.sr": ("encoder.block1.0.attn.sr.weight", _whole),
        },
        rest={"*.dwconv.dwconv.weight": "depthwise"},
    ),
)


# open_clip


def _clip() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 100, "width": 48, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)


def _clip_loss(model: nn.Module) -> Tensor:
    import open_clip

    images = _images(4, 32)
    texts = torch.randint(1, 100, (4, 16))
    image_features, text_features, scale = model(images, texts)[:3]
    loss: Tensor = open_clip.ClipLoss()(image_features, text_features, scale)
    return loss


OPEN_CLIP = (
    RealModel(
        name="open_clip: CLIP",
        imports=("open_clip",),
        build=_clip,
        loss=_clip_loss,
        heads=("visual.proj", "text_projection"),
        shapes={
            "visual.conv1": (1, 64, 192),
            "visual.transformer.resblocks.0.attn.q": (1, 64, 64),
            "visual.transformer.resblocks.0.attn.k": (1, 64, 64),
            "visual.transformer.resblocks.0.attn.v": (1, 64, 64),
            "visual.transformer.resblocks.0.attn.out_proj": (1, 64, 64),
            "transformer.resblocks.0.attn.q": (1, 48, 48),
            "visual.proj": (1, 32, 64),
            "text_projection": (1, 32, 48),
        },
        reads={
            "visual.proj": ("visual.proj", _columns),
            "text_projection": ("text_projection", _columns),
            "transformer.resblocks.1.attn.k": (
                "transformer.resblocks.1.attn.in_proj_weight",
                _rows(48, 96),
            ),
        },
        rest={
            "positional_embedding": "embedding",
            "visual.positional_embedding": "embedding",
            "token_embedding.weight": "embedding",
        },
    ),
)


# lightly: the modules that its documentation puts together


def _backbone() -> nn.Sequential:
    """A small ResNet without its classifier: 512 features."""
    from torchvision.models.resnet import BasicBlock, ResNet

    resnet = ResNet(BasicBlock, [1, 1, 1, 1])
    return nn.Sequential(*list(resnet.children())[:-1])


def _views() -> tuple[Tensor, Tensor]:
    """Two views of four images."""
    first = _images(4, 32)
    second = first + 0.1 * torch.randn_like(first)
    return first, second


class Dino(nn.Module):
    """A student, and a teacher that is a running mean of it."""

    def __init__(self) -> None:
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.student_backbone = _backbone()
        self.student_head = DINOProjectionHead(512, 64, 32, 128, freeze_last_layer=1)
        self.teacher_backbone = _backbone()
        self.teacher_head = DINOProjectionHead(512, 64, 32, 128)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.student_head(self.student_backbone(x).flatten(1))
        return y

    def forward_teacher(self, x: Tensor) -> Tensor:
        y: Tensor = self.teacher_head(self.teacher_backbone(x).flatten(1))
        return y


def _dino() -> nn.Module:
    torch.manual_seed(0)
    return Dino()


def _dino_loss(model: nn.Module) -> Tensor:
    from lightly.loss import DINOLoss
    from lightly.models.utils import update_momentum

    assert isinstance(model, Dino)
    update_momentum(model.student_backbone, model.teacher_backbone, m=0.99)
    update_momentum(model.student_head, model.teacher_head, m=0.99)
    views = _views()
    with torch.no_grad():
        targets = [model.forward_teacher(view) for view in views]
    predictions = [model(view) for view in views]
    loss: Tensor = DINOLoss(output_dim=128)(targets, predictions, epoch=0)
    return loss


class Swav(nn.Module):
    """A backbone, a projection and prototypes on the sphere."""

    def __init__(self) -> None:
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        super().__init__()
        self.backbone = _backbone()
        self.projection_head = SwaVProjectionHead(512, 64, 32)
        self.prototypes = SwaVPrototypes(32, n_prototypes=48)

    def forward(self, x: Tensor) -> Tensor:
        features = self.projection_head(self.backbone(x).flatten(1))
        scores: Tensor = self.prototypes(functional.normalize(features, dim=1))
        return scores


def _swav() -> nn.Module:
    torch.manual_seed(0)
    return Swav()


def _swav_loss(model: nn.Module) -> Tensor:
    from lightly.loss import SwaVLoss

    assert isinstance(model, Swav)
    model.prototypes.normalize()
    scores = [model(view) for view in _views()]
    loss: Tensor = SwaVLoss()(scores, [])
    return loss.squeeze()


class Byol(nn.Module):
    """A network that predicts the projections of a running mean of itself."""

    def __init__(self) -> None:
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.backbone = _backbone()
        self.projection_head = BYOLProjectionHead(512, 64, 32)
        self.prediction_head = BYOLPredictionHead(32, 64, 32)
        self.backbone_momentum = _backbone()
        self.projection_head_momentum = BYOLProjectionHead(512, 64, 32)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.projection_head(self.backbone(x).flatten(1))
        predicted: Tensor = self.prediction_head(projected)
        return predicted

    def forward_momentum(self, x: Tensor) -> Tensor:
        y: Tensor = self.projection_head_momentum(self.backbone_momentum(x).flatten(1))
        return y.detach()


def _byol() -> nn.Module:
    torch.manual_seed(0)
    return Byol()


def _byol_loss(model: nn.Module) -> Tensor:
    from lightly.loss import NegativeCosineSimilarity

    assert isinstance(model, Byol)
    criterion = NegativeCosineSimilarity()
    first, second = _views()
    loss: Tensor = criterion(model(first), model.forward_momentum(second))
    return loss + criterion(model(second), model.forward_momentum(first))


class Moco(nn.Module):
    """A network whose projections are told from those of a running mean of itself."""

    def __init__(self) -> None:
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.backbone = _backbone()
        self.projection_head = MoCoProjectionHead(512, 64, 32)
        self.backbone_momentum = _backbone()
        self.projection_head_momentum = MoCoProjectionHead(512, 64, 32)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        query: Tensor = self.projection_head(self.backbone(x).flatten(1))
        return query

    def forward_momentum(self, x: Tensor) -> Tensor:
        y: Tensor = self.projection_head_momentum(self.backbone_momentum(x).flatten(1))
        return y.detach()


def _moco() -> nn.Module:
    torch.manual_seed(0)
    return Moco()


def _moco_loss(model: nn.Module) -> Tensor:
    from lightly.loss import NTXentLoss

    assert isinstance(model, Moco)
    first, second = _views()
    loss: Tensor = NTXentLoss()(model(first), model.forward_momentum(second))
    return loss


LIGHTLY = (
    RealModel(
        name="lightly: DINO",
        imports=("lightly", "torchvision"),
        build=_dino,
        loss=_dino_loss,
        heads=("student_head.last_layer",),
        # The last layer's rows have length one, by weight_norm: their directions are weight_v's.
        shapes={
            "student_backbone.0": (1, 64, 147),
            "student_head.layers.0": (1, 64, 512),
            "student_head.last_layer": (1, 128, 32),
            "teacher_head.last_layer": (1, 128, 32),
        },
        reads={
            "student_head.last_layer": ("student_head.last_layer.weight_v", _whole),
            "student_head.layers.0": ("student_head.layers.0.weight", _whole),
            "student_backbone.0": ("student_backbone.0.weight", _whole),
        },
    ),
    RealModel(
        name="lightly: SwAV",
        imports=("lightly", "torchvision"),
        build=_swav,
        loss=_swav_loss,
        heads=("prototypes.heads.0",),
        shapes={"prototypes.heads.0": (1, 48, 32), "projection_head.layers.3": (1, 32, 64)},
        reads={
            "prototypes.heads.0": ("prototypes.heads.0.weight", _whole),
            "projection_head.layers.3": ("projection_head.layers.3.weight", _whole),
            "backbone.0": ("backbone.0.weight", _whole),
        },
    ),
    RealModel(
        name="lightly: BYOL",
        imports=("lightly", "torchvision"),
        build=_byol,
        loss=_byol_loss,
        heads=("prediction_head.layers.3",),
        shapes={
            "prediction_head.layers.3": (1, 32, 64),
            "projection_head_momentum.layers.3": (1, 32, 64),
        },
        reads={
            "prediction_head.layers.3": ("prediction_head.layers.3.weight", _whole),
            "projection_head.layers.0": ("projection_head.layers.0.weight", _whole),
            "backbone.0": ("backbone.0.weight", _whole),
        },
    ),
    RealModel(
        name="lightly: MoCo",
        imports=("lightly", "torchvision"),
        build=_moco,
        loss=_moco_loss,
        heads=("projection_head.layers.2",),
        shapes={
            "projection_head.layers.2": (1, 32, 64),
            "projection_head_momentum.layers.2": (1, 32, 64),
        },
        reads={
            "projection_head.layers.2": ("projection_head.layers.2.weight", _whole),
            "projection_head.layers.0": ("projection_head.layers.0.weight", _whole),
            "backbone.0": ("backbone.0.weight", _whole),
        },
    ),
)


# diffusers


def _unet2d() -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    )


def _unet2d_loss(model: nn.Module) -> Tensor:
    images = _images(2, 16)
    noise = torch.randn_like(images)
    predicted = model(images + noise, torch.tensor([3, 7])).sample
    return functional.mse_loss(predicted, noise)


def _unet2d_condition() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=24,
    )


def _unet2d_condition_loss(model: nn.Module) -> Tensor:
    images = _images(2, 16, channels=4)
    noise = torch.randn_like(images)
    words = torch.randn(2, 5, 24)
    predicted = model(images + noise, torch.tensor([3, 7]), words).sample
    return functional.mse_loss(predicted, noise)


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=8,
        num_embeds_ada_norm=CLASSES,
    )


def _dit_loss(model: nn.Module) -> Tensor:
    images = _images(2, 8, channels=4)
    noise = torch.randn(2, 8, 8, 8)
    steps = torch.tensor([3, 7])
    predicted = model(images, timestep=steps, class_labels=torch.tensor([1, 2])).sample
    return functional.mse_loss(predicted, noise)


def _vq_model() -> nn.Module:
    from diffusers import VQModel

    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=8,
        num_vq_embeddings=32,
        vq_embed_dim=4,
        latent_channels=4,
    )


def _vq_model_loss(model: nn.Module) -> Tensor:
    images = _images(2, 16)
    output = model(images)
    commitment: Tensor = output.commit_loss
    return functional.mse_loss(output.sample, images) + commitment


_BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"

DIFFUSERS = (
    RealModel(
        name="diffusers: UNet2DModel",
        imports=("diffusers",),
        build=_unet2d,
        loss=_unet2d_loss,
        heads=("conv_out",),
        shapes={
            "conv_in": (1, 32, 27),
            "time_embedding.linear_1": (1, 128, 32),
            "down_blocks.1.attentions.0.to_q": (1, 32, 32),
            "conv_out": (1, 3, 288),
        },
        reads={
            "conv_in": ("conv_in.weight", _whole),
            "down_blocks.1.attentions.0.to_q": ("down_blocks.1.attentions.0.to_q.weight", _whole),
            "conv_out": ("conv_out.weight", _whole),
        },
    ),
    RealModel(
        name="diffusers: UNet2DConditionModel",
        imports=("diffusers",),
        build=_unet2d_condition,
        loss=_unet2d_condition_loss,
        heads=("conv_out",),
        # GEGLU: the second half goes through the activation.
        shapes={
            f"{_BLOCK}.attn2.to_k": (1, 32, 24),
            f"{_BLOCK}.ff.net.0.proj.up": (1, 128, 32),
            f"{_BLOCK}.ff.net.0.proj.gate": (1, 128, 32),
        },
        reads={
            f"{_BLOCK}.attn2.to_k": (f"{_BLOCK}.attn2.to_k.weight", _whole),
            f"{_BLOCK}.ff.net.0.proj.up": (f"{_BLOCK}.ff.net.0.proj.weight", _rows(0, 128)),
            f"{_BLOCK}.ff.net.0.proj.gate": (f"{_BLOCK}.ff.net.0.proj.weight", _rows(128, 256)),
        },
    ),
    RealModel(
        name="diffusers: DiT",
        imports=("diffusers",),
        build=_dit,
        loss=_dit_loss,
        heads=("proj_out_2",),
        shapes={
            "pos_embed.proj": (1, 32, 16),
            "transformer_blocks.0.attn1.to_q": (1, 32, 32),
            "proj_out_2": (1, 32, 32),
        },
        reads={
            "pos_embed.proj": ("pos_embed.proj.weight", _whole),
            "transformer_blocks.0.attn1.to_q": ("transformer_blocks.0.attn1.to_q.weight", _whole),
            "transformer_blocks.1.ff.net.0.proj": (
                "transformer_blocks.1.ff.net.0.proj.weight",
                _whole,
            ),
        },
        rest={"*.class_embedder.embedding_table.weight": "embedding"},
    ),
    RealModel(
        name="diffusers: VQModel",
        imports=("diffusers",),
        build=_vq_model,
        loss=_vq_model_loss,
        heads=("decoder.conv_out",),
        shapes={
            "quantize.embedding": (1, 32, 4),
            "encoder.mid_block.attentions.0.to_q": (1, 32, 32),
            "quant_conv": (1, 4, 4),
        },
        reads={
            "quantize.embedding": ("quantize.embedding.weight", _whole),
            "quant_conv": ("quant_conv.weight", _whole),
            "decoder.conv_out": ("decoder.conv_out.weight", _whole),
        },
    ),
)


MODELS = TIMM + TORCHVISION + SEGMENTATION + OPEN_CLIP + LIGHTLY + DIFFUSERS
