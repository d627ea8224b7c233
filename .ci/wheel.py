"""Checks the installed wheel: three packages, typed, imported from it and not from the checkout."""

import importlib
import sys
from importlib.metadata import distribution
from pathlib import Path

PACKAGES = {"deepopt", "torch_backend", "jax_backend"}

wheel = distribution("nested-deepopt")
installed = {path.parts[0] for path in wheel.files or ()}
extra = {name for name in installed - PACKAGES if not name.endswith(".dist-info")}
if extra:
    sys.exit(f"the wheel installs {sorted(extra)} beside the three packages")

for name in sorted(PACKAGES):
    package = importlib.import_module(name)
    if package.__file__ is None:
        sys.exit(f"{name} has no __init__.py in the wheel")
    home = Path(package.__file__).resolve().parent
    if not home.is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"{name} was imported from {home}, not from the wheel")
    if not (home / "py.typed").is_file():
        sys.exit(f"{name} has no py.typed in the wheel")

# What is not Python is in the wheel too: the runtime of the C kernels.
torch, torch_backend = map(importlib.import_module, ("torch", "torch_backend"))
weight = torch.nn.Parameter(torch.ones(8))
weight.grad = torch.ones(8)
torch_backend.AdamW([weight], fused=True).step()
if not bool((weight < 1).all()):
    sys.exit("the fused step of the wheel does not step")

print(f"{wheel.name} {wheel.version}: {', '.join(sorted(PACKAGES))} imported from the wheel")
