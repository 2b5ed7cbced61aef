"""Weights of well-known models as (neurons, dimension): what a penalty on all of their layers works on."""

from __future__ import annotations

Shapes = list[tuple[int, int]]


def resnet18() -> Shapes:
    """Convolutions of 3 x 3 in four stages of two basic blocks, and a head of 1000 classes."""
    shapes, inputs = [(64, 3 * 49)], 64
    for width in (64, 128, 256, 512):
        shapes += [(width, inputs * 9), (width, width * 9)]
        shapes += [(width, inputs)] if width != inputs else []
        shapes += [(width, width * 9)] * 2
        inputs = width
    return [*shapes, (1000, 512)]


def resnet50() -> Shapes:
    """Bottlenecks of 1 x 1, 3 x 3 and 1 x 1, of which each stage has 3, 4, 6 and 3."""
    shapes, inputs = [(64, 3 * 49)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs), (width, width * 9), (4 * width, width)]
            shapes += [(4 * width, inputs)] if block == 0 else []
            inputs = 4 * width
    return [*shapes, (1000, 2048)]


def vit_b_16() -> Shapes:
    """Twelve blocks with queries, keys and values apart; the patches and the head of 1000 classes."""
    block = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return [(768, 768), *block * 12, (1000, 768)]


def gpt2_small() -> Shapes:
    """Twelve blocks with queries, keys and values in one projection; the embeddings are left out."""
    return [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


MODELS = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b_16,
    "GPT-2 small": gpt2_small,
}
