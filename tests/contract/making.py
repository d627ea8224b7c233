"""What is settled as an optimizer is made: errors, flags, its text, and copies of it."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from .subject import (
    ANY_FORM,
    NO_STEP,
    Subject,
    check,
    equal,
    feed,
    give,
    parameters,
    refused,
)

ONE_FORM = dict.fromkeys("fgc", ANY_FORM)


@check(**ONE_FORM)
def inputs_name_no_form(s: Subject) -> None:
    """test_optim_infos_do_not_specify_global_cliquey_kwargs"""
    for x in s.info.optim_inputs_func(device="cpu"):
        assert not {"foreach", "fused", "differentiable"} & set(x.kwargs), x.desc


@check(c=NO_STEP)
def errors(s: Subject) -> None:
    """test_errors, with torch's own inputs and ours."""
    for x in s.info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = x.optimizer_error_input
        assert x.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = parameters() if given.params is None else given.params
        if issubclass(x.error_type, Warning):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                s.make(params, **given.kwargs)
            assert any(re.search(x.error_regex, str(w.message)) for w in seen), given.desc
            continue
        try:
            s.make(params, **given.kwargs)
        except x.error_type as error:
            assert re.search(x.error_regex, str(error)), f"{given.desc}: {error}"
        else:
            raise AssertionError(f"{given.desc} was accepted")


@check(c=NO_STEP)
def flags(s: Subject) -> None:
    """What excludes each other is refused in torch's words; what asks for nothing is welcome."""

    def make(**given: Any) -> None:
        s.info.optim_cls(parameters(), **given)

    with refused(RuntimeError, "`fused` and `foreach` cannot be `True` together."):
        make(fused=True, foreach=True)
    with refused(RuntimeError, "`fused` does not support `differentiable`"):
        make(fused=True, differentiable=True)
    with refused(RuntimeError, "`foreach` does not support `differentiable`"):
        make(foreach=True, differentiable=True)
    for form in ({"fused": False}, {"foreach": True}, {"differentiable": True}):
        ((name, value),) = form.items()
        with refused(ValueError, f"capturable=True needs kernels, and {name}={value}"):
            make(capturable=True, **form)
        with refused(ValueError, f"rounding='exact' needs kernels, and {name}={value}"):
            make(rounding="exact", **form)
    for name in ("foreach", "differentiable", "fused", "capturable"):
        with refused(ValueError, f"{name}='yes' must be one of"):
            make(**{name: "yes"})
    make(foreach=None, fused=None, differentiable=False, capturable=False, maximize=False)
    make(foreach=False, fused=True)


@check(p="it needs no kernels", c="fused=None takes the plain path, as it does elsewhere")
def fused_on_meta(s: Subject) -> None:
    """test_fused_error_on_params_on_meta"""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        optimizer = s.make(model.parameters())
        for p in model.parameters():
            p.grad = torch.rand_like(p)
    feed(optimizer)
    words = "`fused=True` requires all the params to be floating point Tensors of supported devices"
    with refused(RuntimeError, words):
        optimizer.step()


@check(c=NO_STEP)
def complex_parameters(s: Subject) -> None:
    """Refused by name, with what to do, before anything is made of them."""
    params = [parameters()[0], nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))]
    with refused(ValueError, "parameter 1 is of dtype torch.complex64", "torch.view_as_real"):
        s.make(params)


@check()
def sparse_gradients(s: Subject) -> None:
    """Refused by name, with what to do, before anything has moved."""
    embedding = nn.Embedding(6, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    weight = parameters()[0]
    weight.grad = torch.ones_like(weight)
    optimizer = s.make([weight, embedding.weight])
    before = [x.detach().clone() for x in (weight, embedding.weight)]
    with refused(RuntimeError, "does not support sparse gradients", "sparse=False"):
        s.step(optimizer)
    assert torch.equal(weight, before[0]) and torch.equal(embedding.weight, before[1])


@check(c=NO_STEP)
def can_be_printed(s: Subject) -> None:
    """test_optimizer_can_be_printed"""
    for x in s.info.optim_inputs_func(device="cpu"):
        text = repr(s.make(parameters(), **x.kwargs))
        assert text.startswith(s.info.name) and "lr: " in text and "weight_decay: " in text


def public(thing: object) -> dict[str, str]:
    """The public attributes of an object, and what they are."""
    kept = {k: v for k, v in vars(thing).items() if k[0] != "_" and k not in ("state",)}
    return {k: repr(v) for k, v in kept.items()}


@check()
def copies(s: Subject) -> None:
    """test_deepcopy_copies_all_public_attrs, by pickle too; a copy goes on as the original."""
    for x in s.info.optim_inputs_func(device="cpu")[:: 5 if s.mode in "fg" else 1][
        : 1 if s.dear else None
    ]:
        optimizer = s.make(parameters(), on_nonfinite="skip", **x.kwargs)
        s.eager.steps(optimizer, 3)
        optimizer.note = "of a user"
        for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert type(clone) is type(optimizer)
            assert public(clone).keys() == public(optimizer).keys() - {"note"}
            assert all(public(optimizer)[k] == v for k, v in public(clone).items())
            equal(clone, optimizer)
            before = [p.detach().clone() for p in clone.param_groups[0]["params"]]
            s.steps(clone, 1, 3)
            assert not all(map(torch.equal, before, clone.param_groups[0]["params"]))
            two = copy.deepcopy(optimizer)
            s.eager.steps(two, 1, 3)
            equal(clone, two)


class Wrapper:
    """Changes its class as Lightning's Fabric does: a subclass made on the spot, no constructor."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        own = {k: v for k, v in vars(optimizer).items() if k not in ("state_dict", "step")}
        self.__dict__.update(own)
        name = "Wrapped" + type(optimizer).__name__
        self.__class__ = type(name, (type(self), type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure or (lambda: None))


@check(c="what is compiled is the wrapped optimizer's step, as in the other rows")
def wrapped_by_a_dynamic_subclass(s: Subject) -> None:
    """Lightning: another class around the same attributes, always with a closure."""
    optimizer, alone = s.make(parameters()), s.make(parameters())
    wrapper = Wrapper(optimizer)
    assert isinstance(wrapper, type(optimizer))
    for i in range(2):
        for x in (optimizer, alone):
            give(x, i)
            feed(x)
        assert wrapper.step(lambda: 0.5) == 0.5
        alone.step()
    equal(optimizer, alone)
    assert repr(wrapper).startswith("Wrapped") and wrapper.state_dict()["state"]
    wrapper.zero_grad()


@check()
def wrapped_with_a_load_in_the_constructor(s: Subject) -> None:
    """Accelerate: state_dict() and load_state_dict() before the first step change nothing."""
    optimizer, alone = s.make(parameters()), s.make(parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    s.steps(optimizer, 2)
    s.eager.steps(alone, 2)
    equal(optimizer, alone)
