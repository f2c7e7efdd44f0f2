"""Benchmark results as people read them: tables, pictures, the README's section, and what changed between two runs.

`plots` needs matplotlib and is imported by whoever draws.
"""

from mpdit.report.compare import Comparison, compare
from mpdit.report.document import report
from mpdit.report.readme import performance_block, update_readme
from mpdit.report.results import Results, Row, read_results

__all__ = ["Comparison", "Results", "Row", "compare", "performance_block", "read_results", "report", "update_readme"]
