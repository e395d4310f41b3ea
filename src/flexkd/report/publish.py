"""What people read of a run, written into its folder: the page and the student's model card."""

from pathlib import Path

from flexkd.record import CompareRecord, RunRecord
from flexkd.report.card import model_card
from flexkd.report.page import compare_page, write_report


def publish(record: RunRecord, folder: str | Path) -> Path:
    """Write `report.html` and `student/README.md`; gives the page."""
    page = Path(folder, "report.html")
    write_report([record], page)
    Path(folder, "student", "README.md").write_text(model_card(record), encoding="utf-8")
    return page


def publish_comparison(record: CompareRecord, folder: str | Path) -> Path:
    """Write `compare.html`; gives the page."""
    page = Path(folder, "compare.html")
    compare_page(record, page)
    return page
