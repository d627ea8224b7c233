"""Hope and its baselines by name, at an equal number of parameters."""

import difflib
from dataclasses import replace

import torch

from examples.hope.config import Config
from examples.hope.model import LanguageModel

# What each name changes in a configuration of Hope.
MODELS: dict[str, dict[str, str]] = {
    "hope": {"mixer": "titans", "feed_forward": "cms"},
    "hope-attention": {"mixer": "attention", "feed_forward": "cms"},
    "transformer": {"mixer": "rotary", "feed_forward": "swiglu"},
    "delta": {"mixer": "delta", "feed_forward": "swiglu"},
    "titans": {"mixer": "segments", "feed_forward": "swiglu"},
}


def build(name: str, config: Config) -> LanguageModel:
    """The model called `name`, in the sizes of `config`, which are those of Hope.

    The width of a baseline's feed-forward part is chosen so that it has as many parameters as
    Hope, up to one unit of that width in each layer. Raises ValueError on an unknown name.
    """
    return LanguageModel(configured(name, config))


def configured(name: str, config: Config) -> Config:
    """The configuration that `build` takes."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {list(MODELS)}"
        raise ValueError(f"no model is called {name!r}: {hint}")
    hope = replace(config, mixer="titans", feed_forward="cms")
    changed = replace(config, **MODELS[name])
    if changed.mixer == "titans":
        return changed
    wanted = count(hope)
    narrow, wide = (count(replace(changed, cms_width=width)) for width in (1, 2))
    return replace(changed, cms_width=max(1, round(1 + (wanted - narrow) / (wide - narrow))))


def count(config: Config) -> int:
    """Parameters of a model, without making them."""

    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config).parameters())
