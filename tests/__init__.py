"""Tests. Most compare with loops that know nothing of the task: so ``share_limit`` is None by default.

It is what users get, SHARE_LIMIT, in tests with the fixture ``shipped_defaults``, in those that say it,
and in programs and pages that are run as they are.
"""

import tests.real_models  # noqa: F401 - first, for it lets torchmetrics import torchvision
from lightning_hsu import HypersphericalUniformity, UniformityRegularizer

WITH_LIMITS = (HypersphericalUniformity.__init__, UniformityRegularizer.__init__)
SHARE_LIMIT = UniformityRegularizer.__init__.__kwdefaults__["share_limit"]

for function in WITH_LIMITS:
    function.__kwdefaults__["share_limit"] = None
