"""Newton-Schulz iterations of batches of matrices, with as little arithmetic as their form allows.

What lies between x and its direction are polynomials of one symmetric matrix: half of such a
product mirrors the other half, and the long side of x need not be in all of them.
"""

import warnings
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from deepopt.functions import Polynomial, polynomials

# Long over short side from which the Gram form is the faster one.
GRAM_ASPECT = 1.75
# Bytes of the matrices that go through the steps together: of caches, or of memory to spare.
TOGETHER = {"cpu": 2**20, "cuda": 2**28}
# By the size of an entry, blocks a side and the short side from which they pay on a processor.
BLOCKED = {2: {2: 384, 4: 768}, 4: {4: 192}}
# Short side from which tiles of a triangle may be faster than cuBLAS on the whole.
TILED = 1024
# The side of such a tile, and how many entries of a sum it takes at once.
TILE = (128, 64)


def fast_precision(device: torch.device | str) -> torch.dtype:
    """bfloat16 on CUDA and on processors that multiply it in hardware, else float32."""
    kind = torch.device(device).type
    queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = kind == "cpu" and any(getattr(torch.cpu, name, bool)() for name in queries)
    return torch.bfloat16 if native or kind == "cuda" else torch.float32


@torch.no_grad()
def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: str = "quintic",
    precision: torch.dtype | None = None,
) -> Tensor:
    """`deepopt.functions.newton_schulz` of each matrix of x (..., m, n), in x's dtype and shape.

    `precision` is the dtype that products are rounded to, None for x's own; norms and the sums in
    products are of float32 at least. float16 is float32 on a processor, which cannot multiply it.
    float64 is in the standard form, like the definition. The result has no gradient.
    Raises ValueError for what is not a matrix, and for unknown coefficients.
    Source: the Gram form with restarts is Dao-AILab's; products by blocks of a triangle are ours.
    """
    if x.dim() < 2:
        raise ValueError(f"newton_schulz needs matrices, got shape {tuple(x.shape)}")
    found = polynomials(coefficients, steps)
    dtype, kind = precision or x.dtype, x.device.type
    if dtype is torch.float16 and kind == "cpu":
        dtype = torch.float32
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    long, short = max(x.shape[-2:]), min(x.shape[-2:])
    gram = long >= GRAM_ASPECT * short and dtype is not torch.float64
    iterate = _gram_form if gram else _standard_form
    wider = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wider)
    # As in `deepopt.functions.ratio`, what has norm zero is zero, also where squares underflow.
    norm = torch.where(norm == 0, torch.inf, norm)
    together = TOGETHER.get(kind, TOGETHER["cuda"]) // (long * short * dtype.itemsize)
    flat = [value.reshape(-1, *value.shape[-2:]) for value in (x, norm, out)]
    # A processor multiplies single matrices faster than stacks of one or two.
    alone = kind == "cpu" and together < 3
    parts = [value.unbind() if alone else value.split(max(1, together)) for value in flat]
    for source, size, target in zip(*parts, strict=True):
        # Contiguous, for products that write to a transposed matrix are slow.
        y = torch.empty(source.shape, dtype=dtype, device=x.device)
        torch.div(source, size, out=y)
        target.copy_(iterate(y, found))
    return out


def _standard_form(y: Tensor, steps: tuple[Polynomial, ...]) -> Tensor:
    """The iteration as it is defined, of y (m, n) or (batch, m, n)."""
    r, z, spare = _square_like(y), _square_like(y), torch.empty_like(y)
    for a, b, c in steps:
        _gram(y, r)
        _polynomial(r, b, c, z)
        y, spare = _times(z, y, spare, y, a), y
    return y


def _gram_form(y: Tensor, steps: tuple[Polynomial, ...]) -> Tensor:
    """The iteration of R = YYᵀ and of the product Q of its polynomials P = a + Z; Y = QY at times.

    Such a restart, after the second step and every third from there on, forgets the rounding of R,
    which else grows until singular values explode in bfloat16. Of the two products in PRP the first
    must not be mirrored: its rounding is not symmetric, and half of it twice is worse than all.
    """
    r, z, q, t = (_square_like(y) for _ in range(4))
    spare = torch.empty_like(y)
    for i, (a, b, c) in enumerate(steps):
        begins, ends = i == 0 or i % 3 == 2, i == len(steps) - 1 or i % 3 == 1
        if begins:
            _gram(y, r)
        _polynomial(r, b, c, z)
        if begins:
            q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q, t = _symmetric(q, z, t, q, a), q
        if ends:
            y, spare = _times(q, y, spare), y
        else:
            _product(r, z, t, r, a)
            _symmetric(z, t, r, t, a)
    return y


def _square_like(y: Tensor) -> Tensor:
    return y.new_empty(*y.shape[:-2], *[min(y.shape[-2:])] * 2)


def _gram(y: Tensor, out: Tensor) -> Tensor:
    """YYᵀ of the short side."""
    short = y.mT if y.shape[-2] > y.shape[-1] else y
    return _symmetric(short, short.mT, out)


def _polynomial(r: Tensor, b: float, c: float, out: Tensor) -> Tensor:
    """bR + cR². The step's a stays out of it: beside it R's small entries would lose digits."""
    return _symmetric(r, r, out, r, b, c) if c else torch.mul(r, b, out=out)


def _times(z: Tensor, y: Tensor, out: Tensor, base: Tensor | None = None, a: float = 0) -> Tensor:
    """ZY + a base for a symmetric Z of the short side."""
    factors = (y, z) if y.shape[-2] > y.shape[-1] else (z, y)
    return _product(*factors, out, base, a)


