"""Tests with the loops people have: collected where `-m integrations` asks for them."""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "KERAS_BACKEND": "torch",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",
    "WANDB_MODE": "disabled",
}


def pytest_ignore_collect(config):
    """The modules import packages that only the extra brings, and some take seconds."""
    return True if "not integrations" in config.option.markexpr else None


def pytest_pycollect_makemodule():
    declare_operators()


@cache
def declare_operators():
    """Let torchvision, which timm and torchmetrics import, be imported beside a torch for CPUs.

    Its wheels are built for CUDA; where their library cannot be loaded, the import fails for want
    of two operators, which nothing here calls.
    """
    import torch

    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
