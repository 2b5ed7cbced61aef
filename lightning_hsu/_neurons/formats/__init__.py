"""How libraries store quantised weights: a reader for each format, by the names that it uses."""

from __future__ import annotations

from lightning_hsu._neurons.formats.base import Reader
from lightning_hsu._neurons.formats.bitsandbytes import bitsandbytes
from lightning_hsu._neurons.formats.compressed import compressed
from lightning_hsu._neurons.formats.eight_bits import bytes_with_scales
from lightning_hsu._neurons.formats.floats import blocks_of_floats, bytes_of_floats
from lightning_hsu._neurons.formats.gptq import gptq_or_awq
from lightning_hsu._neurons.formats.mlx import mlx
from lightning_hsu._neurons.formats.planes import hqq, quanto
from lightning_hsu._neurons.formats.refused import refused

READERS: tuple[Reader, ...] = (
    refused,
    bitsandbytes,
    hqq,
    quanto,
    mlx,
    gptq_or_awq,
    compressed,
    blocks_of_floats,
    bytes_of_floats,
    bytes_with_scales,
)
"""The formats, the special ones first: each looks at what those before it have left."""
