"""Tests. Most compare with loops that know nothing of the task, and whose strength is 1.

So that is the coefficient, and ``share_limit`` is None, where a test says nothing else. Users' defaults are
those of tests with the fixture ``shipped_defaults``, and of programs and pages that are run as they are.
"""

import os
from functools import cache
from importlib import metadata

import torch

# Triton reads it when it is imported, which Lightning does: without a GPU its kernels run in its
# interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# The tests' matrices are tiny: more threads than one only add noise to their run time. `make cpus`
# asks for two, which split sums and so round otherwise. Processes that tests start inherit it.
THREADS = os.environ.get("HSU_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = THREADS
torch.set_num_threads(int(THREADS))

# Each Trainer looks through all installed packages for callbacks: 6 ms. Lightning takes the
# function from here when it is imported.
metadata.entry_points = cache(metadata.entry_points)

import tests.real_models  # noqa: E402, F401 - it lets torchmetrics import torchvision
from lightning_hsu import HypersphericalUniformity, UniformityRegularizer  # noqa: E402

WITH_DEFAULTS = (HypersphericalUniformity.__init__, UniformityRegularizer.__init__)

for function in WITH_DEFAULTS:
    function.__defaults__ = (None, 1.0)  # of measure and coefficient
    function.__kwdefaults__["share_limit"] = None
