"""Eval mode within a context; afterwards every module is in its own mode again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the context each module of the model is in eval mode; afterwards each has its earlier mode.

    One flag for the whole model is not enough: a block that was in eval mode inside a model that trains would train
    afterwards, and modules that another model shares would lose their dropout.
    """
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training == training:
                continue
            if type(module).train is nn.Module.train:
                module.training = training
            else:
                # It does more than set a flag. Its children, whose flags that sets too, come after it.
                module.train(training)
