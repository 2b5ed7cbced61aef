"""Fixtures shared by the tests."""

import gc
import os

import pytest
import torch

from lightning_hsu.measures.defaults import COEFFICIENT, SHARE_LIMIT
from tests import WITH_DEFAULTS

os.environ.pop("COLUMNS", None)  # a width that a shell may set is for its own programs

HAS_OTHER_GENERATORS = torch.cuda.is_available() or torch.backends.mps.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays: the garbage collector need not look through it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded():
    if HAS_OTHER_GENERATORS:
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)  # the other would prepare for devices to come


@pytest.fixture
def shipped_defaults(monkeypatch):
    """The coefficient and the share limit that users get."""
    for function in WITH_DEFAULTS:
        monkeypatch.setattr(function, "__defaults__", (None, COEFFICIENT))
        monkeypatch.setitem(function.__kwdefaults__, "share_limit", SHARE_LIMIT)


@pytest.fixture
def _double():
    """Train in float64: AdamW makes steps of any size of a gradient that is zero but for rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def _few_random_layers(monkeypatch):
    """Random layers for references of measures without an expectation: the usual number takes long."""
    from lightning_hsu import reference
    from tests.ranks import few_random_layers

    monkeypatch.setattr(reference, "_simulated", few_random_layers)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
