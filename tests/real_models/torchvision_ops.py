"""What lets torchvision run beside a torch that its own operators were not built for.

A CPU build of torch does not load the operators of torchvision's usual wheel, and then even
``import torchvision`` fails, for it describes the shapes of two operators that are not there. This
module declares them. Where torchvision's own operators load, or there is no torchvision, it does
nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_LIBRARIES: list[torch.library.Library] = []  # an operator is there as long as its library is


def declare_missing_operators() -> None:
    """Declare what ``import torchvision`` needs; call it before that import."""
    if _LIBRARIES or _has_own_operators():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SIGNATURE)
    library.impl("nms", non_maximum_suppression, "CPU")
    _LIBRARIES.append(library)


def let_detectors_run() -> None:
    """Let torchvision's ``nms`` take the one of this module.

    For ``roi_align`` torchvision has one in Python, which it would compile, for long.
    """
    declare_missing_operators()
    if not _LIBRARIES:
        return
    extension = import_module("torchvision.extension")
    extension._has_ops = lambda: True
    alignment = import_module("torchvision.ops.roi_align")
    compiled = alignment._roi_align
    alignment._roi_align = getattr(compiled, "__wrapped__", compiled)


def non_maximum_suppression(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes (n, 4) that no better box overlaps by more than a threshold.

    Args:
        boxes: Corners (x1, y1, x2, y2) of each box.
        scores: One number a box; the best come first.
        threshold: Of the intersection over the union.
    """
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    area = size.prod(1)
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left) > 0:
        best = left[0]
        others = left[1:]
        kept.append(int(best))
        low = torch.maximum(boxes[best, :2], boxes[others, :2])
        high = torch.minimum(boxes[best, 2:], boxes[others, 2:])
        common = (high - low).clamp(min=0).prod(1)
        union = area[best] + area[others] - common
        left = others[common <= threshold * union]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def _has_own_operators() -> bool:
    """Whether there is nothing to declare: no torchvision, or one whose operators load."""
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return True
    for path in sorted(Path(found.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        return True
    return False
