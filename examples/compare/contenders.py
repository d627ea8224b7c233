"""Who takes part: rules of deepopt, optimizers of torch and optax, and any other by import path."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

import torch

from deepopt import rules
from deepopt.rule import Rule
from examples.blame import folder, told
from examples.compare.problem import Backend
from examples.settings import check, nearest, row

RULES: dict[str, type[Rule]] = {
    name.lower(): value
    for name, value in vars(rules).items()
    if isinstance(value, type) and issubclass(value, Rule) and value is not Rule
}
# Short names of the originals.
ORIGINALS = {
    "torch.adamw": "torch.optim.AdamW",
    "torch.sgd": "torch.optim.SGD",
    "torch.muon": "torch.optim.Muon",
    "torch.adafactor": "torch.optim.Adafactor",
    "optax.muon": "optax.contrib.muon",
}
# Of the originals, those that are for matrices.
ONLY_MATRICES = ("torch.optim.Muon", "optax.contrib.muon")
# What to install for optimizers of others, by the module that is missing.
PACKAGES = {
    **{"heavyball": "heavyball", "pytorch_optimizer": "pytorch_optimizer"},
    **{"schedulefree": "schedulefree", "optax": "optax"},
}
RATES = ("lr", "learning_rate")
USUAL = 1e-3  # where a signature has no learning rate of its own


@dataclass(frozen=True)
class Contender:
    """One optimizer of a study.

    label: as it was asked for; the row of the tables.
    name: of a rule of this library (lower case), or an import path.
    settings: what is fixed; of a rule all of them, so that another default is another trial.
    choices: settings with several values, `weight=0|0.1`, to be tuned.
    lr: where tuning begins, the default of the rule or of the signature.
    """

    label: str
    name: str
    kind: Literal["rule", "torch", "optax"]
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])

    def variants(self) -> list[dict[str, Any]]:
        """The settings with one value for each choice; the first values come first."""
        found = itertools.product(*self.choices.values())
        return [{**self.settings, **dict(zip(self.choices, x, strict=True))} for x in found]

    def make(self, lr: Any, settings: Mapping[str, Any]) -> Callable[..., Any]:
        """What makes the optimizer: of parameters in torch, of nothing in optax; or the rule."""
        if self.kind == "rule":
            kind = RULES.get(self.name) or imported(self.name)
            rule = kind(**{**settings, "lr": lr})
            return lambda: rule
        target = imported(self.name)
        name = rate_name(target)
        if self.kind == "optax":
            return lambda: target(**{name: lr}, **settings)
        return lambda parameters: target(parameters, **{name: lr}, **settings)


def contender(text: str, backend: Backend, decay: float | None = None) -> Contender:
    """The contender that a user names, `m3`, `m3:momentum=0.95`, `m3:weight=0|0.1`, `optax.lion`.

    decay: the weight decay of one that has such a setting and does not say its own.

    Raises ValueError on an unknown name or setting, with the nearest ones, ImportError where a
    package is missing.
    """
    name, given = row(text)
    settings, choices = {}, {}
    for key, value in given.items():
        if isinstance(value, str) and "|" in value:
            options = row("x:" + ",".join(f"{key}{i}={v}" for i, v in enumerate(value.split("|"))))
            choices[key] = tuple(map(_tuple, options[1].values()))
        else:
            settings[key] = _tuple(value)
    key = name.replace("_", "").lower()
    if "." not in name:
        if key not in RULES:
            raise ValueError(f"no rule is called {name!r}: {nearest(key, [*RULES, *ORIGINALS])}")
        return _of_rule(text, key, RULES[key], settings, choices, decay)
    path = ORIGINALS.get(name.lower(), name)
    target = imported(path)
    if isinstance(target, type) and issubclass(target, Rule):
        return _of_rule(text, path, target, settings, choices, decay)
    of_torch = isinstance(target, type) and issubclass(target, torch.optim.Optimizer)
    if of_torch != (backend == "torch"):
        need = "a torch.optim.Optimizer" if backend == "torch" else "a function of optax's kind"
        need += " or a deepopt.Rule"
        raise ValueError(f"{text!r}: the task is one of {backend}, which needs {need}")
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    rate = rate_name(target)
    for setting, values in (*((k, (v,)) for k, v in settings.items()), *choices.items()):
        if setting in RATES or (setting not in parameters and not open_ended):
            raise ValueError(_unknown(path, setting, [*parameters]))
        if setting in parameters:
            for value in values:
                _check(setting, value, parameters[setting].default)
    if decay is not None and "weight_decay" in {*parameters} - {*settings, *choices}:
        settings["weight_decay"] = decay
    start = parameters[rate].default if rate in parameters else USUAL
    lr = float(start) if isinstance(start, int | float) and 0 < start < math.inf else USUAL
    return Contender(text, path, "torch" if of_torch else "optax", lr, settings, choices)


def _of_rule(
    text: str,
    name: str,
    kind: type[Rule],
    settings: dict[str, Any],
    choices: dict[str, tuple[Any, ...]],
    decay: float | None,
) -> Contender:
    known = {f.name: f.default for f in fields(kind)}
    if decay is not None and "weight_decay" not in (*settings, *choices):
        settings["weight_decay"] = decay
    for setting in (*settings, *choices):
        if setting not in known or setting == "lr":
            raise ValueError(_unknown(kind.__name__, setting, [*known]))
    whole = {k: v for k, v in known.items() if k != "lr" and k not in choices} | settings
    found = Contender(text, name, "rule", float(cast(Any, known["lr"])), whole, choices)
    for variant in found.variants():
        found.make(found.lr, variant)  # the rule checks its own values
    return found


def imported(path: str) -> Any:
    """The object at an import path; ImportError says what was missing."""
    module, _, name = path.rpartition(".")
    folder()
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ImportError(f"{path!r} cannot be imported: {told(error)}") from error
        if error.name in PACKAGES:
            hint = f"pip install {PACKAGES[error.name]}"
        else:
            files = [x.stem for x in Path.cwd().glob("*.py")]
            hint = f"no module {error.name!r} here or installed; {nearest(error.name, files)}"
        raise ImportError(f"{path!r} cannot be imported: {hint}") from error
    except Exception as error:
        raise ImportError(f"{path!r} cannot be imported: {told(error)}") from error
    if not callable(getattr(found, name, None)):
        kinds = {k for k, v in vars(found).items() if _is_optimizer(v)}
        hint = nearest(name, kinds) if kinds else nearest(path, ORIGINALS)
        raise ValueError(f"{module!r} has no optimizer {name!r}: {hint}")
    return getattr(found, name)


def _is_optimizer(found: Any) -> bool:
    if isinstance(found, type):
        bases = torch.optim.Optimizer, Rule
        return issubclass(found, bases) and found not in bases
    return inspect.isfunction(found) and rate_name(found) in inspect.signature(found).parameters


def rate_name(target: Any) -> str:
    """The name of the learning rate in a signature."""
    parameters = inspect.signature(target).parameters
    return next((name for name in RATES if name in parameters), "lr")


def listing() -> Iterator[str]:
    """Names of the rules, and of the originals, as a user may write them."""
    yield from (kind.__name__ for kind in RULES.values())
    yield from ORIGINALS


def _unknown(owner: str, setting: str, known: list[str]) -> str:
    if setting in RATES:
        return f"{owner}: {setting} is what the study tunes; give --lr to fix it"
    others = [name for name in known if name not in (*RATES, "params", "self")]
    return f"{owner} has no setting {setting!r}: {nearest(setting, others)}"


def _check(name: str, value: Any, default: Any) -> None:
    if default is inspect.Parameter.empty or default is None or callable(default):
        return
    # Whole numbers stand for what may be any number: optax has momentum=0 and torch eps=0.
    check(name, value, float(default) if type(default) is int else default)


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
