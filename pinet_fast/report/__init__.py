"""Reports of finished runs: one HTML page a run, and runs side by side."""

from __future__ import annotations

from pinet_fast.report.compare import Comparison
from pinet_fast.report.compare_output import as_csv, as_dict, as_rich
from pinet_fast.report.html import write_report
from pinet_fast.report.run_files import RunFiles
from pinet_fast.report.run_summary import RunSummary

__all__ = ["Comparison", "RunFiles", "RunSummary", "as_csv", "as_dict", "as_rich", "write_report"]
