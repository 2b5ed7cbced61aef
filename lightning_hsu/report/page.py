"""A report as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_hsu.report.reports import Report


def report_page(found: Report) -> str:
    """The page of a report."""
    raise NotImplementedError
