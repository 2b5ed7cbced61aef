"""Reports on trained networks: which layers are redundant, and by how much; two of them compared."""

from lightning_hsu.report.analysis import LayerReport, SimilarPair
from lightning_hsu.report.build import Report, report
from lightning_hsu.report.comparison import Comparison, LayerComparison, compare

__all__ = [
    "Comparison",
    "LayerComparison",
    "LayerReport",
    "Report",
    "SimilarPair",
    "compare",
    "report",
]
