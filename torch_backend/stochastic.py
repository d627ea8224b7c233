"""Rounding to bfloat16 at random, so that the mean is right: with torch, to the bits of kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.kernels.source import salt

# With the group, the step and the place of a matrix in its group, what random numbers go by.
KEY = 0x64656570
_LOW = 0xFFFFFFFF


def rounded(
    value: Tensor, like: Tensor, name: str, group: int, step: int, places: Sequence[int]
) -> Tensor:
    """A memory's new value in bfloat16, as it is to be stored in `like`.

    places: of the matrices that the memory belongs to, each with numbers of its own. Those of one
    alone go by the order of entries in memory, as in kernels.
    """
    order = torch.contiguous_format if len(places) > 1 else torch.preserve_format
    wide = torch.empty_like(like, dtype=torch.float32, memory_format=order).copy_(value)
    size = wide.numel() // len(places)
    flat = wide.as_strided((len(places), size), (size, 1))
    block = torch.arange(-(-size // 4), device=like.device)
    place = torch.tensor(places, device=like.device).unsqueeze(1)
    draw = _philox(block, step, place, (group, KEY ^ salt(name))).flatten(1)[:, :size] & 0xFFFF
    bits = flat.view(torch.int32)
    bits = torch.where(flat.isfinite(), bits + draw.int(), bits) >> 16
    bits = torch.where(flat.isnan(), 0x7FC0, bits).to(torch.int16)
    result = torch.empty_like(wide, dtype=torch.bfloat16)
    result.as_strided((wide.numel(),), (1,)).copy_(bits.view(torch.bfloat16).flatten())
    return result


def _philox(block: Tensor, step: int, place: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): four random words for each place and block."""
    a, b, c, d = block & _LOW, block >> 32 & _LOW, step, place
    k0, k1 = key
    for _ in range(10):
        # Products of 64 bits wrap around; their upper halves are right all the same.
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32 & _LOW) ^ b ^ k0, q & _LOW, (p >> 32 & _LOW) ^ d ^ k1, p & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return torch.stack(torch.broadcast_tensors(a, b, c, d), -1)