def _product(
    a: Tensor, b: Tensor, out: Tensor, base: Tensor | None = None, beta: float = 0, alpha: float = 1
) -> Tensor:
    """beta base + alpha ab, or ab without a base, written to `out`, which is none of them."""
    single = out.dim() == 2
    # `matmul` would copy operands that are parts of a matrix.
    if base is None:
        return torch.mm(a, b, out=out) if single else torch.bmm(a, b, out=out)
    add = torch.addmm if single else torch.baddbmm
    return add(base, a, b, beta=beta, alpha=alpha, out=out)


def _symmetric(
    a: Tensor, b: Tensor, out: Tensor, base: Tensor | None = None, beta: float = 0, alpha: float = 1
) -> Tensor:
    """`_product` where it is symmetric: the upper triangle mirrors the lower one."""
    n = out.shape[-1]
    if out.is_cuda and n >= TILED and out.dtype.itemsize == 2 and _tiles_win(a, b, out, base):
        return tiled(a, b, out, base, beta, alpha)
    # As many as a processor multiplies at full speed.
    sizes = BLOCKED[min(out.dtype.itemsize, 4)] if out.device.type == "cpu" else {}
    blocks = max((k for k, least in sizes.items() if n >= least), default=1)
    for i, j in pairwise(n * k // blocks for k in range(blocks + 1)):
        part = None if base is None else base[..., i:j, :j]
        _product(a[..., i:j, :], b[..., :j], out[..., i:j, :j], part, beta, alpha)
        if i:
            out[..., :i, i:j] = out[..., i:j, :i].mT
    return out


def tiled(
    a: Tensor, b: Tensor, out: Tensor, base: Tensor | None = None, beta: float = 0, alpha: float = 1
) -> Tensor:
    """`_symmetric` by Triton of (batch, n, k) and (batch, k, n), with sums of float32."""
    (edge, depth), (batch, n, k) = TILE, a.shape
    count = -(-n // edge)
    source = out if base is None else base
    kernel, interpreted = _triton_kernel()
    strides = (*a.stride(), *b.stride(), *source.stride(), *out.stride())
    sizes = {"N": n, "K": k, "EDGE": edge, "DEPTH": depth}
    flags = {"HAS_BASE": base is not None, "UPCAST": interpreted, "num_warps": 8, "num_stages": 3}
    with torch.cuda.device_of(out):
        launch = kernel[count * (count + 1) // 2, batch]
        launch(a, b, source, out, beta, alpha, *strides, **sizes, **flags)
    return out


@cache
def _triton_kernel() -> tuple[Any, bool]:
    """The kernel, and whether Triton interprets it; ImportError without Triton."""
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def symmetric(
        a, b, base, out, beta, alpha,
        a_batch, a_row, a_column,
        b_batch, b_row, b_column,
        base_batch, base_row, base_column,
        out_batch, out_row, out_column,
        N: tl.constexpr, K: tl.constexpr, EDGE: tl.constexpr, DEPTH: tl.constexpr,
        HAS_BASE: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        # Tile t is in row i of the triangle of tiles, whose first tile is i(i + 1)/2.
        t = tl.program_id(0)
        i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
        # Offsets of large batches are beyond int32.
        batch = tl.program_id(1).to(tl.int64)
        row = (i * EDGE + tl.arange(0, EDGE)).to(tl.int64)[:, None]
        column = ((t - i * (i + 1) // 2) * EDGE + tl.arange(0, EDGE)).to(tl.int64)[None, :]
        inner = tl.arange(0, DEPTH).to(tl.int64)
        a += batch * a_batch + row * a_row + inner[None, :] * a_column
        b += batch * b_batch + inner[:, None] * b_row + column * b_column
        total = tl.zeros((EDGE, EDGE), dtype=tl.float32)
        for start in range(0, K, DEPTH):
            left = tl.load(a + start * a_column, (row < N) & (inner[None, :] < K - start), 0.0)
            right = tl.load(b + start * b_row, (inner[:, None] < K - start) & (column < N), 0.0)
            # The interpreter's dot of bfloat16 is of its bits.
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total)
        total *= alpha
        inside = (row < N) & (column < N)
        if HAS_BASE:
            base += batch * base_batch + row * base_row + column * base_column
            total += beta * tl.load(base, mask=inside, other=0.0).to(tl.float32)
        value = total.to(out.dtype.element_ty)
        here = out + batch * out_batch + row * out_row + column * out_column
        there = out + batch * out_batch + tl.trans(column) * out_row + tl.trans(row) * out_column
        # A tile on the diagonal mirrors itself.
        tl.store(here, value, mask=inside & (row >= column))
        upper = (tl.trans(row) < N) & (tl.trans(column) <= tl.trans(row))
        tl.store(there, tl.trans(value), mask=upper)

    return symmetric, not isinstance(symmetric, triton.JITFunction)


# Which of both was faster, by device, dtype, shape and layout.
_TILES_WIN: dict[tuple[Any, ...], bool] = {}


def _tiles_win(a: Tensor, b: Tensor, out: Tensor, base: Tensor | None) -> bool:
    """Whether Triton is faster here, measured once; no while nothing can be measured."""
    key = (out.device, out.dtype, a.shape, a.stride(), b.stride(), base is None)
    if key not in _TILES_WIN:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return False
        _TILES_WIN[key] = False
        with suppress(ImportError):
            from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

            whole, half = (partial(f, a, b, out, base, 0.5, 0.5) for f in (_product, tiled))
            try:
                times = [float(cast(float, do_bench(x))) for x in (half, whole)]
                _TILES_WIN[key] = times[0] < times[1]
            except Exception as error:
                warnings.warn(f"cuBLAS multiplies, for Triton fails: {error!r}", stacklevel=2)
    return _TILES_WIN[key]
