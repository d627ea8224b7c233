"""Which parameters get which rule, and how a tensor is seen as matrices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from deepopt.describe import table
from deepopt.rule import Rule
from torch_backend.layers import groups_of, layers_of

# Names by which people call a last projection and an embedding, for parameters that come by name.
HEAD = re.compile(r"(^|\.)(lm_head|head|heads|classifier|score|logits|unembed|embed_out|output)$")
EMBEDDING = re.compile(r"(^|[._/])(emb|embed|embedding|embeddings|wte|wpe|tok_embeddings)([._/]|$)")
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = tuple(getattr(nn, f"Conv{t}{n}d") for t in ("", "Transpose") for n in (1, 2, 3))

# What is known of a parameter: "hidden" is inside a module and none of the others, "named" has a
# name that says nothing, "" is a bare tensor.
Role: TypeAlias = Literal["embedding", "head", "convolution", "hidden", "named", ""]


@dataclass(frozen=True)
class Named:
    """A parameter with its name, if it has one, and its role.

    layers: those it is the weight of and whose inputs can be recorded; None outside a module.
    """

    name: str
    tensor: Tensor
    role: Role
    layers: tuple[nn.Module, ...] | None = None


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


def check_view(view: str) -> None:
    """Raise ValueError where a view is none of those that `matrices` knows."""
    if not re.fullmatch(r"flatten|stacked|split:[1-9]\d*", view):
        raise ValueError(
            f"seen_as={view!r} must be 'flatten', 'stacked' or 'split:k', such as 'split:3'"
        )


def matrices(shape: tuple[int, ...], view: str) -> tuple[int, int, int]:
    """(count, rows, columns) of a tensor seen as a batch of matrices.

    "flatten": one matrix, the first axis against the rest (a convolution's out × in·k·k).
    "stacked": the last two axes, everything before them counts (experts, layers).
    "split:k": k equal blocks of rows (a fused QKV projection is split:3).
    Raises ValueError where the shape does not allow it.
    """
    check_view(view)
    if len(shape) < 2:
        raise ValueError(f"shape {shape} cannot be seen as matrices")
    if view == "stacked":
        return prod(shape[:-2]), shape[-2], shape[-1]
    k = 1 if view == "flatten" else int(view.removeprefix("split:"))
    if shape[0] % k:
        raise ValueError(f"seen_as={view!r} does not divide the {shape[0]} rows of shape {shape}")
    return k, shape[0] // k, prod(shape[1:])


def seen_as(shape: tuple[int, ...], view: str) -> str:
    """The view in words."""
    if not view:
        return "as it is"
    count, rows, columns = matrices(shape, view)
    return f"{rows}×{columns}" if count == 1 else f"{count} of {rows}×{columns}"


def of_module(module: nn.Module) -> list[Named]:
    """The parameters of a module with their roles."""
    roles: dict[int, Role] = {}
    linears: dict[str, nn.Linear] = {}
    vocabulary = 0
    for name, child in module.named_modules():
        if isinstance(child, EMBEDDINGS):
            roles[id(child.weight)] = "embedding"
            vocabulary = max(vocabulary, child.num_embeddings)
        elif isinstance(child, CONVOLUTIONS):
            roles[id(child.weight)] = "convolution"
        elif isinstance(child, nn.Linear):
            linears[name] = child
    parameters = list(module.named_parameters())
    owned = {id(x.weight) for x in linears.values()}
    for name, p in parameters:
        if id(p) not in roles and id(p) not in owned and EMBEDDING.search(name):
            roles[id(p)] = "embedding"
    if linears and sum(p.ndim > 1 for _, p in parameters) > 1:
        name, last = list(linears.items())[-1]
        if id(last.weight) not in roles and _is_head(name, last, linears, vocabulary):
            roles[id(last.weight)] = "head"
    layers = layers_of(module)
    return [
        Named(name, p, roles.get(id(p), "hidden"), tuple(layers.get(p, ())))
        for name, p in parameters
    ]


def _is_head(name: str, last: nn.Linear, linears: dict[str, nn.Linear], vocabulary: int) -> bool:
    """Whether the last Linear of a model is its output; with tied embeddings it need not be."""
    if not vocabulary or HEAD.search(name):
        return True
    blocks = Counter(re.sub(r"\d+", "#", x) for x in linears)
    repeated = "#." in (pattern := re.sub(r"\d+", "#", name)) and blocks[pattern] > 1
    return last.out_features == vocabulary and not repeated


def of_iterable(parameters: Any) -> list[Named]:
    """A module, a tensor, tensors, or (name, tensor) pairs as `named_parameters()` gives them.

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(parameters, nn.Module):
        return of_module(parameters)
    if isinstance(parameters, set):
        raise TypeError("parameters need an order, but the order of a set changes between runs")
    found: list[Named] = []
    items: Iterable[Any] = [parameters] if isinstance(parameters, Tensor) else parameters
    for x in items:
        match x:
            case Named():
                found.append(x)
            case (str(name), tensor):
                owner = name.replace("/", ".").rpartition(".")[0] or name
                role: Role = "head" if HEAD.search(owner) else "named"
                found.append(Named(name, tensor, "embedding" if EMBEDDING.search(name) else role))
            case _:
                found.append(Named("", x, ""))
    if len({x.name == "" for x in found}) > 1:
        raise ValueError(
            "all optimizer params should be with/without names. Some param names are missing"
        )
    return found


def needs_gram(rule: Rule) -> bool:
    """Whether a rule needs the Gram matrix of what a layer is given."""
    return "gram" in rule.context((1, 1))


def route(
    x: Named, rule: Rule, fallback: Rule, view: str, *, chosen: bool, strict: bool, certain: bool
) -> tuple[Rule, str, str]:
    """(rule, view, reason) for a parameter, `view` being what the user asked for, or "".

    chosen: the user named the rule for the group. certain: the user gave the fallback. Raises
    ValueError where neither rule can take the parameter, or where `strict` and it is a guess.
    """
    shape = tuple(x.tensor.shape)
    name = x.name or "a parameter"
    gram = needs_gram(rule)
    if rule.domain == "any" and not gram:
        return rule, "", "takes any shape"
    if len(shape) < 2:
        if strict and not certain:
            rule.check(shape, name)
        fallback.check(shape, name)
        return fallback, "", "not a matrix: fallback"
    if view:
        matrices(shape, view)
        return rule, view, "view given"
    if x.role in ("embedding", "head") and not chosen:
        view = "" if fallback.domain == "any" else "flatten"
        return fallback, view, f"{x.role} (by place or name): fallback"
    if gram and x.layers == ():
        fallback.check(shape, name)
        view = "" if fallback.domain == "any" else "flatten"
        return fallback, view, "not of a layer whose inputs are recorded: fallback"
    if gram and x.layers and (groups := groups_of(x.layers[0])) > 1:
        return rule, f"split:{groups}", "convolution as a matrix per group"
    unknown = x.role in ("named", "") if len(shape) > 2 else x.role == "" and not chosen
    if strict and unknown:
        raise ValueError(
            f"strict=True: {name} of shape {shape} may be a hidden matrix, an embedding, a head, "
            "a convolution or a stack. Pass the module, or a group with its own rule and view"
        )
    seen = "stacked" if len(shape) > 2 and x.role == "hidden" else "flatten"
    if x.role == "hidden" and min(matrices(shape, seen)[1:]) == 1 and not (chosen or gram):
        fallback.check(shape, name)
        return fallback, "" if fallback.domain == "any" else seen, "a single row: fallback"
    if len(shape) == 2:
        return rule, seen, "matrix" if x.role else "matrix (or an embedding or head?)"
    if seen == "stacked":
        return rule, seen, "stack of matrices"
    return rule, "flatten", "convolution as a matrix"
