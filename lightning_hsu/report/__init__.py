"""Reports on trained networks: which layers are redundant, by how much, and what moved."""

from lightning_hsu.report.build import Report, report
from lightning_hsu.report.comparison import Comparison, compare
from lightning_hsu.report.data import Drift, LayerComparison, LayerReport, Matching, SimilarPair

__all__ = [
    "Comparison",
    "Drift",
    "LayerComparison",
    "LayerReport",
    "Matching",
    "Report",
    "SimilarPair",
    "compare",
    "report",
]
