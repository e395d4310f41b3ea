"""Factors of cut weights, which make up for what a model's code does with its width."""

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.facts.families.row import module_pattern
from flexkd.models.forward.families import family_of
from flexkd.models.slicing.axes import TeacherIndices
from flexkd.models.slicing.importance import Means


class Scales:
    """Factors of a student's weights, each with its reason.

    - A norm divides by the root mean square of k units now instead of d: `sqrt(share * d / k)`, share being the part
      of the sum of squares that the kept units hold. Without a measured share it is taken to be k / d.
    - Code that multiplies a module's output by `width ** p`: the module's weight takes `(d / k) ** p`.
    - Where the output embeddings are tied to the input embeddings, they take the factor of those, and the norm before
      them makes up for it and for a factor of their own.
    """

    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, indices: TeacherIndices, means: Means
    ) -> None:
        self._family = family_of(teacher)
        self._config = teacher.config
        self._indices = indices
        self._means = means
        self._shrinkage = getattr(teacher.config, self._family.hidden_key) / len(indices.residual)
        switch = self._family.width_powers_key
        is_switched_off = switch is not None and not getattr(teacher.config, switch)
        self._powers = {} if is_switched_off else self._family.width_powers
        self._norm_power = self._power_of_final_norm(student)

    def scaled(self, name: str, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A cut parameter times its factors; the same tensor where there are none.

        Args:
            name: The parameter's name in the student.
            weight: The teacher's parameter, cut.
        """
        module, _, leaf = name.rpartition(".")
        factor = self._width_factor(module)
        if leaf != "weight" or not self._is_norm(module):
            return weight if factor == 1 else weight * factor
        factor *= self._norm_factor(module)
        if factor == 1:
            return weight
        offset = self._family.norm_offset
        return ((weight.double() + offset) * factor - offset).to(weight.dtype)

    def _is_norm(self, module: str) -> bool:
        return len(self._family.module_axes(module, self._config) or ()) == 1

    def _power_of_final_norm(self, student: PreTrainedModel) -> float:
        head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
        if head is None or head.weight is not embeddings.weight:
            return 0.0
        power = {module: self._powers.get(name, 0.0) for name, module in student.named_modules()}
        return power[head] - power[embeddings]

    def _width_factor(self, module: str) -> float:
        pattern = module_pattern(module)
        power = self._powers.get(pattern, 0.0)
        # BART norms after each sum, so that the head reads the last norm of the last block.
        if pattern == self._family.final_norm and (pattern == module or self._indices.is_last_block(module)):
            power += self._norm_power
        return float(self._shrinkage**power)

    def _norm_factor(self, module: str) -> float:
        shares = self._means.get(self._indices.teacher_name(module))
        if shares is None:
            return 1.0
        if shares.ndim == 0:
            return float((shares * self._shrinkage).sqrt())
        (axis,) = self._family.module_axes(module, self._config) or ()
        units = self._indices.along(axis, module)
        assert units is not None, module
        return float((shares[units].mean() * len(shares)).sqrt())
