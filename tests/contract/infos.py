"""One OptimizerInfo for each bound class, in torch's own terms."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

import torch_backend
from deepopt import Rule, rules

SCHEDULERS = (
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: LambdaLR(opt, lambda t: 1 / (1 + 0.1 * t))],
    [lambda opt: OneCycleLR(opt, max_lr=1e-3, total_steps=30, cycle_momentum=False)],
    [lambda opt: ReduceLROnPlateau(opt, patience=0)],
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
)


def configurations(rule: type[Rule]) -> list[OptimizerInput]:
    """What is given to the class beside parameters, without the flags that exclude each other."""
    # What goes by the inputs behind one gradient sums no gradients.
    summed = {} if rule().context((2, 2)) else {"summed gradients": {"every": 2}}
    given: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "Tensor lr": {"lr": torch.tensor(0.01)},
        "weight_decay": {"weight_decay": 0.1},
        "maximize & weight_decay": {"maximize": True, "weight_decay": 0.1},
        **summed,
    }
    return [OptimizerInput(params=None, kwargs=k, desc=name) for name, k in given.items()]


def mistakes(rule: type[Rule]) -> list[ErrorOptimizerInput]:
    """What the class must refuse beyond what every optimizer of torch refuses."""
    name = rule.__name__
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lr": -1.0}, ValueError, rf"{name}\(lr=-1.0\) must be a finite number >= 0"),
        ({"lr": torch.tensor(-1.0)}, ValueError, rf"{name}\(lr=-1.0\) must be a finite"),
        ({"weight_decay": -1.0}, ValueError, rf"{name}\(weight_decay=-1.0\) must be a finite"),
        ({"every": 0}, ValueError, rf"{name}\(every=0\) must be an integer >= 1"),
        ({"learning_rate": 1.0}, TypeError, f"{name} has no hyperparameter 'learning_rate'"),
        ({"maximize": 2}, ValueError, "maximize=2 must be one of True, False"),
    ]
    if rule().context((2, 2)):
        wrong += [({"every": 2}, ValueError, rf"{name}\(every=2\): its .* of one step")]
    return [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)),
            error_type=kind,
            error_regex=words,
        )
        for kwargs, kind, words in wrong
    ]


def info(rule: type[Rule]) -> OptimizerInfo:
    """The class of a rule as torch describes optimizers to its tests."""

    def errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
        return get_error_inputs_for_all_optims(device, dtype) + mistakes(rule)

    return OptimizerInfo(
        getattr(torch_backend, rule.__name__),
        optim_inputs_func=lambda device, dtype=None: configurations(rule),
        optim_error_inputs_func=errors,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "differentiable", "fused"),
        supports_fused_on=("cpu", "cuda"),
        has_capturable_arg=True,
        supports_complex=False,
    )


INFOS = {rule.__name__: info(rule) for rule in rules.ALL}
