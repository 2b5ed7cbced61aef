"""Cosines as a picture: a paletted PNG in the page itself."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

STEPS = 16
"""Steps of the absolute cosine that are told apart."""

_POSITIVE, _NEGATIVE = (
    (214, 96, 20),
    (38, 118, 214),
)  # to be told apart without red and green, on white and on black


def heat_map_png(cosines: Tensor) -> bytes:
    """Cosines (m, m) as a PNG of m by m pixels: orange positive, blue negative, the more opaque the larger.

    The index of a pixel is ``STEPS`` plus the cosine in steps, so what the page's background is shines through near 0.
    """
    index = ((cosines * STEPS).round() + STEPS).to(torch.uint8)
    rows = torch.cat(
        [torch.zeros(len(index), 1, dtype=torch.uint8), index], 1
    )  # each begins with its filter: none
    height, width = index.shape
    colours = b"".join(bytes(_NEGATIVE if i < STEPS else _POSITIVE) for i in range(2 * STEPS + 1))
    alphas = bytes(round(255 * abs(i - STEPS) / STEPS) for i in range(2 * STEPS + 1))
    packed = zlib.compressobj(
        9, strategy=zlib.Z_FILTERED
    )  # looks for fewer repetitions: cosines have few
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", colours),
        (b"tRNS", alphas),
        (b"IDAT", packed.compress(bytes(rows.flatten().tolist())) + packed.flush()),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def data_address(png: bytes) -> str:
    """The picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
