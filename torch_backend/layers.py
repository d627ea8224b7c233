"""Gram matrices of what layers are given, recorded beside the gradients of their weights."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

# What rules need of a parameter beyond its gradient: parameter -> name -> tensor.
Context: TypeAlias = defaultdict[Tensor, dict[str, Tensor]]
# The most numbers of a convolution's patches that are laid out at a time.
PATCHES = 1 << 24
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def on_mesh(x: Any) -> bool:
    """Whether a tensor is a DTensor, which lies on a device mesh in parts."""
    # There is none where nobody has imported the module, and it is slow to import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def whole_tensor(x: Tensor) -> Tensor:
    """All of a tensor that may lie on a mesh in parts; then every rank must ask."""
    parts: Any = x
    return parts.full_tensor() if on_mesh(x) else x


def groups_of(layer: nn.Module) -> int:
    """Into how many groups a layer cuts its inputs, each with a Gram matrix of its own."""
    return int(getattr(layer, "groups", 1))


def layers_of(module: nn.Module) -> dict[Tensor, list[nn.Module]]:
    """The Linear and Conv layers of a module by weight, where they are all that uses it.

    Not those with a forward of their own, those that are never called (nn.MultiheadAttention reads
    the weight of its output projection), and weights that another kind of module has too.
    """
    attention = [x for x in module.modules() if isinstance(x, nn.MultiheadAttention)]
    silent = {id(x.out_proj) for x in attention}
    found: dict[Tensor, list[nn.Module]] = {}
    others: set[Tensor] = set()
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        plain = any(type(layer).forward is x.forward for x in KINDS) and id(layer) not in silent
        # A parametrised weight is computed anew in every forward, and is no parameter.
        if plain and "weight" in own:
            found.setdefault(own.pop("weight"), []).append(layer)
        others |= set(own.values())
    return {weight: layers for weight, layers in found.items() if weight not in others}


@dataclass
class Sum:
    """A recorded Gram matrix, how many rows it is the mean over, the last backward pass, and
    whether a step has used it."""

    gram: Tensor
    rows: int = 0
    backward: int = -1
    used: bool = False


class Recorder:
    """Writes the "gram" of watched weights into a context whenever a backward pass meets them.

    It is Σ xᵀx over all uses of a weight, by the rows of its first use in each backward pass: uses
    in one pass add up, as their gradients do, and passes that accumulate gradients of loss/k are
    averaged over. It starts anew after a step, and where the weight's `.grad` is None.
    Shapes: d × d for d inputs, groups × d × d for a convolution with groups; float32 at least.
    Memory: that, and what autograd keeps anyway; activation checkpointing is seen through.
    Without torch.compile. Where torch.distributed runs, a step takes the mean over the rows of all
    processes. Copies and pickles watch nothing and keep only what was not recorded.
    """

    def __init__(self, context: Mapping[Tensor, dict[str, Tensor]] | None = None) -> None:
        self.context: Context = defaultdict(dict, context or {})
        self._layers: dict[Tensor, list[nn.Module]] = {}
        self._sums: dict[Tensor, Sum] = {}
        self._weights: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()

    def weight_of(self, layer: Any) -> Tensor | None:
        """The watched weight of a layer, which has another one while its shards are together."""
        weight, now = self._weights.get(layer), layer.weight
        if weight is None or (weight is not now and not on_mesh(weight)):
            return None
        return weight if weight.shape == now.shape else None

    def __reduce__(self) -> tuple[Any, ...]:
        given = {p: dict(values) for p, values in self.context.items()}
        for weight in self._recorded():
            del given[weight]["gram"]
        return Recorder, ({p: values for p, values in given.items() if values},)

    def watch(self, weight: Tensor, layers: Sequence[nn.Module]) -> None:
        """Record what these layers, which share the weight, are given from now on."""
        watched = self._layers.setdefault(weight, [])
        for layer in layers:
            self._weights[layer] = weight
            if not any(layer is x for x in watched):
                watched.append(layer)
                hook = layer.register_forward_hook(_Hook(self), with_kwargs=True)
                finalize(self, hook.remove)

    def average(self, group: dist.ProcessGroup | None = None) -> None:
        """Take the mean over the rows of all processes of a group, by one all-reduce."""
        recorded, parts = set(self._recorded()), list[Tensor]()
        for weight, layers in self._layers.items():
            known = self._sums[weight] if weight in recorded else Sum(_empty(weight, layers[0]))
            rows = torch.full((1,), float(known.rows), dtype=torch.float64)
            gram = known.gram.reshape(-1).to(torch.float64)
            parts += [gram * known.rows, rows.to(gram.device)]
        if not parts:
            return
        total = torch.cat(parts)
        dist.all_reduce(total, group=group)
        sums = iter(total.split([len(x) for x in parts]))
        for weight, layers in self._layers.items():
            gram, rows = next(sums), float(next(sums))
            if rows and weight.grad is not None and "gram" not in self.context[weight]:
                self._sums[weight] = Sum(_empty(weight, layers[0]))
                self.context[weight]["gram"] = self._sums[weight].gram
                recorded.add(weight)
            if rows and weight in recorded:
                own = self._sums[weight].gram
                own.copy_((gram / rows).view(own.shape))

    def used(self) -> None:
        """A step has used what was recorded."""
        for known in self._sums.values():
            known.used = True

    def forget(self) -> None:
        """Drop what was recorded, as zero_grad does with gradients."""
        for weight in self._recorded():
            del self.context[weight]["gram"]
        self._sums.clear()

    def _recorded(self) -> list[Tensor]:
        """The weights whose gram nobody has replaced."""
        return [p for p, x in self._sums.items() if self.context[p].get("gram") is x.gram]

    def add(self, layer: Any, weight: Tensor, x: Tensor, rows: int, backward: int) -> None:
        """Add one use of a weight on this many rows, in the backward pass of this number."""
        known, groups = self._sums.get(weight), groups_of(layer)
        if known is not None:
            replaced = self.context[weight].get("gram") is not known.gram
            anew = known.backward != backward and (known.used or weight.grad is None)
            known = None if replaced or anew else known
        if known is None:
            known = Sum(_empty(weight, layer))
            self._sums[weight], self.context[weight]["gram"] = known, known.gram
        if known.backward != backward:
            before, known.backward = known.rows, backward
            known.rows += rows
            known.gram.mul_(before / max(known.rows, 1))
        if known.gram.numel():
            gram = known.gram.view(groups, *known.gram.shape[-2:])
            for keys in _keys(layer, whole_tensor(x).to(gram.dtype), rows):
                gram.baddbmm_(keys.mT, keys, alpha=1.0 / max(known.rows, 1))


def _empty(weight: Tensor, layer: nn.Module) -> Tensor:
    """The Gram matrix of no rows."""
    groups, side = groups_of(layer), prod(weight.shape[1:])
    shape = (groups, side, side) if groups > 1 else (side, side)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype, device=weight.device)


def _keys(layer: Any, x: Tensor, rows: int) -> Iterator[Tensor]:
    """What a layer multiplies its flattened weight with, some rows at a time: groups × rows × d."""
    if isinstance(layer, nn.Linear):
        yield x.reshape(1, -1, x.shape[-1])
        return
    axes, side = len(layer.kernel_size), prod(layer.weight.shape[1:])
    x = x.unsqueeze(0) if x.ndim == axes + 1 else x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    most = PATCHES * len(x) // max(1, rows * side * layer.groups)
    windows = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(windows, 2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # images × groups × channels × places … × offsets …
    x = x.unflatten(1, (layer.groups, -1))
    places, offsets = range(3, 3 + axes), range(3 + axes, 3 + 2 * axes)
    for part in x.permute(1, 0, *places, 2, *offsets).split(max(1, most), 1):
        yield part.reshape(layer.groups, -1, side)


class _Hook:
    """What a layer calls after its forward; copies and pickles of the layer call nothing."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = None if recorder is None else ref(recorder)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        recorder = self._recorder() if self._recorder else None
        if recorder is None or _transformed():
            return output
        weight, mine = layer.weight, recorder.weight_of(layer)
        if mine is None:
            return output
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return output
        if not torch.is_grad_enabled() or not weight.requires_grad:
            return output
        return _Use.apply(output, x.detach(), layer, mine, recorder)


