"""Results as CSV, LaTeX and Markdown: the figures of the record with their intervals, and text that stays text."""

import csv
import dataclasses
import io
import re

import pytest

from flexkd.errors import RecipeError
from flexkd.report.page import read_records, results_as, write_page
from flexkd.report.table_formats import latex_text
from tests.report.records import (
    compare_record,
    contrasted_record,
    generation_record,
    judged_record,
    rivals_record,
    sizes_record,
)

HOSTILE = ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", 'a, "b"\nc', r"\input{x}", "[2ex]", "a | b & <b>"]


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_run_as_csv_has_every_model_with_all_digits() -> None:
    rows = rows_of(results_as("csv", [judged_record()]))
    assert [row["role"] for row in rows] == ["teacher", "student_before", "student"]
    student = rows[2]
    assert (student["accuracy"], student["accuracy_low"], student["accuracy_high"]) == ("0.76", "0.731", "0.788")
    assert (float(student["kept"]), student["kept_low"], student["kept_high"]) == (0.76 / 0.8, "0.923", "0.978")
    assert (student["kl"], student["parameters"], student["seed"], student["test_rows"]) == (
        "0.1234", "5000000", "13", "859",
    )  # fmt: skip
    assert rows[1]["matthews_correlation"] == "", "not defined"
    assert rows[0]["kept"] == ""


def test_several_runs_are_told_apart_and_models_show_no_folders() -> None:
    text = results_as("csv", [rivals_record(), rivals_record(), generation_record()])
    rows = rows_of(text)
    assert {row["run"] for row in rows} == {"tiny run #1", "tiny run #2", "tiny run #3"}
    assert {row["model"] for row in rows if row["role"] == "rival"} == {"teacher in int8", "small"}
    assert "models/small" not in text
    assert results_as("markdown", [rivals_record()]).startswith("| model | accuracy \\[95% interval\\] |")
    assert results_as("markdown", [rivals_record(), rivals_record()]).startswith("| run | model |")


def test_a_comparison_has_its_means_and_in_csv_each_student() -> None:
    rows = rows_of(results_as("csv", [contrasted_record()]))
    units = next(row for row in rows if row["method"] == "units" and not row["seed"])
    assert (units["accuracy"], units["difference"], units["difference_low"], units["holm_p"]) == (
        "0.76", "0.06", "0.02", "0.0312",
    )  # fmt: skip
    assert float(units["accuracy_low"]) == pytest.approx(0.76 - 12.7062 * 0.01, abs=1e-4), "Student's t of two seeds"
    assert [(row["seed"], row["accuracy"]) for row in rows if row["method"] == "units"][1:] == [
        ("0", "0.75"),
        ("1", "0.77"),
    ]
    printed = results_as("markdown", [compare_record()])
    assert "| units | 2 | 0.760 \\[0.633, 0.887\\] | 0.014 | +0.060 \\[+0.020, +0.100\\] | 0.03 |" in printed
    assert len(printed.split("\n\n")[0].splitlines()) == 2 + 4, "a teacher and three methods"
    assert r"+0.040 [$-$0.010, +0.090]" in results_as("latex", [compare_record()])


def test_sizes_have_their_shares_and_the_knee() -> None:
    rows = rows_of(results_as("csv", [sizes_record()]))
    assert [row["size"] for row in rows][-2:] == ["teacher", "most frequent class"]
    assert [row["is_knee"] for row in rows].count("knee") == 1
    assert "| size 0.2 | knee | 0.750 \\[0.740, 0.760\\] | 93.8% \\[92.5%, 95.0%\\] |" in results_as(
        "markdown", [sizes_record()]
    )


def test_text_of_users_is_text_in_every_format() -> None:
    baselines = {name: {"accuracy": -0.5} for name in HOSTILE}
    record = compare_record(baselines=baselines, name=HOSTILE[0])
    rows = rows_of(results_as("csv", [record]))
    methods = [row["method"] for row in rows[1 : 1 + len(HOSTILE)]]
    assert methods == [f"'{text}" if text[0] in "=+-@\t" else text for text in HOSTILE]
    assert not any(cell.startswith(("=", "+", "@", "\t")) for row in rows for cell in row.values())
    assert {row["accuracy"] for row in rows[1 : 1 + len(HOSTILE)]} == {"-0.5"}, "a number stays a number"

    latex = results_as("latex", [record, record])
    lines = latex.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {latex.count("&", 0, latex.index("\\\\\n"))}
    assert all(line.endswith(r" \\") and not line.startswith(("[", "*")) for line in lines)
    assert r"\textbackslash{}input\{x\}" in latex
    assert latex_text("50% of_$x$ #1 ~ ^") == r"50\% of\_\$x\$ \#1 \textasciitilde{} \textasciicircum{}"

    markdown = results_as("markdown", [record])
    table = markdown.split("\n\n")[0].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert not re.search(r"(?<!\\)<", markdown)


def test_what_does_not_stand_side_by_side_is_refused_by_name(tmp_path) -> None:
    records = {"record.json": judged_record(), "compare.json": compare_record(), "sizes.json": sizes_record()}
    for name, record in records.items():
        record.write(tmp_path / name)
    files = [tmp_path / name for name in records]
    with pytest.raises(RecipeError, match=r"record.json is a run, .*compare.json is a comparison, .* several sizes"):
        read_records(files)
    for name, record in records.items():
        assert read_records([tmp_path / name]) == [record]
        write_page([record], tmp_path / f"{name}.html")
    with pytest.raises(RecipeError, match="2 records, each of a comparison"):
        write_page([compare_record(), compare_record()], tmp_path / "page.html")
    with pytest.raises(RecipeError, match=r"--format: unknown format 'cvs'\. Known: csv, latex, markdown"):
        results_as("cvs", [compare_record()])
    assert "Contrasts were named after results" in results_as(
        "latex", [dataclasses.replace(contrasted_record(), named_after_results=True)]
    )
