"""How many seeds a comparison needs: with too few, no result of its exact test can be significant."""

from collections.abc import Sequence
from itertools import count
from typing import Final

LEVEL: Final = 0.05
"""A difference counts where a true one of 0 would give such a small p in at most this share of comparisons."""


def smallest_p_value(num_pairs: int) -> float:
    """The smallest two-sided p of the sign-flip test, 2 / 2^n: all differences have one sign.

    Example:
        >>> [smallest_p_value(num_pairs) for num_pairs in (2, 3, 5)]
        [0.5, 0.25, 0.0625]
    """
    return 2.0 ** (1 - num_pairs)


def fewest_seeds(num_contrasts: int) -> int:
    """The number of seeds below which no p of the sign-flip test can be at the level after Holm's correction.

    Example:
        >>> [fewest_seeds(num_contrasts) for num_contrasts in (1, 2, 3, 4, 5, 10)]
        [6, 7, 7, 8, 8, 9]
    """
    return next(num_seeds for num_seeds in count(2) if num_contrasts * smallest_p_value(num_seeds) <= LEVEL)


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Seeds by their numbers.

    Example:
        >>> print(seeds_in_words([3]), "and", seeds_in_words([4, 5]))
        seed 3 and seeds 4, 5
    """
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


def seeds_text(num_seeds: int, num_contrasts: int) -> str:
    """What the smallest p of so many seeds is, and what Holm's correction makes of it, as a sentence.

    Example:
        >>> print(seeds_text(6, 3))
        The smallest exact p that 6 seeds can give is 0.031; after Holm's correction for 3 contrasts it is 0.094.
    """
    smallest = smallest_p_value(num_seeds)
    limit = f"The smallest exact p that {num_seeds} seeds can give is {smallest:.2g}"
    corrected = min(1.0, num_contrasts * smallest)
    correction = f"; after Holm's correction for {num_contrasts} contrasts it is {corrected:.2g}"
    return f"{limit}{correction if num_contrasts > 1 else ''}."
