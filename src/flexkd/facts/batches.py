"""How the rows of an optimizer step divide into forward passes, and into processes."""

from flexkd.errors import RecipeError


def device_batch(
    batch_size: int, per_device_batch_size: int | None, num_processes: int, *, where: str = "training"
) -> tuple[int, int]:
    """Rows of one forward pass of one process, and how many of them accumulate to one step.

    Args:
        batch_size: Rows of a step over all processes.
        per_device_batch_size: Rows of a forward pass; None: as few passes as there can be.
        num_processes: Processes that train together.
        where: The section of the recipe, for messages.

    Raises:
        RecipeError: The rows of a step do not divide into passes and processes.
    """
    rows = per_device_batch_size or max(batch_size // num_processes, 1)
    accumulation, rest = divmod(batch_size, rows * num_processes)
    if rest or accumulation == 0:
        raise RecipeError(
            f"{where}.batch_size: {batch_size} does not divide into {num_processes} processes of {rows} rows. Choose "
            f"a multiple of {rows * num_processes}."
        )
    return rows, accumulation
