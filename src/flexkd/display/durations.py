"""Times and rates in words, the same in bars, in lines and in the log file."""


def duration_text(seconds: float) -> str:
    """A time in words, as exact as it needs to be.

    Example:
        >>> duration_text(42.3), duration_text(200), duration_text(8000)
        ('42 s', '3 min', '2 h 13 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def rate_text(rate: float, unit: str) -> str:
    """How many are done in a second, or how long each takes.

    Args:
        rate: In a second; 0 where nothing is done yet.
        unit: Of many, as "steps".

    Example:
        >>> rate_text(12.34, "rows"), rate_text(0.2, "steps"), rate_text(0, "steps")
        ('12.3 rows/s', '5.0 s/step', '')
    """
    if rate <= 0:
        return ""
    if rate >= 1:
        return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.1f} {unit}/s"
    single = unit.removesuffix("es") if unit.endswith("ches") else unit.removesuffix("s")
    return f"{duration_text(1 / rate) if rate <= 0.01 else f'{1 / rate:.1f} s'}/{single}"
