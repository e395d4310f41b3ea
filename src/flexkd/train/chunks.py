"""How many predictions' logits stand in memory together."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedModel

from flexkd.errors import UnsupportedModelError
from flexkd.models.head import check_head
from flexkd.models.hidden import is_generative, model_inputs

logger = logging.getLogger(__name__)

CHUNK_BYTES: Final = 2**26
"""Logits of one chunk in float32; `auto` leaves batches with fewer whole."""


def predictions_together(outputs: int) -> int:
    """How many predictions' logits `CHUNK_BYTES` hold; at least one."""
    return max(CHUNK_BYTES // (4 * outputs), 1)


class LogitChunks:
    """Chooses the size of chunks for each batch.

    Args:
        model: The student.
        setting: A number of predictions; `auto`: as many as `CHUNK_BYTES` hold, where a batch has more; `off`: all.
    """

    def __init__(self, model: PreTrainedModel, setting: int | str) -> None:
        self.model = model
        self.setting = setting
        self._outputs: int | None = None

    def size(self, inputs: Mapping[str, Any], predictions: int) -> int | None:
        """Predictions of a chunk; None: all logits of the batch stand in memory.

        Raises:
            UnsupportedModelError: A size was asked for, and the model does something unknown to its head's output.
        """
        if self.setting == "off" or not is_generative(self.model):
            return None
        if self._outputs is None:
            self._outputs = self._known_outputs(inputs)
        if self._outputs == 0:
            return None
        if self.setting != "auto":
            return int(self.setting)
        together = predictions_together(self._outputs)
        return None if predictions <= together else together

    def _known_outputs(self, inputs: Mapping[str, Any]) -> int:
        """Outputs of the head; 0 where it is not known what the model does to them."""
        try:
            check_head(self.model, model_inputs(self.model, inputs))
        except UnsupportedModelError as error:
            if self.setting != "auto":
                raise
            logger.info("student: whole logits stand in memory. %s", error)
            return 0
        return int(self.model.config.get_text_config(decoder=True).vocab_size)
