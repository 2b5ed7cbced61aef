"""What surrounds a call in one's own loop: a compiler, inference mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Run a method in plain Python, too, where its caller is compiled.

    The compiler breaks its graph there, so that the method sees the weights as they are and its
    counts are kept. With ``fullgraph=True`` it refuses, with a reason if this torch shows one.
    """
    settings: dict[str, Any] = {}
    if "reason" in inspect.signature(torch.compiler.disable).parameters:
        settings["reason"] = (
            f"lightning_hsu computes {function.__name__}() in plain Python. Call it outside the function "
            "that torch.compile(fullgraph=True) compiles, as in loss = compiled(batch) + "
            "regularizer.penalty(), or compile without fullgraph=True"
        )
    disable: Any = torch.compiler.disable
    found: Callable[P, R] = disable(function, **settings)
    return found


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, in which measures cannot be differentiated, but record nothing."""
    with torch.inference_mode(False), torch.no_grad():
        yield
