"""What the contrasts of a comparison allow to say, in sentences, the same in the terminal and on the page."""

from flexkd.facts.seeds import seeds_text
from flexkd.record import CompareRecord


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
        ", and for the exact test to be able to."
    )
    return notes
