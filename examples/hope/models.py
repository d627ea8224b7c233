"""Hope and its baselines by name, at an equal number of parameters."""

import difflib
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch

from examples.hope.config import Config
from examples.hope.model import LanguageModel

MODELS = {  # by the mixer of each
    "hope": "titans",
    "hope-attention": "attention",
    "transformer": "rotary",
    "delta": "delta",
    "titans": "segments",
}
_SIZES = {"width", "layers", "heads", "cms_width", "vocabulary", "outputs"}
_CONTINUUM = {"feed_forward", "cms", "periods"}
READ = {  # the settings that change a model beside the number of its parameters
    "hope": {f.name for f in fields(Config)} - {"mixer"},
    "hope-attention": _SIZES | _CONTINUUM,
    "transformer": _SIZES,
    "delta": _SIZES | {"chunk"},
    "titans": _SIZES | {"chunk", "memory_width"},
}


def build(name: str, config: Config) -> LanguageModel:
    """The model called `name`, in the sizes of `config`, which are those of Hope.

    The width of a baseline's feed-forward part is chosen so that it has as many parameters as
    Hope, up to one unit of that width in each layer; so is that of Hope with a SwiGLU in the place
    of its continuum memory. Raises ValueError on an unknown name, or one of another mixer.
    """
    return LanguageModel(configured(name, config))


def configured(name: str, config: Config) -> Config:
    """The configuration that `build` takes."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {list(MODELS)}"
        raise ValueError(f"no model is called {name!r}: {hint}")
    mixer: Any = MODELS[name]
    if config.mixer not in ("titans", mixer):
        raise ValueError(f"mixer {config.mixer!r}: {name} has {mixer!r}; ask for another model")
    continuum = "feed_forward" in READ[name]
    changed = replace(
        config, mixer=mixer, feed_forward=config.feed_forward if continuum else "swiglu"
    )
    hope = replace(config, mixer="titans", feed_forward="cms")
    if changed == hope:
        return hope
    wanted = count(hope)
    narrow, wide = (count(replace(changed, cms_width=width)) for width in (1, 2))
    return replace(changed, cms_width=max(1, round(1 + (wanted - narrow) / (wide - narrow))))


def check_read(name: str, settings: Iterable[str]) -> None:
    """Raise ValueError on a setting that would not change the model of this name."""
    for setting in settings:
        if name in READ and setting.partition(".")[0] not in READ[name]:
            own = ", ".join(sorted(READ[name]))
            raise ValueError(f"{name} does not depend on {setting!r}, but on {own}")


def count(config: Config) -> int:
    """Parameters of a model, without making them, or what its nested levels begin from."""
    with torch.device("meta"):
        named = LanguageModel(config).named_parameters()
    return sum(p.numel() for name, p in named if ".starts." not in name)
