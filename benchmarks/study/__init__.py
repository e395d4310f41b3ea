"""The study: from which mismatch of widths on a choice by function is better than chance, and than its rivals.

    python -m benchmarks.study teacher       trains the small teacher, once
    python -m benchmarks.study cells         the list of cells, what each costs, and the rules, written before the runs
    python -m benchmarks.study run           runs the missing cells, one by one, for --minutes
    python -m benchmarks.study page          writes docs/results/study/README.md from the results file

The question, the rules and the list stand in `plans/study.yaml`; a setting is a recipe in `recipes/`. Another plan is
named in front: `python -m benchmarks.study --plan decisions run`.
"""
