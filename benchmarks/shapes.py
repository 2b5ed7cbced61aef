"""Layer shapes of well-known models, (neurons, dimension), for penalties on all of their layers."""

from __future__ import annotations

Shapes = list[tuple[int, int]]


def resnet18() -> Shapes:
    """Four stages of two basic blocks of 3 x 3 convolutions, and a head of 1000 classes."""
    shapes = [(64, 3 * 49)]
    inputs = 64
    for width in (64, 128, 256, 512):
        shapes += [(width, inputs * 9), (width, width * 9)]
        if width != inputs:  # the shortcut of the first block
            shapes.append((width, inputs))
        shapes += [(width, width * 9)] * 2
        inputs = width
    return [*shapes, (1000, 512)]


def resnet50() -> Shapes:
    """Four stages of 3, 4, 6 and 3 bottlenecks of 1 x 1, 3 x 3 and 1 x 1, and a head of 1000."""
    shapes = [(64, 3 * 49)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs), (width, width * 9), (4 * width, width)]
            if block == 0:  # the shortcut
                shapes.append((4 * width, inputs))
            inputs = 4 * width
    return [*shapes, (1000, 2048)]


def vit_b_16() -> Shapes:
    """The patches, twelve blocks with separate queries, keys and values, and a head of 1000."""
    block = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return [(768, 768), *block * 12, (1000, 768)]


def gpt2_small() -> Shapes:
    """Twelve blocks with queries, keys and values in one projection, without the embeddings."""
    return [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


def llama_7b() -> Shapes:
    """32 blocks of four attention projections and the three of a gated MLP, without embeddings."""
    return [*[(4096, 4096)] * 4, (11008, 4096), (11008, 4096), (4096, 11008)] * 32


MODELS = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b_16,
    "GPT-2 small": gpt2_small,
}

LARGE = {"Llama-7B": llama_7b}
"""Models that are counted and not timed."""
