"""How many predictions have their logits in memory at a time while a student trains."""

from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedModel

from flexkd.errors import RecipeError
from flexkd.models.forward.head import check_head, head_is_known
from flexkd.models.forward.hidden import is_generative, model_inputs

CHUNK_BYTES: Final = 3 * 2**23
"""Logits of one chunk in float32; `auto` leaves batches with fewer whole. Below 32 MiB the allocator of glibc reuses
the same memory; above, every tensor is fetched from the kernel and cleared, which doubles the time of a loss."""


def chunk_size(setting: int | str, outputs: int, predictions: int) -> int | None:
    """Predictions of a chunk, by a setting as `LogitChunks` takes it; None: all of them."""
    if setting != "auto":
        return None if setting == "off" else int(setting)
    bytes_of_prediction = 4 * outputs
    if predictions * bytes_of_prediction <= CHUNK_BYTES:
        return None
    return max(CHUNK_BYTES // bytes_of_prediction, 1)


class LogitChunks:
    """Chooses the size of chunks for each batch.

    Args:
        model: The student.
        setting: A number of predictions; `auto`: as many as `CHUNK_BYTES` hold, where a batch has more; `off`: all.

    Raises:
        RecipeError: It is none of these.
    """

    def __init__(self, model: PreTrainedModel, setting: int | str) -> None:
        is_size = isinstance(setting, int) and not isinstance(setting, bool) and setting > 0
        if setting not in ("auto", "off") and not is_size:
            raise RecipeError(f"logit_chunk: must be 'auto', 'off' or a whole number from 1, was {setting!r}.")
        self.model = model
        self.setting = setting
        self._outputs: int | None = None

    def size(self, inputs: Mapping[str, Any], predictions: int) -> int | None:
        """Predictions of a chunk; None: all logits of the batch are in memory.

        Raises:
            UnsupportedModelError: A size is set, and the model does something unknown to its head's output.
        """
        if self.setting == "off" or not is_generative(self.model):
            return None
        if self._outputs is None:
            self._outputs = self._num_outputs(inputs)
        if self._outputs == 0:
            return None
        return chunk_size(self.setting, self._outputs, predictions)

    def _num_outputs(self, batch: Mapping[str, Any]) -> int:
        """Outputs of the head; 0 where it is not known what the model does to them."""
        inputs = model_inputs(self.model, batch)
        if self.setting != "auto":
            check_head(self.model, inputs)
        elif not head_is_known(self.model, inputs, who="student"):
            return 0
        return int(self.model.config.get_text_config(decoder=True).vocab_size)
