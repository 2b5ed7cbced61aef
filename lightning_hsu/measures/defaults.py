"""Defaults, used wherever nothing else is given."""

from __future__ import annotations

from lightning_hsu.measures.base import Measure
from lightning_hsu.measures.riesz import RieszEnergy

DEFAULT_MEASURE: Measure = RieszEnergy(s=2.0)
"""Minimum hyperspherical energy with s = 2, in full space: what did no harm in evidence/README.md."""

REPORT_MEASURE: Measure = RieszEnergy(s=2.0, half_space=True)
"""The same in half space: a report counts neurons that differ in sign as one direction."""

COEFFICIENT = 0.3
"""How strong the penalty is."""

SHARE_LIMIT = 0.1
"""Largest norm of a layer's penalty gradient over that of its task gradient."""

SAMPLE_ABOVE = 16384
"""Neurons above which pair energies are estimated from a sample of the pairs."""
