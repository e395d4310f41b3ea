"""What cut weights are multiplied by, so that a narrower model does not change what its code does with its width."""

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.models.families import family_of
from flexkd.models.family import module_pattern
from flexkd.models.importance import Kept, Means


class Scales:
    """Factors of a student's weights, each with its reason.

    - A norm divides by the root mean square of k units now instead of d: `sqrt(share * d / k)`, share being the part
      of the sum of squares that the kept units hold. Without a measured share it is taken to be k / d.
    - Code that multiplies a module's output by `width ** p`: the module's weight takes `(d / k) ** p`.
    - Where the output embeddings are tied to such embeddings, the norm before them takes the inverse.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, kept: Kept, means: Means) -> None:
        self._family = family_of(teacher)
        self._config = teacher.config
        self._kept = kept
        self._means = means
        self._shrinkage = getattr(teacher.config, self._family.hidden_key) / len(kept.residual)
        head = student.get_output_embeddings()
        self._is_tied = head is not None and head.weight is student.get_input_embeddings().weight

    def scaled(self, name: str, weight: Float[Tensor, "*shape"], block: int | None) -> Float[Tensor, "*shape"]:
        """A cut parameter times its factors; the same tensor where there are none.

        Args:
            name: Of the parameter in the teacher.
            weight: What was kept of it.
            block: Number of the student's block that it goes to.
        """
        module, _, leaf = name.rpartition(".")
        factor = self._width_factor(module)
        if leaf != "weight" or not self._is_norm(module):
            return weight if factor == 1 else weight * factor
        factor *= self._norm_factor(module, block)
        if factor == 1:
            return weight
        offset = self._family.norm_offset
        return ((weight.double() + offset) * factor - offset).to(weight.dtype)

    def _is_norm(self, module: str) -> bool:
        return len(self._family.module_axes(module, self._config) or ()) == 1

    def _width_factor(self, module: str) -> float:
        powers = self._family.width_powers
        factor = self._shrinkage ** powers.get(module_pattern(module), 0.0)
        if self._is_tied and module == self._family.final_norm:
            factor /= self._shrinkage ** sum(powers.values())
        return float(factor)

    def _norm_factor(self, module: str, block: int | None) -> float:
        if module not in self._means:
            return 1.0
        shares = self._means[module]
        if shares.ndim == 0:
            return float((shares * self._shrinkage).sqrt())
        (axis,) = self._family.module_axes(module, self._config) or ()
        kept = self._kept.along(axis, block)
        assert kept is not None, module
        return float((shares[kept].mean() * len(shares)).sqrt())
