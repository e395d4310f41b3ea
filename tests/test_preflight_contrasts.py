"""What a check says of a comparison before it runs: that its seeds are too few, or its contrasts named too late."""

import json
from pathlib import Path

import pytest

from flexkd.errors import ArtifactError
from flexkd.preflight import preflight
from flexkd.preflight.contrasts import are_late, first_contrasts
from flexkd.record import CompareRecord
from tests.job_files import job

PAIRS = [("flexkd", "logit_kd"), ("logit_kd", "fine_tuning")]


@pytest.mark.parametrize(
    ("seeds", "pairs", "note"),
    [
        (
            [0, 1, 2],
            PAIRS,
            "compare.seeds: with 3 seeds no difference can be significant, whatever the results. The smallest exact p "
            "that 3 seeds can give is 0.25; after Holm's correction for 2 contrasts it is 0.5. Give 7 or more.",
        ),
        (
            [0, 1, 2, 3, 4],
            PAIRS[:1],
            "compare.seeds: with 5 seeds no difference can be significant, whatever the results. The smallest exact p "
            "that 5 seeds can give is 0.062. Give 6 or more.",
        ),
        ([0, 1, 2, 3, 4, 5], PAIRS[:1], None),
        ([0, 1, 2, 3, 4, 5, 6], PAIRS, None),
    ],
)
def test_a_check_says_that_seeds_are_too_few(tmp_path, seeds, pairs, note) -> None:
    section = {"methods": ["fine_tuning", "logit_kd", "flexkd"], "seeds": seeds, "contrasts": pairs}
    notes = [
        text for text in preflight(job(tmp_path, scores__rows=8, compare=section)).notes if text.startswith("compare.")
    ]
    assert notes == ([] if note is None else [note])


def test_contrasts_count_that_were_named_before_the_first_student_was_finished(tmp_path: Path) -> None:
    assert first_contrasts(tmp_path, PAIRS) == PAIRS
    named = tmp_path / "contrasts.json"
    named.write_text(json.dumps(PAIRS))
    assert not are_late(tmp_path, PAIRS[:1]), "nothing is finished, so that they may still change"
    (tmp_path / "cells" / "flexkd-0").mkdir(parents=True)
    (tmp_path / "cells" / "flexkd-0" / "cell.json").write_text("{}")
    assert are_late(tmp_path, PAIRS[:1])
    assert are_late(tmp_path, [*PAIRS, ("flexkd", "fine_tuning")])
    assert not are_late(tmp_path, [("fine_tuning", "logit_kd"), PAIRS[0]]), "the same, in another order"
    named.write_text("{")
    with pytest.raises(ArtifactError, match=r"contrasts\.json: cannot be read .* Choose another output folder\."):
        first_contrasts(tmp_path, PAIRS)
    named.unlink()
    assert are_late(tmp_path, PAIRS), "an earlier version was interrupted, and did not write them down"


def test_a_finished_comparison_of_an_earlier_version_judged_what_its_record_says(tmp_path: Path) -> None:
    methods = ["fine_tuning", "logit_kd", "flexkd"]
    CompareRecord("accuracy", "single_label", methods, [0, 1], [], "fine_tuning", [], {}).write(
        tmp_path / "compare.json"
    )
    assert first_contrasts(tmp_path, PAIRS) == [("logit_kd", "fine_tuning"), ("flexkd", "fine_tuning")]
    assert are_late(tmp_path, PAIRS)


def test_a_check_says_that_contrasts_are_named_too_late(tmp_path: Path) -> None:
    recipe = job(tmp_path, scores__rows=8, compare={"methods": ["fine_tuning", "flexkd"], "seeds": list(range(6))})
    recipe.folder.mkdir()
    CompareRecord("accuracy", "single_label", ["cka", "flexkd"], [0], [], "cka", [], {}).write(
        recipe.folder / "compare.json"
    )
    (note,) = [text for text in preflight(recipe).notes if text.startswith("compare.")]
    assert note == (
        f"compare.contrasts: {recipe.folder} holds results, from before these contrasts were named: their p values "
        "will be called exploratory. To test them, train other seeds in a new output folder."
    )
