"""Warnings at the line of the user's code that called us, and information; on the first rank."""

from __future__ import annotations

import logging
import sys
import warnings
from types import FrameType

import torch

_LOGGER = logging.getLogger("lightning_hsu")


def warn(message: str) -> None:
    """Warn at the line of the loop that called this package, on the first rank only."""
    if not is_first_rank():
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    warn_at(frame, message)


def warn_at(frame: FrameType, message: str) -> None:
    """Warn at the line of a frame, also if that was said there before.

    Python shows a text once at a line; what is said once a fit must be seen in the next fit, too.
    """
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry={},
    )


def inform(message: str) -> None:
    """Log what is no matter for a warning, on the first rank only."""
    if is_first_rank():
        _LOGGER.info(message)


def is_first_rank() -> bool:
    """Whether this process is the first, or the only one."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    return torch.distributed.get_rank() == 0


def _is_inside(module: str) -> bool:
    """Whether a module is one of this package, or of those that wrap its calls and a step's."""
    return module.partition(".")[0] in ("lightning_hsu", "torch", "lightning", "accelerate")
