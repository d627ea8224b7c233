"""What each task is run with: its data, the sizes of the models, steps and learning rates."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from torch import nn

from examples.hope import data, tasks
from examples.hope.memories import RESIDUAL
from examples.hope.tasks import Stream, Task
from examples.settings import check, nearest

Size = Literal["quick", "cpu", "gpu"]

# Of AdamW; a matrix rule has one rate for all models, in `train.LEARNING_RATES`.
RATES = {"hope": 3e-3, "hope-attention": 3e-3, "transformer": 3e-3, "delta": 3e-3, "titans": 3e-3}
FAST = {"hope": 1e-2, "delta": 1e-2, "titans": 1e-2}


@dataclass(frozen=True)
class Scale:
    """One size of a study.

    model: settings of the models' configuration; the task gives vocabulary and outputs.
    options: arguments of the task.
    steps: for a stream, on each part.
    rates: learning rates by model where they are not those of `RATES`.
    """

    model: dict[str, Any]
    steps: int
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A task by the function that makes it, and its three sizes; `text` if it reads a corpus."""

    about: str
    make: Callable[..., Task | Stream]
    sizes: dict[Size, Scale]
    text: bool = False


def _model(width: int, layers: int, heads: int, chunk: int, **more: Any) -> dict[str, Any]:
    sizes = {"width": width, "layers": layers, "heads": heads, "cms_width": 2 * width}
    return {
        **sizes,
        "memory_width": width // heads,
        **{f"inner.{name}": value for name, value in vars(RESIDUAL).items()},
        "chunk": chunk,
        "slow_chunk": 2 * chunk,
        **more,
    }


TINY = _model(16, 1, 2, 8)

# With rates up to 2 a write can turn what a memory holds around: what a state that flips needs.
TURNING = {"rate_cap": 2.0}


def _formal(about: str, make: Callable[..., Task], **given: Any) -> Preset:
    sizes: dict[Size, Scale] = {
        "quick": Scale(TINY, 10, 16, {"longest": 16, **given}),
        "cpu": Scale(_model(32, 1, 2, 8, **TURNING), 500, 64, given, FAST),
        "gpu": Scale(_model(64, 2, 4, 8, **TURNING), 5000, 256, given, FAST),
    }
    return Preset(about, make, sizes)


def _mad(about: str, make: Callable[..., Task], **quick: Any) -> Preset:
    few = {} if make is tasks.memorisation else {"examples": 3200}
    sizes: dict[Size, Scale] = {
        "quick": Scale(TINY, 10, 8, quick),
        "cpu": Scale(_model(64, 2, 4, 16), 500, 64, few),
        "gpu": Scale(_model(128, 2, 4, 32), 4000, 128),
    }
    return Preset(about, make, sizes)


def _needle(kind: str, about: str) -> Preset:
    sizes: dict[Size, Scale] = {
        "quick": Scale(TINY, 10, 4, {"length": 112, "tests": 2, "kind": kind}),
        # Only what is asked has a loss: a small model has no time to learn all text. The memories
        # that generate are written several times within a row, as they will be in longer ones.
        "cpu": Scale(
            *(_model(64, 2, 4, 32, slow_chunk=32), 1200, 16),
            {"length": 128, "asked_only": True, "kind": kind},
        ),
        "gpu": Scale(_model(256, 4, 4, 64), 3000, 32, {"length": 512, "tests": 100, "kind": kind}),
    }
    return Preset(about, tasks.Needle, sizes, text=True)


def _recall(about: str, updates: int = 0) -> Preset:
    given = {"updates": updates}
    sizes: dict[Size, Scale] = {
        "quick": Scale(TINY, 10, 8, {"pairs": 4, "vocabulary": 64, "length": 32, **given}),
        "cpu": Scale(
            *(_model(64, 2, 2, 32, slow_chunk=32), 800, 64),
            {"pairs": 16, "vocabulary": 256, "length": 64 + 4 * updates, **given},
        ),
        "gpu": Scale(
            *(_model(128, 2, 1, 64), 8000, 256),
            {"pairs": 16, "vocabulary": 8192, "length": 256, **given},
        ),
    }
    return Preset(about, tasks.Recall, sizes)


