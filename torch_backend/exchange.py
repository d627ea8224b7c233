"""How arrays on a device mesh are cut, and how whole ones come together on one rank and go back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

# Where each rank's part of an array lies.
Blocks = tuple[tuple[slice, ...], ...]


@dataclass(frozen=True)
class Layout:
    """How arrays of a parameter are cut: over `sizes` ranks along each mesh axis that shards it.

    cuts: (place among sizes, array axis) in the order of cutting. axes: the mesh axes.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]

    @staticmethod
    def of(p: DTensor, what: str) -> Layout:
        """The layout of a parameter; ValueError for one that is no array in pieces."""
        mesh, axes, cuts = p.device_mesh, list[int](), list[tuple[int, int, int]]()
        for axis, placement in enumerate(p.placements):
            if isinstance(placement, Replicate):
                continue
            if not isinstance(placement, Shard | _StridedShard):
                raise ValueError(
                    f"{what} is placed {p.placements} on its mesh; a parameter must be sharded or "
                    "replicated over each mesh dimension"
                )
            if mesh.size(axis) > 1:
                # A strided shard is cut out of what the other mesh axes have cut.
                last = isinstance(placement, _StridedShard)
                cuts.append((last, len(axes), placement.dim % p.ndim))
                axes.append(axis)
        order = tuple((place, dim) for _, place, dim in sorted(cuts))
        return Layout(mesh, tuple(p.placements), tuple(axes), _sizes(mesh, axes), order)

    @property
    def size(self) -> int:
        """How many ranks have a part."""
        return prod(self.sizes)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that together have the whole."""
        return _group(self.mesh, self.axes)

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.group)

    @property
    def index(self) -> int:
        """This process's place among the parts, which a mesh may number in another way."""
        return self.order[self.rank]

    @property
    def order(self) -> tuple[int, ...]:
        """Which part each rank of the group has."""
        here = self.mesh.get_coordinate()
        assert here is not None
        mine = tuple(slice(None) if i in self.axes else n for i, n in enumerate(here))
        ranks = self.mesh.mesh[mine].flatten().tolist()
        return tuple(map(ranks.index, dist.get_process_group_ranks(self.group)))

    def blocks(self, shape: Sequence[int]) -> Blocks:
        """Where the parts of an array cut as the parameter lie, by rank of the group."""
        return self._ordered(_blocks(tuple(shape), self.sizes, self.cuts))

    def spread(self, shape: Sequence[int]) -> Blocks:
        """Where the parts of an array of another shape lie: cut along its first axis, once."""
        return self._ordered(_blocks(tuple(shape), self.sizes, ((0, 0),)))

    def _ordered(self, blocks: Blocks) -> Blocks:
        return tuple(blocks[i] for i in self.order)

    def everywhere(self, shape: Sequence[int]) -> Blocks:
        """The blocks of an array that each rank has whole."""
        return (tuple(slice(0, n) for n in shape),) * self.size

    def along_first(self) -> tuple[Placement, ...]:
        """The placements of arrays of another shape than the parameter's."""
        first = self.axes[0] if self.axes else -1
        return tuple(Shard(0) if i == first else Replicate() for i in range(self.mesh.ndim))


def _sizes(mesh: DeviceMesh, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(mesh.size(axis) for axis in axes)


def _group(mesh: DeviceMesh, axes: tuple[int, ...]) -> dist.ProcessGroup:
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    if mesh.mesh_dim_names is None:
        raise ValueError(
            f"a parameter is sharded over {len(axes)} dimensions of {mesh}, which has no "
            "mesh_dim_names; rules of matrices need them to bring the shards together"
        )
    names = tuple(mesh.mesh_dim_names[axis] for axis in axes)
    # Kept with the mesh: a process may set up torch.distributed, and its groups, anew.
    kept: dict[Any, dist.ProcessGroup] = vars(mesh).setdefault("_deepopt_groups", {})
    if axes not in kept:
        whole = mesh if len(axes) == mesh.ndim else mesh[names]
        kept[axes] = whole._flatten().get_group()
    return kept[axes]


@lru_cache(maxsize=4096)
def _blocks(
    shape: tuple[int, ...], sizes: tuple[int, ...], cuts: tuple[tuple[int, int], ...]
) -> Blocks:
    blocks: list[tuple[slice, ...]] = []
    for place in np.ndindex(sizes):
        parts = [(0, n) for n in shape]
        for which, axis in cuts:
            start, stop = parts[axis]
            # As torch.chunk does: all but the last parts are as long, and some may be empty.
            length = -(-(stop - start) // sizes[which])
            first = min(start + place[which] * length, stop)
            parts[axis] = first, min(first + length, stop)
        blocks.append(tuple(slice(*part) for part in parts))
    return tuple(blocks)


def volume(block: Sequence[slice]) -> int:
    """The number of entries in a block."""
    return prod(x.stop - x.start for x in block)


@dataclass(frozen=True)
class Parcel:
    """An array that one rank of a group is to have whole, and where the parts of all ranks lie."""

    shape: tuple[int, ...]
    blocks: Blocks
    owner: int


@dataclass(frozen=True)
class Exchange:
    """Moves arrays of one dtype within a group, all of them by one all-to-all."""

    group: dist.ProcessGroup
    dtype: torch.dtype
    device: torch.device

    def gather(self, parcels: Sequence[Parcel], parts: Sequence[Tensor]) -> list[Tensor | None]:
        """The whole arrays that this rank owns, and None for the others, from each rank's parts."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        mine = [x for x in parcels if x.owner == rank]
        whose = [[x for x, p in zip(parts, parcels, strict=True) if p.owner == to]
                 for to in range(size)]  # fmt: skip
        expected = [[x.blocks[source] for x in mine] for source in range(size)]
        received = self._all_to_all(whose, expected)
        wholes: list[Tensor | None] = []
        for parcel in parcels:
            if parcel.owner != rank:
                wholes.append(None)
                continue
            whole = torch.empty(parcel.shape, dtype=self.dtype, device=self.device)
            for block, given in zip(parcel.blocks, received, strict=True):
                whole[block] = next(given)
            wholes.append(whole)
        return wholes

    def scatter(self, parcels: Sequence[Parcel], wholes: Sequence[Tensor | None]) -> list[Tensor]:
        """This rank's part of each array, from those who own them."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        mine = [(p, x) for p, x in zip(parcels, wholes, strict=True) if x is not None]
        sent = [[x[p.blocks[to]] for p, x in mine] for to in range(size)]
        expected = [[p.blocks[rank] for p in parcels if p.owner == source]
                    for source in range(size)]  # fmt: skip
        received = self._all_to_all(sent, expected)
        return [next(received[p.owner]) for p in parcels]

    def _all_to_all(
        self, sent: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Sequence[slice]]]
    ) -> list[Iterator[Tensor]]:
        """What each rank sent here, in blocks of the expected sizes."""
        flat = [x.to(self.device, self.dtype).reshape(-1) for xs in sent for x in xs]
        given = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self.device)
        sizes = [sum(map(volume, blocks)) for blocks in expected]
        taken = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        splits = [sum(x.numel() for x in xs) for xs in sent]
        dist.all_to_all_single(taken, given, sizes, splits, group=self.group)
        return [
            iter([
                x.view([y.stop - y.start for y in block])
                for x, block in zip(own.split([*map(volume, blocks)]), blocks, strict=True)
            ])
            for own, blocks in zip(taken.split(sizes), expected, strict=True)
        ]  # fmt: skip
