"""What a simulation says: a table in the terminal, CSV files, pictures, and one self-contained HTML page.

All of it is made from `RunResult`s alone, of any number of seeds and variants, in whatever order they come. A report
says first what does not hold (runs that did not finish, goals that were not reached), and marks estimates as such.
"""

from farflung.sim.report.files import write_csv
from farflung.sim.report.html import write_html
from farflung.sim.report.plots import write_plots
from farflung.sim.report.summary import VariantSummary, critical_path, doubts, headline, summarise
from farflung.sim.report.table import print_table

__all__ = [
    "VariantSummary",
    "critical_path",
    "doubts",
    "headline",
    "print_table",
    "summarise",
    "write_csv",
    "write_html",
    "write_plots",
]