PRESETS: dict[str, Preset] = {
    "text": Preset(
        "the next byte of real text, held out by document (bits per byte)",
        tasks.Text,
        {
            "quick": Scale(TINY, 10, 4, {"length": 64, "tests": 16}),
            "cpu": Scale(_model(128, 3, 4, 32), 600, 8, {"length": 128}),
            "gpu": Scale(_model(384, 6, 6, 64), 3000, 32, {"length": 1024}),
        },
        text=True,
    ),
    "mqar": _recall("values of keys that were shown, many keys in a row"),
    "overwriting": _recall("the same with keys whose value changes", updates=2),
    "compression": _mad("MAD: write out a random sequence that was read", tasks.compression),
    "selective-copy": _mad("MAD: write out the tokens between blanks", tasks.selective_copy),
    "in-context-recall": _mad("MAD: values of keys seen in the row", tasks.in_context_recall),
    "noisy-recall": _mad("MAD: the same among noise", tasks.noisy_recall),
    "fuzzy-recall": _mad("MAD: keys and values of several tokens", tasks.fuzzy_recall),
    "memorisation": _mad("MAD: a fixed table of keys and values", tasks.memorisation),
    "parity": _formal("is the number of ones so far even", tasks.parity),
    "aa": _formal("(aa)*: is the length so far even", tasks.repeated, word="aa"),
    "abab": _formal("(abab)*: is it a whole number of words", tasks.repeated, word="abab"),
    "anbn": _formal("aⁿbⁿ: what comes next", tasks.counted, letters=2),
    "anbncn": _formal("aⁿbⁿcⁿ: what comes next", tasks.counted, letters=3),
    "shuffle": _formal("two kinds of brackets: which are open", tasks.shuffled),
    "needle-repeated": _needle("repeated", "digits once told in a repeated sentence"),
    "needle-text": _needle("text", "digits once told in real text"),
    "needle-hexadecimal": _needle("hexadecimal", "32 hexadecimal digits once told in real text"),
    "intents": Preset(
        "stream: seven groups of spoken commands, one after another (accuracy)",
        tasks.Intents,
        {
            "quick": Scale(TINY, 5, 8, {"sentences": 24, "least": 20, "tasks": 2}),
            "cpu": Scale(_model(64, 2, 4, 16), 120, 32),
            "gpu": Scale(_model(128, 3, 4, 16), 500, 64),
        },
    ),
    "languages-numbers": Preset(
        "stream: numbers written out in six languages, one after another (bits per byte)",
        tasks.Languages,
        {
            "quick": Scale(TINY, 5, 4, {"languages": ("de", "fr"), "numbers": 200, "length": 64}),
            "cpu": Scale(_model(64, 2, 4, 32), 250, 16),
            "gpu": Scale(_model(128, 3, 4, 32), 1000, 64, {"numbers": 50_000}),
        },
    ),
    "languages-names": Preset(
        "stream: names of emoji in six languages, one after another (bits per byte)",
        tasks.Languages,
        {
            "quick": Scale(TINY, 5, 4, {"kind": "names", "languages": ("de", "fr"), "length": 64}),
            "cpu": Scale(_model(64, 2, 4, 32), 250, 16, {"kind": "names"}),
            "gpu": Scale(_model(128, 3, 4, 32), 1000, 64, {"kind": "names"}),
        },
    ),
}


def preset(name: str) -> Preset:
    """The task called `name`; ValueError with the nearest names if there is none."""
    if name not in PRESETS:
        raise ValueError(f"no task is called {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]


def make_task(name: str, options: Mapping[str, Any]) -> Task | Stream:
    """The task with options as in a scale; `data` is the path of a corpus."""
    chosen, options = preset(name), {k: _tuple(v) for k, v in options.items()}
    parameters = inspect.signature(chosen.make).parameters
    known = [*(x for x in parameters if x != "corpus"), *(["data"] if chosen.text else [])]
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"task {name} has no option {key!r}: {nearest(key, known)}")
        default = parameters[key].default if key in parameters else ""
        if default is not inspect.Parameter.empty:
            check(key, value, default)
    if chosen.text:
        path = options.pop("data", None)
        return chosen.make(data.load(path, options["length"]), **options)
    return chosen.make(**options)


def make_model(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The model with a configuration as `configuration` returns it."""
    from examples.hope.config import Config
    from examples.hope.model import LanguageModel

    return LanguageModel(_rebuilt(Config(), config, name))


def configuration(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a model as it is built; those not given, or not read, have their defaults.

    Settings of a part have a dot, as in `inner.objective`. ValueError names an unknown one.
    """
    from examples.hope import models
    from examples.hope.config import Config

    nested: dict[str, Any] = {}
    for key, value in settings.items():
        first, _, rest = key.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = value
        else:
            nested[key] = value
    # Trials of a baseline must not differ by settings of Hope that change nothing in it.
    built = models.configured(name, _rebuilt(Config(), nested, name))
    read = models.READ[name] | {"mixer", "feed_forward"}
    return asdict(replace(Config(), **{key: getattr(built, key) for key in read}))


def model_names() -> list[str]:
    from examples.hope.models import MODELS

    return list(MODELS)


def _rebuilt(default: Any, given: Mapping[str, Any], owner: str) -> Any:
    """The dataclass `default` with the values `given`, in its parts too."""
    known = {f.name: getattr(default, f.name) for f in fields(default)}
    for key in given:
        if key not in known:
            raise ValueError(f"{owner} has no setting {key!r}: {nearest(key, known)}")
    values = {
        key: _rebuilt(known[key], value, f"{owner}: {key}")
        if is_dataclass(known[key]) and isinstance(value, Mapping)
        else _tuple(value)
        for key, value in given.items()
    }
    return type(default)(**{**known, **values})


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
