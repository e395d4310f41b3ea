"""The built-in methods of `flexkd compare`: what each changes in a recipe."""

from typing import Final

_WHOLE_STATES: Final = (
    "objective.features.basis=auto",
    "objective.features.chosen_by=null",
    "objective.features.mapping=index",
)
"""Nothing is chosen of what is taught."""
_WITHOUT_PROJECTOR: Final = "objective.features.projector=null"
_CUT_IS_TAUGHT: Final = _WHOLE_STATES
"""What is taught is what the student is cut by."""
CHOICES: Final = ("random", "variance", "activation", "lowest")
"""Choices in place of the scores, each with a row for each question that a comparison may ask."""

_DIVERGENCES: Final = ("reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl")
"""Logit losses in place of the recipe's, each with a row without features and one with them."""

METHODS: Final[dict[str, tuple[str, ...]]] = {
    "fine_tuning": (
        "objective.logits=null",
        "objective.features=null",
        "objective.baseline=true",
        "objective.task.weight=1",
    ),
    "logit_kd": ("objective.features=null",),
    "entropy_positions": ("objective.features=null", "objective.logits.entropy_share=0.2"),
    **{loss: ("objective.features=null", f"objective.logits.loss={loss}") for loss in _DIVERGENCES},
    "projector": ("objective.features.loss=projector", *_WHOLE_STATES),
    "projector_exact": (
        "objective.features.loss=projector",
        *_WHOLE_STATES,
        "objective.features.projector={learning_rate: 1.0e-3, standardize: true, start: cut}",
    ),
    "projector_heads": (
        "objective.features.loss=projector",
        *_WHOLE_STATES,
        "objective.features.projector={learning_rate: 1.0e-3, standardize: true, start: heads}",
    ),
    **{
        loss: (f"objective.features.loss={loss}", *_WHOLE_STATES, _WITHOUT_PROJECTOR)
        for loss in ("cka", "procrustes", "gram", "distill_lens", "functional_cka")
    },
    "cosine": ("objective.features.loss=cosine", _WITHOUT_PROJECTOR),
    "mse": ("objective.features.loss=mse", _WITHOUT_PROJECTOR),
    "flexkd": (),
    **{f"flexkd_{choice}": (f"student.chosen_by={choice}",) for choice in CHOICES},
    **{f"flexkd_{loss}": (f"objective.logits.loss={loss}",) for loss in _DIVERGENCES},
    **{f"logit_kd_{choice}": (f"student.chosen_by={choice}", "objective.features=null") for choice in CHOICES},
    "scored_features": ("objective.features.chosen_by=scores", "objective.features.mapping=matched"),
    **{
        f"{choice}_features": (f"objective.features.chosen_by={choice}", "objective.features.mapping=matched")
        for choice in CHOICES
    },
    "pca_directions": ("student.basis=rotated", "student.chosen_by=variance", *_CUT_IS_TAUGHT),
    "scored_directions": ("student.basis=rotated", "student.chosen_by=scores", *_CUT_IS_TAUGHT),
    "mixed_directions": ("student.basis=rotated", "student.chosen_by=mixed", *_CUT_IS_TAUGHT),
}
"""Built-in method -> overrides of the recipe, which itself describes `flexkd`.

`flexkd_X` cuts the student by X in place of the scores and teaches what it is cut by; where the student is not cut, it
teaches what X chooses. `logit_kd_X` has the same start and no features, so that the two tell start and features apart.
`X_features` starts as `flexkd` does and teaches what X chooses, paired by similarity; `scored_features`, which teaches
what the scores choose in the same way, is what they are compared with. `pca_directions` and `scored_directions` cut and
teach the principal directions with the most variance and with the highest scores, `mixed_directions` the leading ones
of variance and function added up, as `flexkd` does where a student is cut along directions. `projector` is a learned
map as the recipe sets it up, by default random and under the student's learning rate, `projector_exact` one that begins
with the way back from the cut, `projector_heads` one that begins with the map between the heads, both on targets of
unit variance and with a learning rate of their own. `distill_lens` needs blocks in the recipe's `layer_map`.
`entropy_positions` is logit distillation at the fifth of the predictions of which the student is least certain;
`reverse_kl` and its like are logit distillation by another divergence, `flexkd_reverse_kl` and its like the recipe with
that divergence. Distillation from the teacher's own answers is no row: its rows are others (data.teacher_answers), and
the rows of a comparison are shared.
"""

WITHOUT_FEATURES: Final = (
    "fine_tuning",
    "logit_kd",
    "entropy_positions",
    *_DIVERGENCES,
    *(f"logit_kd_{choice}" for choice in CHOICES),
)
