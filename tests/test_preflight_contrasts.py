"""What a check says of a comparison before it runs: that its seeds are too few, or its contrasts named too late."""

import json
from pathlib import Path

import pytest

from flexkd.compare_record import CompareRecord
from flexkd.errors import ArtifactError
from flexkd.preflight import preflight
from flexkd.preflight.contrasts import are_late, changed_seeds, first_contrasts
from flexkd.recipe import override_recipe
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
    CompareRecord("accuracy", "single_label", ["cka", "flexkd"], list(range(6)), [], "cka", [], {}).write(
        recipe.folder / "compare.json"
    )
    (note,) = [text for text in preflight(recipe).notes if text.startswith("compare.")]
    assert note == (
        f"compare.contrasts: {recipe.folder} holds results, from before these contrasts were named: their p values "
        "will be called exploratory. To test them, train other seeds in a new output folder."
    )


def test_seeds_count_as_planned_that_were_named_before_the_first_student_was_finished(tmp_path: Path) -> None:
    assert changed_seeds(tmp_path, [0, 1]) == ([], [])
    (tmp_path / "seeds.json").write_text("[0, 1, 2]")
    assert changed_seeds(tmp_path, [0, 5]) == ([], []), "nothing is finished, so that they may still change"
    (tmp_path / "cells" / "flexkd-0").mkdir(parents=True)
    (tmp_path / "cells" / "flexkd-0" / "cell.json").write_text("{}")
    assert changed_seeds(tmp_path, [2, 1, 0]) == ([], [])
    assert changed_seeds(tmp_path, [0, 1, 3, 4]) == ([3, 4], [2])
    (tmp_path / "seeds.json").write_text("[")
    with pytest.raises(ArtifactError, match=r"seeds\.json: cannot be read .* Choose another output folder\."):
        changed_seeds(tmp_path, [0])
    (tmp_path / "seeds.json").unlink()
    assert changed_seeds(tmp_path, [0, 3]) == ([], []), "an earlier version did not write them down"
    CompareRecord("accuracy", "single_label", ["a", "b"], [0, 1], [], "a", [], {}).write(tmp_path / "compare.json")
    assert changed_seeds(tmp_path, [0, 3]) == ([3], [1]), "but its record has those that it finished with"


def test_a_check_says_that_seeds_are_added_too_late(tmp_path: Path) -> None:
    section = {"methods": ["logit_kd", "flexkd"], "seeds": [0, 1, 2, 3, 4, 5, 7]}
    recipe = job(tmp_path, scores__rows=8, compare=section)
    recipe.folder.mkdir()
    (recipe.folder / "contrasts.json").write_text('[["flexkd", "logit_kd"]]')
    (recipe.folder / "seeds.json").write_text("[0, 1, 2, 3, 4, 6]")
    CompareRecord("accuracy", "single_label", ["logit_kd", "flexkd"], [0], [], "logit_kd", [], {}).write(
        recipe.folder / "compare.json"
    )
    (note,) = [text for text in preflight(recipe).notes if text.startswith("compare.")]
    assert note == (
        f"compare.seeds: {recipe.folder} holds results, from before seeds 5, 7 were added and seed 6 was left out: "
        "record and page will say so, for no p value counts that seeds are chosen by results. To test a difference, "
        "train other seeds in a new output folder."
    )
    fresh = override_recipe(recipe, [f"output={recipe.folder}-new"])
    assert not [text for text in preflight(fresh).notes if text.startswith("compare.")]
