"""Reports on trained networks: which layers are redundant, by how much, and what moved."""

from lightning_hsu.report.build import Report, merges, report
from lightning_hsu.report.comparison import Comparison, compare
from lightning_hsu.report.comparison_data import LayerComparison, Matching
from lightning_hsu.report.data import LayerReport, SimilarGroup, SimilarPair
from lightning_hsu.report.drift import Drift
from lightning_hsu.report.merge_list import Merge, Merges

__all__ = [
    "Comparison",
    "Drift",
    "LayerComparison",
    "LayerReport",
    "Matching",
    "Merge",
    "Merges",
    "Report",
    "SimilarGroup",
    "SimilarPair",
    "compare",
    "merges",
    "report",
]
