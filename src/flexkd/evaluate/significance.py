"""What the contrasts of a comparison allow to say, in sentences, the same in the terminal and on the page."""

import statistics

from flexkd.compare_record import CompareRecord
from flexkd.display.durations import duration_text
from flexkd.facts.seeds import seeds_in_words, seeds_text


def changed_seeds_text(record: CompareRecord) -> str:
    """Which seeds were added or left out after results were there; empty where the first plan was kept."""
    changes = ((record.late_seeds, "added"), (record.left_out_seeds, "left out"))
    return " and ".join(f"{seeds_in_words(seeds)} {change} after results" for seeds, change in changes if seeds)


def seed_notes(record: CompareRecord) -> list[str]:
    """What seeds that were changed after results mean for the differences, in sentences; none where none were."""
    changed = changed_seeds_text(record)
    if not changed:
        return []
    return [
        f"With {changed}: whoever chooses seeds by results finds differences too often, and no p value here counts "
        f"that. To test a difference, train other seeds in a new output folder. {seed_price(record)}".rstrip()
    ]


def seed_price(record: CompareRecord) -> str:
    """What another seed of all methods takes, by those that were trained; empty where it is not known."""
    seconds = sum(
        statistics.fmean(cell.seconds for cell in record.cells if cell.method == method)
        for method in {cell.method for cell in record.cells}
    )
    if not seconds:
        return ""
    return (
        f"Another seed of the {len(record.methods)} methods takes about {duration_text(float(seconds))}, as these did."
    )


def contrast_notes(record: CompareRecord) -> list[str]:
    """What the contrasts of a comparison allow to say, in sentences; none for a record without contrasts.

    'Significant' is said of a contrast only where the exact test is at the level after Holm's correction, and never of
    contrasts that were named after results. Where the seeds are too few, whatever the values, the number that would do
    is named.
    """
    if not record.contrasts or record.level is None or record.smallest_p_value is None:
        return []
    num_contrasts, num_seeds, level = len(record.contrasts), len(record.seeds), f"{record.level:.0%} level"
    notes = [seeds_text(num_seeds, num_contrasts)]
    significant = [contrast for contrast in record.contrasts if record.is_significant(contrast)]
    if record.named_after_results:
        notes.append(
            "The contrasts were named after results were there: their p values are exploratory and test nothing. To "
            "test them, name them in compare.contrasts and train other seeds in a new output folder."
        )
    elif num_contrasts * record.smallest_p_value > record.level:
        notes.append(
            f"That is above the {level}: with fewer than {record.fewest_seeds} seeds, chance alone may explain any "
            "difference."
        )
    elif significant:
        names = "; ".join(f"{contrast.name} ({contrast.holm_p_value:.2g})" for contrast in significant)
        others = " Chance alone may explain the others." if len(significant) < num_contrasts else ""
        notes.append(f"Significant at the {level}: {names}.{others}")
    else:
        notes.append(f"No contrast is at the {level}: chance alone may explain each difference.")
    notes.append(
        f"Seeds needed: for a paired t-test to find such an effect at the {level} in 4 of 5 comparisons, if it is real"
        f", and for the exact test to be able to. {seed_price(record)}".rstrip()
    )
    return notes
