"""Reports on trained networks: which layers are redundant, by how much, and what moved."""

from lightning_hsu.report.build import Report, report
from lightning_hsu.report.comparison import Comparison, compare
from lightning_hsu.report.data import LayerComparison, LayerReport, SimilarPair

__all__ = [
    "Comparison",
    "LayerComparison",
    "LayerReport",
    "Report",
    "SimilarPair",
    "compare",
    "report",
]
