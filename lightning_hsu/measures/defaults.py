"""Defaults, used wherever nothing else is given."""

from __future__ import annotations

from lightning_hsu.measures.base import Measure
from lightning_hsu.measures.riesz import RieszEnergy

DEFAULT_MEASURE: Measure = RieszEnergy(s=2.0)
"""Minimum hyperspherical energy with s = 2, in full space: chosen in evidence/README.md, "The default"."""

REPORT_MEASURE: Measure = RieszEnergy(s=2.0, half_space=True)
"""The same in half space: a report counts neurons that differ in sign as one direction."""

COEFFICIENT = 1.0
"""How strong the penalty is, within the limit below.

In small networks the limit decides at nine steps of ten or more (tests/test_safe_default.py counts).
"""

SHARE_LIMIT = 0.02
"""Largest norm of a layer's penalty gradient over that of its task gradient."""

SAMPLE_ABOVE = 16384
"""Neurons above which pair energies are estimated from a sample of the pairs."""
