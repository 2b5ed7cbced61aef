"""Libraries that a test needs, or else is skipped."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from types import ModuleType

import pytest


def missing(name: str, why: object = "not installed") -> None:
    """Skip a test that needs a library; where all have been installed, fail."""
    message = f"needs {name.partition('.')[0]}: make models ({why})"
    if os.environ.get("HSU_ALL_MODELS"):
        pytest.fail(message)
    pytest.skip(message)


def library(name: str) -> ModuleType:
    """Import a module, or skip the test if it is not there or cannot be imported here.

    Args:
        name: Name of the module, such as "peft".
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the library, as it is imported
        try:
            return import_module(name)
        except (ImportError, RuntimeError, OSError) as error:  # also one that does not fit torch
            missing(name, error)
            raise