def _transformed() -> bool:
    """Whether a transformation of torch.func is under way, whose gradients are not ours."""
    functorch: Any = getattr(torch._C, "_functorch", None)
    return functorch is not None and functorch.peek_interpreter_stack() is not None


class _Use(torch.autograd.Function):
    """The identity on a layer's output, whose backward records the layer's input."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, layer: Any, mine: Tensor, recorder: Recorder
    ) -> Tensor:
        # Saved the way of autograd, so that activation checkpointing may drop and recompute it.
        ctx.save_for_backward(x)
        ctx.layer, ctx.weight, ctx.mine, ctx.recorder = layer, layer.weight, mine, recorder
        # A reentrant checkpoint runs forward, and a backward of its own, inside the backward pass.
        ctx.outer = torch._C._current_graph_task_id()
        # Not a view, which could not be written in place.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,), weight = ctx.saved_tensors, ctx.weight
        if not _reaches(weight):
            return grad, None, None, None, None
        backward = torch._C._current_graph_task_id() if ctx.outer < 0 else ctx.outer
        with torch.no_grad():
            # Of outputs that are cut by features, as tensor parallelism does, there are fewer.
            outputs = grad.shape[-1] if isinstance(ctx.layer, nn.Linear) else len(weight)
            rows = grad.numel() // max(1, outputs)
            ctx.recorder.add(ctx.layer, ctx.mine, x, rows, backward)
        return grad, None, None, None, None


def _reaches(weight: Tensor) -> bool:
    """Whether the backward pass under way makes a gradient of this weight."""
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # It is asked for by torch.autograd.grad, whose leaves are not executed but captured.
        return True
