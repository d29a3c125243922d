"""Where does each tip hold on this machine, and where is it reversed between machines?

``render`` makes one self-contained page of a ledger, ``compare`` puts several ledgers side by
side, ``run_notebooks`` fills a fresh ledger by running the notebooks without a browser, and
``main`` is ``python -m dlhelpers report``. A condition is reversed between two machines where it
holds on one and fails on the other.
"""

from dlhelpers.course.report.command import main
from dlhelpers.course.report.machines import compare
from dlhelpers.course.report.page import render
from dlhelpers.course.report.running import NotebookRun, RunSummary, run_notebooks

__all__ = ["NotebookRun", "RunSummary", "compare", "main", "render", "run_notebooks"]
