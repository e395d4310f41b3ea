"""Record of `flexkd compare`, to and from JSON: methods x seeds, their statistics, and when what was named."""

from dataclasses import dataclass, field

from flexkd.strict_json import FORMAT, Number, Record, StoredRecord


@dataclass(frozen=True)
class CompareCell(Record):
    """One method under one seed.

    Attributes:
        metrics: Of the test rows; `validation_<metric>` is that of the best checkpoint.
        evaluations: As in `RunRecord`, without values that are not finite; empty in records of earlier versions.
    """

    method: str
    seed: int
    metrics: dict[str, Number | None]
    seconds: Number
    evaluations: list[dict[str, Number]] = field(default_factory=list)


@dataclass(frozen=True)
class PairedDifference(Record):
    """One method over all seeds: mean and sample standard deviation, and the paired difference to the reference.

    Attributes:
        difference: Mean difference, seed by seed; None for the reference itself, as the next three.
        low: Lower end of its 95 % confidence interval; None also where all differences are equal, as the next two.
        high: Upper end.
        p_value: Of a paired t-test.
    """

    method: str
    mean: Number | None
    std: Number | None
    difference: Number | None
    low: Number | None
    high: Number | None
    p_value: Number | None


@dataclass(frozen=True)
class Contrast(Record):
    """Two methods that were to be compared before any student was trained, seed by seed.

    Attributes:
        difference: Mean of the method's value minus the reference's; None where a value is not defined, as all below.
        low: Lower end of its 95 % confidence interval; None also where all differences are equal, as the next two.
        high: Upper end.
        p_value: Of a paired t-test.
        exact_p_value: Of the sign-flip test: the share of all patterns of signs with a mean as far from 0.
        holm_p_value: The exact one, corrected for the number of contrasts.
        effect_size: Mean difference in standard deviations of the differences; None also where all are equal.
        seeds_needed: For a paired t-test to find such an effect with 80 % power; None also where the difference is 0.
    """

    method: str
    reference: str
    difference: Number | None = None
    low: Number | None = None
    high: Number | None = None
    p_value: Number | None = None
    exact_p_value: Number | None = None
    holm_p_value: Number | None = None
    effect_size: Number | None = None
    seeds_needed: int | None = None

    @property
    def name(self) -> str:
        """The two methods in words."""
        return f"{self.method} against {self.reference}"


@dataclass(frozen=True)
class RowContrast(Record):
    """Two methods compared on the same test rows.

    Attributes:
        metric: A mean over rows: accuracy, subset_accuracy, mse or a ROUGE.
        rows: Number of test rows.
        better: Rows on which the method is better than the reference with the same seed, a mean over seeds; of a
            classifier those that it repairs: right, where the reference is wrong.
        worse: Likewise; of a classifier those that it breaks.
        rows_better: Rows on which the method is better in the sum over all seeds.
        rows_worse: Likewise.
        p_value: Of the exact sign test of the two; with one seed and right or wrong answers, McNemar's exact test.
        difference: Mean over rows and seeds of the method's value minus the reference's.
        low: Lower end of its 95 % interval over resampled rows, the same rows for all methods, the same students.
        high: Upper end.
    """

    method: str
    reference: str
    metric: str
    rows: int
    better: Number
    worse: Number
    rows_better: int
    rows_worse: int
    p_value: Number
    difference: Number
    low: Number
    high: Number

    @property
    def name(self) -> str:
        """The two methods in words."""
        return f"{self.method} against {self.reference}"


@dataclass(frozen=True)
class CompareRecord(StoredRecord):
    """Methods x seeds under one recipe, with paired statistics.

    Attributes:
        paired: Of each method, over its seeds.
        teacher: Metrics of the teacher.
        baselines: Metrics of what needs no model, by name.
        contrasts: Named before the run; empty in records of earlier versions.
        level: A contrast whose corrected p is above it may be chance; None without contrasts, as the next two.
        smallest_p_value: The smallest exact p that this number of seeds can give.
        fewest_seeds: With fewer, no contrast can be at the level.
        row_contrasts: Every method against the reference, and every contrast, row by row; empty in records of earlier
            versions.
        named_after_results: Whether a student was finished before these contrasts were named: their p-values are
            exploratory then. False in records of earlier versions, which did not look.
        late_seeds: Those of the seeds that were added after a student was finished; empty in records of earlier
            versions, which did not look.
        left_out_seeds: Seeds that were named before that, and have no part in this comparison; likewise.
    """

    metric: str
    problem: str
    methods: list[str]
    seeds: list[int]
    cells: list[CompareCell]
    reference: str
    paired: list[PairedDifference]
    teacher: dict[str, Number | None]
    name: str = "comparison"
    created: str = ""
    recipe: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    baselines: dict[str, dict[str, Number | None]] = field(default_factory=dict)
    contrasts: list[Contrast] = field(default_factory=list)
    level: Number | None = None
    smallest_p_value: Number | None = None
    fewest_seeds: int | None = None
    row_contrasts: list[RowContrast] = field(default_factory=list)
    named_after_results: bool = False
    late_seeds: list[int] = field(default_factory=list)
    left_out_seeds: list[int] = field(default_factory=list)
    format: int = FORMAT

    def is_significant(self, contrast: Contrast) -> bool:
        """Whether the exact test of a contrast is at the level, after the correction for the number of contrasts.

        Never where the contrasts were named after results.
        """
        if self.named_after_results or self.level is None or contrast.holm_p_value is None:
            return False
        return contrast.holm_p_value <= self.level

    def seeds_needed(self, contrast: Contrast) -> int | None:
        """Seeds to find the effect of a contrast by a t-test, and no fewer than can bring any contrast to the level."""
        if contrast.seeds_needed is None or self.fewest_seeds is None:
            return contrast.seeds_needed
        return max(contrast.seeds_needed, self.fewest_seeds)

    def contrast(self, first: str, second: str) -> Contrast | None:
        """The contrast of two methods, in whichever order it was named; None where it was not."""
        return next((entry for entry in self.contrasts if {entry.method, entry.reference} == {first, second}), None)
