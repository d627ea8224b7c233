"""Tasks by name, with the options that they take, or a user's own by `module:function`."""

import inspect
import random
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from examples.blame import blamed, folder
from examples.compare.problem import Problem
from examples.settings import check, nearest

Maker = Callable[..., Problem]


def tasks() -> dict[str, Maker]:
    """The tasks that come with this package; the first line of each docstring says what it is."""
    from examples.compare.tasks import TASKS

    return TASKS


def maker(name: str) -> Maker:
    """The function of that name; ValueError with the nearest names, ImportError if its module is
    missing."""
    if ":" not in name and "." not in name:
        known = tasks()
        if name not in known:
            raise ValueError(
                f"no task is called {name!r}: {nearest(name, known)}; yours is module:function"
            )
        return known[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"task {name!r}: module:function is asked for, such as my_task:make_task")
    if module.endswith(".py"):
        raise ValueError(f"task {name!r}: without .py, {module.removesuffix('.py')}:{function}")
    folder()
    with blamed(f"task {name!r}"):
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            if module in tasks():
                known = inspect.signature(tasks()[module]).parameters
                options = ", ".join(key for key in known if key != "seed")
                raise ValueError(
                    f"no module {module!r}, and options are NAME=VALUE; {module} has {options}"
                ) from error
            files = [x.stem for x in Path.cwd().glob("*.py")]
            hint = f"no module {module!r} in {str(Path.cwd())!r}: {nearest(module, files)}"
            raise ImportError(hint) from error
    made: Any = getattr(found, function, None)
    if not callable(made):
        own = [k for k, v in vars(found).items() if inspect.isfunction(v)]
        raise ValueError(f"{module!r} has no function {function!r}: {nearest(function, own)}")
    return cast(Maker, made)


def make_problem(name: str, options: Mapping[str, Any], seed: int) -> Problem:
    """The problem of a task; ValueError where an option is unknown or of the wrong kind."""
    made = maker(name)
    parameters = inspect.signature(made).parameters
    known = [key for key in parameters if key != "seed"]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"task {name} has no option {key!r}: {nearest(key, known)}")
        default = parameters[key].default
        if default is not inspect.Parameter.empty and default is not None:
            check(key, value, default)
    # For tasks that draw from the global generators.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with blamed(f"task {name}" + (f" {dict(options)}" if options else "")):
        if "seed" not in parameters:
            raise TypeError("it takes no seed, which weights and data must follow from")
        found = made(seed=seed, **given)
    if not isinstance(found, Problem):
        raise ValueError(f"task {name!r} gave {type(found).__name__}: a Problem is asked for")
    return found
