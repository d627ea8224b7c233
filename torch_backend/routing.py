"""Which parameters get which rule, and how a tensor is seen as matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from typing import Any

from torch import Tensor, nn

from deepopt.describe import table
from deepopt.rule import Rule

# Names by which people call a last projection and an embedding, for parameters that come by name.
HEAD = re.compile(r"(^|\.)(lm_head|head|heads|classifier|score|logits|unembed|embed_out|output)$")
EMBEDDING = re.compile(r"(^|[._])(emb|embed|embedding|embeddings|wte|wpe|tok_embeddings)([._]|$)")
CONVOLUTIONS = (nn.modules.conv._ConvNd,)  # pyright: ignore[reportPrivateUsage]
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Route:
    """One parameter's rule, the way it is seen, and why."""

    name: str
    shape: tuple[int, ...]
    rule: str
    view: str
    why: str


@dataclass(frozen=True)
class Routing:
    """The routes of an optimizer; prints as a table."""

    routes: tuple[Route, ...]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "rule", "seen as", "why")]
        for r in self.routes:
            shape = "×".join(map(str, r.shape)) or "scalar"
            rows.append((r.name, shape, r.rule, seen_as(r.shape, r.view), r.why))
        return table(rows)


def matrices(shape: tuple[int, ...], view: str) -> tuple[int, int, int]:
    """(count, rows, columns) of a tensor seen as a batch of matrices.

    "flatten": one matrix, the first axis against the rest (a convolution's out × in·k·k).
    "stacked": the last two axes, everything before them counts (experts, layers).
    "split:k": k equal blocks of rows (a fused QKV projection is split:3).
    Raises ValueError where the shape does not allow it.
    """
    if len(shape) < 2:
        raise ValueError(f"shape {shape} cannot be seen as matrices")
    rest = prod(shape[1:])
    if view == "flatten":
        return 1, shape[0], rest
    if view == "stacked":
        return prod(shape[:-2]), shape[-2], shape[-1]
    parts = re.fullmatch(r"split:([1-9]\d*)", view)
    if parts is None:
        raise ValueError(f"seen_as={view!r} must be 'flatten', 'stacked' or 'split:k', such as 'split:3'")
    k = int(parts[1])
    if shape[0] % k:
        raise ValueError(f"seen_as={view!r} does not divide the {shape[0]} rows of shape {shape}")
    return k, shape[0] // k, rest


def seen_as(shape: tuple[int, ...], view: str) -> str:
    """The view in words."""
    if not view:
        return "as it is"
    count, rows, columns = matrices(shape, view)
    return f"{rows}×{columns}" if count == 1 else f"{count} of {rows}×{columns}"


@dataclass(frozen=True)
class Named:
    """A parameter with what is known of it: a name, and the kind of module that holds it."""

    name: str | None
    tensor: Tensor
    kind: str = ""


def of_module(module: nn.Module) -> list[Named]:
    """The parameters of a module, each with its role: "embedding", "head", "conv" or ""."""
    roles: dict[int, str] = {}
    rows: set[int] = set()
    last: tuple[str, nn.Linear] | None = None
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if isinstance(child, EMBEDDINGS):
            roles[id(weight)] = "embedding"
            rows.add(child.num_embeddings)
        elif isinstance(child, CONVOLUTIONS):
            roles[id(weight)] = "conv"
        elif isinstance(child, nn.Linear):
            last = (name, child)
    parameters = list(module.named_parameters())
    matrices_left = sum(p.ndim > 1 and id(p) not in roles for _, p in parameters)
    if last is not None and id(last[1].weight) not in roles and matrices_left > 1:
        name, linear = last
        if not rows or linear.out_features in rows or HEAD.search(name):
            roles[id(linear.weight)] = "head"
    return [Named(name, p, roles.get(id(p), "other")) for name, p in parameters]


def of_iterable(parameters: Iterable[Any]) -> list[Named]:
    """Tensors, or (name, tensor) pairs as `named_parameters()` gives them."""
    found: list[Named] = []
    for x in [parameters] if isinstance(parameters, Tensor) else parameters:
        if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str):
            owner = x[0].rpartition(".")[0] or x[0]
            kind = "head" if HEAD.search(owner) else ""
            kind = "embedding" if EMBEDDING.search(x[0]) else kind
            found.append(Named(x[0], x[1], kind))
        else:
            found.append(Named(None, x))
    return found


def route(
    x: Named, rule: Rule, fallback: Rule, *, views: Mapping[str, str], strict: bool, chosen: bool
) -> tuple[Rule, str, str]:
    """(rule, view, reason) for a parameter; `chosen` says that the user named the rule for its group.

    Raises ValueError with `strict` where the rule cannot take the parameter or its role is a guess.
    """
    shape = tuple(x.tensor.shape)
    name = x.name or "a parameter"
    view = next((v for pattern, v in views.items() if fnmatch(x.name or "", pattern)), "")
    if rule.domain == "any":
        return rule, "", "takes any shape"
    why = ""
    if len(shape) < 2:
        why = "not a matrix"
    elif x.kind in ("embedding", "head") and not chosen:
        why = x.kind
    if why:
        if strict and len(shape) < 2:
            rule.check(shape, name)
        if strict and x.kind in ("embedding", "head") and fallback.domain == "matrix":
            raise ValueError(f"strict=True: {name} is an {x.kind} and has no rule of its own")
        fallback.check(shape, name)
        return fallback, "", f"{why}: fallback"
    if view:
        matrices(shape, view)
        return rule, view, "view given"
    if len(shape) == 2:
        guess = strict and not chosen and not x.kind
        reason = "matrix"
        view = "flatten"
    else:
        guess = strict and not x.kind
        stacked = x.kind == "other"
        view = "stacked" if stacked else "flatten"
        reason = "stack of matrices" if stacked else "convolution as a matrix"
    if guess:
        raise ValueError(
            f"strict=True: {name} of shape {shape} may be a hidden matrix, an embedding, a head or a "
            "stack. Pass the module or named parameters, a group with its own rule, or a view"
        )
    return rule, view, reason
