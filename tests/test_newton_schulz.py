"""Orthogonalisation: the coefficients, and torch's kernel against the definition and the SVD."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
import torch
from papers import common

from deepopt.functions import newton_schulz as defined
from deepopt.functions import optimal_quintic, polar_express, polynomials
from torch_backend import lift
from torch_backend.kernels import newton_schulz as kernel
from torch_backend.kernels.newton_schulz import fast_precision, newton_schulz

definition = lift(defined)
ITERATIONS = [("quintic", 5), ("cubic", 9), ("polar_express", 5), ("polar_express", 8)]
# Square and not, one row or column, short sides on both sides of every threshold of the kernel.
SHAPES = [(1, 1), (1, 7), (9, 1), (5, 5), (7, 12), (33, 19), (40, 150), (200, 210), (390, 200)]
# Of a result's norm. Rounding of 1e-16 and 6e-8 at large singular values moves small ones, which
# the polynomials multiply a thousandfold.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(m, n, spectrum):
    left, _, right = torch.linalg.svd(gaussian(m, n), full_matrices=False)
    k = torch.arange(min(m, n), dtype=torch.float64)
    values = {
        "gaussian": torch.linalg.svdvals(gaussian(m, n)),
        "1/k": 1 / (k + 1),
        "three orders": 10 ** (-3 * k / max(min(m, n) - 1, 1)),
        "six orders": 10 ** (-6 * k / max(min(m, n) - 1, 1)),
        "rank one": (k == 0).double(),
    }
    return left * values[spectrum] @ right


def polar(x):
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    return left @ right


def distance(x, y):
    return float((x.double() - y).norm() / y.norm())


def cosine(x, y):
    return float((x.double() * y).sum() / (x.double().norm() * y.norm()))


def band(x):
    values = torch.linalg.svdvals(x.double())
    return float(values.min()), float(values.max())


def test_the_polar_express_is_the_published_list():
    found = np.array(polar_express(8, safety=1.0))
    np.testing.assert_allclose(found[:6], common.POLAR_EXPRESS[:6], rtol=1e-13)
    # Ends that are equal to 1e-4 and less leave the exchange as many digits fewer.
    np.testing.assert_allclose(found, common.POLAR_EXPRESS, rtol=1e-8)
    assert polynomials("polar_express", 6) == polar_express(6, safety=1.05)
    safe = found / 1.05 ** np.array([1, 3, 5])
    np.testing.assert_allclose(polar_express(8), safe, rtol=1e-13)
    assert polar_express(0) == ()


@pytest.mark.parametrize("lower", [1e-3, 0.1, 0.7, 0.97])
def test_the_optimal_quintic_has_four_equal_errors_of_alternating_sign(lower):
    a, b, c = optimal_quintic(lower, 1.0)
    x = np.linspace(lower, 1.0, 200_001)
    error = 1 - (a * x + b * x**3 + c * x**5)
    worst = np.abs(error).max()
    signs = np.sign(error[np.abs(error) > worst * (1 - 1e-4)])
    assert worst > 0 and 1 + np.count_nonzero(np.diff(signs)) == 4
    assert error[0] == pytest.approx(worst) and error[-1] == pytest.approx(-worst)


def test_the_polar_express_is_close_to_one_on_its_interval():
    x = np.geomspace(1e-3, 1.0, 10_000)
    for step, (a, b, c) in enumerate(polar_express(8), start=1):
        x = a * x + b * x**3 + c * x**5
        if step == 5:
            assert x[2 * x.size // 3 - 3000 :].min() > 0.84 > x.min() and x.max() < 1.13
    assert np.abs(x - 1).max() < 3e-4


def test_unknown_coefficients_and_vectors_are_refused():
    with pytest.raises(ValueError, match=r"'septic': choose one of \['cubic', 'polar_express'"):
        newton_schulz(gaussian(2, 3), coefficients="septic")
    with pytest.raises(ValueError, match=r"needs matrices, got shape \(3,\)"):
        newton_schulz(gaussian(3))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spectrum", ["gaussian", "six orders", "rank one"])
@pytest.mark.parametrize("iteration", ITERATIONS, ids=str)
def test_it_is_the_definition(iteration, spectrum, dtype):
    coefficients, steps = iteration
    for shape in SHAPES:
        x = with_spectrum(*shape, spectrum).to(dtype)
        expected = definition(x.double(), steps=steps, coefficients=coefficients)
        found = newton_schulz(x, steps=steps, coefficients=coefficients)
        assert found.dtype is dtype and found.shape == x.shape
        # Where singular values are nothing but rounding, the definition multiplies its own.
        slack = 10 if spectrum == "rank one" else 1
        assert distance(found, expected) < slack * TOLERANCE[dtype], shape


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6, 7])
def test_every_number_of_steps(steps, coefficients):
    for shape in ((6, 24), (24, 6), (9, 10)):
        x = gaussian(*shape).float()
        expected = definition(x.double(), steps=steps, coefficients=coefficients)
        found = newton_schulz(x, steps=steps, coefficients=coefficients)
        assert distance(found, expected) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(20, 20), (20, 70), (400, 410), (200, 800)])
def test_a_tall_matrix_is_the_transpose_of_a_wide_one(shape, dtype):
    x = gaussian(*shape).float()
    wide = newton_schulz(x, precision=dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for tall in (x.mT, x.mT.contiguous()):
        assert distance(newton_schulz(tall, precision=dtype).mT, wide.double()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (4, 30), (30, 4), (200, 200), (200, 600)])
def test_batches_are_matrices_each_by_itself(shape, dtype, monkeypatch):
    x = gaussian(2, 3, *shape).float()
    x[0, 1, -1, -1] = torch.nan
    x[1, 1] = 0.0
    x[1, 2] *= 1e-30
    each = [newton_schulz(m, precision=dtype) for m in x.flatten(0, 1)]
    for limit in (1, 4 * x[0, 0].numel() * dtype.itemsize, 2**24):
        monkeypatch.setitem(kernel.TOGETHER, "cpu", limit)
        found = newton_schulz(x, precision=dtype)
        assert found.shape == x.shape and found.dtype is x.dtype
        assert found[0, 1].isnan().all()
        # Squares of 1e-30 are zero in float32, the dtype of the norm, as in the definition.
        assert torch.equal(found[1, 1:], torch.zeros_like(found[1, 1:]))
        for i, m in enumerate(found.flatten(0, 1)):
            if i not in (1, 4, 5):
                tolerance = {4: 1e-5, 8: 1e-6}.get(dtype.itemsize, 2e-2)
                assert distance(m, each[i].double()) < tolerance


def test_edges_are_those_of_the_definition():
    for value in (0.0, 1e-30, 1e30, float("nan"), float("inf")):
        for shape in ((3, 3), (3, 9)):
            x = torch.full(shape, 0.0)
            x[1, 2] = value
            torch.testing.assert_close(newton_schulz(x), definition(x), equal_nan=True)
    for shape in ((0, 3), (3, 0), (0, 3, 4)):
        assert newton_schulz(torch.zeros(shape)).shape == shape
    row = torch.zeros(4, 16)
    row[2] = 1e10
    found = newton_schulz(row, precision=torch.bfloat16)
    assert float(found[2].norm()) == pytest.approx(0.70, abs=0.03)
    assert not found[[0, 1, 3]].any()


def test_what_comes_in_stays_as_it_is_and_what_comes_out_has_no_gradient():
    x = gaussian(4, 12).float().requires_grad_()
    before = x.detach().clone()
    assert not newton_schulz(x).requires_grad and torch.equal(x, before)
    half = newton_schulz(before.half())
    assert half.dtype is torch.float16 and distance(half, definition(before.double())) < 2e-3


@pytest.mark.parametrize("spectrum", ["gaussian", "1/k"])
@pytest.mark.parametrize("coefficients, steps", [("quintic", 5), *ITERATIONS[2:]])
def test_the_gram_form_in_bfloat16_is_about_as_near_as_the_standard_form(
    coefficients, steps, spectrum, monkeypatch
):
    for shape in ((64, 256), (400, 800)):
        x = with_spectrum(*shape, spectrum).float()
        arguments = {"steps": steps, "coefficients": coefficients, "precision": torch.bfloat16}
        gram = newton_schulz(x, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "GRAM_ASPECT", float("inf"))
            standard = newton_schulz(x, **arguments)
        # Between restarts the rounding of R, 4e-3, is amplified by steps of slope 8.
        assert cosine(gram, polar(x)) > cosine(standard, polar(x)) - 3e-3
        (low, high), room = band(standard), 0.06 if spectrum == "gaussian" else 0.22
        assert low - 0.03 < band(gram)[0] and band(gram)[1] < high + room
        assert cosine(gram, standard.double()) > 0.995


@pytest.mark.parametrize("shape", [(400, 400), (400, 800)])
def test_blocks_of_a_triangle_are_the_whole(shape, monkeypatch):
    x = with_spectrum(*shape, "six orders").float()
    whole = definition(x.double())
    blocked = {d: newton_schulz(x, precision=d) for d in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(kernel, "BLOCKED", {2: {}, 4: {}})
    for dtype, found in blocked.items():
        plain = newton_schulz(x, precision=dtype)
        # Rounding at singular values below its own size is not the blocks' to mend.
        assert distance(found, whole) < 4 * distance(plain, whole)
        assert band(found)[1] < 1.4


@pytest.mark.parametrize("blocks", [1, 2, 4, 16])
def test_mirrored_products_do_not_make_singular_values_explode(blocks, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCKED", {2: {blocks: 8}})
    x = with_spectrum(128, 512, "three orders").float()
    found = newton_schulz(x, steps=8, coefficients="polar_express", precision=torch.bfloat16)
    assert band(found)[1] < 1.05


def test_float64_is_in_the_standard_form_of_the_definition(monkeypatch):
    x = gaussian(4, 30)
    found = newton_schulz(x)
    monkeypatch.setattr(kernel, "GRAM_ASPECT", float("inf"))
    assert torch.equal(found, newton_schulz(x))


def test_the_fast_precision_is_what_the_device_multiplies(monkeypatch):
    assert fast_precision("cuda") is torch.bfloat16
    assert fast_precision("meta") is torch.float32
    for name, other in (("_is_avx512_bf16_supported", "_is_amx_tile_supported"),) * 2:
        for value in (True, False):
            monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
            monkeypatch.delattr(torch.cpu, other, raising=False)
            expected = torch.bfloat16 if value else torch.float32
            assert fast_precision(torch.device("cpu")) is expected


def test_tiles_are_chosen_once_where_they_are_faster(monkeypatch):
    timed = []

    def do_bench(multiply):
        timed.append(multiply.func)
        return times[multiply.func]

    fake = types.ModuleType("triton.testing")
    fake.do_bench = do_bench
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", fake)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernel, "_TILES_WIN", {})
    a, r = gaussian(1, 4, 6), gaussian(1, 4, 4)
    times = {kernel._product: 2.0, kernel.tiled: 1.0}
    assert kernel._tiles_win(a, a.mT, r, None) and kernel._tiles_win(a, a.mT, r, None)
    assert len(timed) == 2
    times = {kernel._product: 1.0, kernel.tiled: 2.0}
    assert not kernel._tiles_win(r, r, r, r) and len(timed) == 4
    times = {}
    with pytest.warns(UserWarning, match="Triton fails: KeyError"):
        assert not kernel._tiles_win(a.mT, a, gaussian(1, 6, 6), None)
    monkeypatch.setattr(kernel, "_TILES_WIN", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not kernel._tiles_win(r, r, r, r) and not kernel._TILES_WIN


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_tiles_by_triton_interpreted():
    script = """
        import torch
        from torch_backend.kernels import newton_schulz as kernel

        kernel.TILE = (16, 16)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            for batch, n, k in ((1, 16, 32), (2, 33, 20), (1, 49, 7), (2, 1, 5)):
                x = torch.randn(2, batch, n * k).to(dtype)
                for a in (x[0].view(batch, n, k), x[1].view(batch, k, n).mT):
                    out = torch.full((batch, n, n), torch.nan, dtype=dtype)
                    kernel.tiled(a, a.mT, out)
                    assert torch.equal(out, out.mT)
                    torch.testing.assert_close(
                        out.float(), a.float() @ a.float().mT, atol=10 * tolerance, rtol=tolerance
                    )
                r = torch.randn(batch, n, n)
                r = ((r + r.mT) / 10).to(dtype)
                z = r @ r
                z = ((z + z.mT) / 2).to(dtype)
                out = torch.full((batch, n, n), torch.nan, dtype=dtype)
                kernel.tiled(r, r, out, z, 0.3, -0.5)
                assert torch.equal(out, out.mT)
                expected = 0.3 * z.float() - 0.5 * r.float() @ r.float()
                torch.testing.assert_close(
                    out.float(), expected, atol=10 * tolerance, rtol=tolerance
                )
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.stdout == "done\n", done.stderr
