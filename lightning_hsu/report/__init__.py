"""Reports on trained networks: which layers are redundant, and by how much."""

from lightning_hsu.report.analysis import LayerReport, SimilarPair
from lightning_hsu.report.reports import Report, report

__all__ = ["LayerReport", "Report", "SimilarPair", "report"]
