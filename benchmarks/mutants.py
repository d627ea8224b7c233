"""Plant bugs one at a time in a copy of the tree and see that the battery catches each.

python -m benchmarks.mutants [--only WORD] writes the table of docs/testing.md. Each mutant runs
the tests of the battery until the first failure, after the tree itself has passed them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from deepopt.describe import table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "testing.md"
COPIED = ("deepopt", "torch_backend", "jax_backend", "tests", "pyproject.toml", "docs", "README.md")
BATTERY = (
    "test_core",
    "test_rule",
    "test_kronecker",
    "test_reductions",
    "test_symmetries",
    "test_torch_context",
    "test_torch_optimizer",
    "test_torch_checkpoint",
    "test_kernels",
    "test_native",
    "test_fused",
    "test_properties",
    "test_agreement",
    "test_jax_context",
    "test_jax_transform",
)


@dataclass(frozen=True)
class Mutant:
    """A bug: what it is, where, and the text that it replaces."""

    bug: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "sign flip: the dot-product objective is minimised at minus its values",
        "deepopt/memory.py",
        'Objective("dot", memory, keys, values, -sum_(answer * values), layers)',
        'Objective("dot", memory, keys, values, sum_(answer * values), layers)',
    ),
    Mutant(
        "sign flip: the library steps uphill",
        "deepopt/rule.py",
        "change = -(self.lr * decayed)",
        "change = self.lr * decayed",
    ),
    Mutant(
        "missing bias correction of Adam's first moment",
        "deepopt/rules/adaptive.py",
        "return over(m / (1.0 - beta1**t.step), root, self.eps), memories",
        "return over(m, root, self.eps), memories",
    ),
    Mutant(
        "off-by-one clock: slow memories tick one step late",
        "deepopt/rule.py",
        "if (step // self.every + phase) % period == 0",
        "if (step // self.every + phase - 1) % period == 0",
    ),
    Mutant(
        "wrong side: Kronecker factors are applied transposed",
        "deepopt/kronecker.py",
        "rows = factor @ self._cut(x, side)",
        "rows = factor.mT @ self._cut(x, side)",
    ),
    Mutant(
        "wrong power of a one-sided root",
        "deepopt/kronecker.py",
        "p, least = 2 * len(factors), as_expr(floor)",
        "p, least = 4, as_expr(floor)",
    ),
    Mutant(
        "stale cache: a trace is reused for other switches",
        "deepopt/rule.py",
        "key = (type(rule), _static_key(rule), shape, ticking)",
        "key = (type(rule), shape, ticking)",
    ),
    Mutant(
        "stale scalars: a batch reuses those of another step",
        "torch_backend/plain.py",
        'own: dict[str, Any] = {**scalars, "step": float(step)}',
        'own: dict[str, Any] = {**scalars, "step": 1.0}',
    ),
    Mutant(
        "lost dtype: memories of narrow parameters are kept as narrow",
        "torch_backend/seen.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
    ),
    Mutant(
        "weight decay twice: in the gradient and on the weights",
        "deepopt/rule.py",
        "decayed = direction + self.weight_decay * w if self.decoupled else direction",
        "decayed = direction + self.weight_decay * w",
    ),
    Mutant(
        "values are differentiated: the memory chases its own target",
        "deepopt/memory.py",
        "sum_(stop_gradient(cross) * w)",
        "sum_(cross * w * sum_(w * w))",
    ),
    Mutant(
        "0/0: a zero gradient makes NaN",
        "deepopt/functions.py",
        "return where(equal(y, 0.0), 0.0, x / where(equal(y, 0.0), 1.0, y))",
        "return x / y",
    ),
    Mutant(
        "second moment turned by the inverse of the turn",
        "deepopt/rules/preconditioned.py",
        "turns = {k: new[k].mT @ basis[k] for k in basis}",
        "turns = {k: basis[k].mT @ new[k] for k in basis}",
    ),
    Mutant(
        "stagger ignored in jax",
        "jax_backend/step.py",
        "due = {k: (count % n + phase * every) % n == 0 for k, n in periods.items()}",
        "due = {k: count % n == 0 for k, n in periods.items()}",
    ),
    Mutant(
        "gradients are written to",
        "torch_backend/plain.py",
        'donate = ["w", "g", *written] if stacked else written',
        'donate = ["w", "g", *written]',
    ),
    Mutant(
        "inputs of a layer that is used twice are averaged, not added",
        "torch_backend/layers.py",
        "        if known.backward != backward:\n            before",
        "        if True:\n            before",
    ),
    Mutant(
        "stale cache: inputs of old gradients are kept",
        "torch_backend/layers.py",
        "known = None if replaced or anew else known",
        "known = None if replaced else known",
    ),
    Mutant(
        "functions that prepare gradients are not called",
        "deepopt/rule.py",
        "g = rule.prepare(g, time)",
        "rule.prepare(g, time)",
    ),
    Mutant(
        "restarted memories keep an old step count",
        "deepopt/around.py",
        "replace(t, step=since + 1.0)",
        "t",
    ),
    Mutant(
        "a kernel overwrites a memory that a later stage reads",
        "deepopt/kernels/plan.py",
        "or due[name] > time",
        "or due[name] >= 0",
    ),
    Mutant(
        "kernels of C lose a NaN in a maximum",
        "deepopt/kernels/c.py",
        '"((({0} > {1}) | ({0} != {0})) ? {0} : {1})"',
        '"({0} > {1} ? {0} : {1})"',
    ),
    Mutant(
        "only the first chunk of a tensor is summed",
        "torch_backend/kernels/runtime.c",
        "if (!l->is_max[r]) total += x;",
        "if (!l->is_max[r]) total = x;",
    ),
    Mutant(
        "stale addresses: a memory that was replaced is not noticed",
        "torch_backend/work.py",
        "if len(now) != len(self.kept) or not all(map(is_, now, self.kept)):\n"
        "            return False\n"
        "        return _layouts(now) == self.layouts",
        "return True",
    ),
    Mutant(
        "matrices of one parameter are taken from the first",
        "torch_backend/fused.py",
        "return first[self.owner] + self.matrix * strides[self.owner]",
        "return first[self.owner]",
    ),
    Mutant(
        "one draw rounds all entries of a block",
        "deepopt/kernels/c.py",
        "draw[j] & 0xffff",
        "draw[0] & 0xffff",
    ),
)


def copy(folder: Path) -> None:
    """The tree without what it has built."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def caught(folder: Path) -> tuple[str, float]:
    """The first test of the battery that fails, or "", and the seconds until then."""
    files = [f"tests/{x}.py" for x in BATTERY if (folder / "tests" / f"{x}.py").exists()]
    flags = ("-x", "-q", "-n", "2", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *flags, *files]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) and failed is None:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return failed[1] if failed else "", time.monotonic() - start


def main() -> int:
    """0 if every planted bug is caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose description has this word")
    parser.add_argument("--skip-clean", action="store_true", help="trust that the tree passes")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.bug]
    for mutant in chosen:
        found = (ROOT / mutant.file).read_text().count(mutant.old)
        if found != 1:
            raise ValueError(f"{mutant.file} has {found} times {mutant.old!r}")
    rows = [("planted bug", "file", "caught by")]
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        clean = Path(name) / "clean"
        copy(clean)
        if not options.skip_clean and (test := caught(clean)[0]):
            print(f"the tree itself fails {test}", file=sys.stderr)
            return 2
        for i, mutant in enumerate(chosen, 1):
            folder = Path(name) / "mutant"
            shutil.copytree(clean, folder)
            path = folder / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
            test, seconds = caught(folder)
            missed += not test
            print(f"{i}/{len(chosen)} {mutant.bug}: {test or 'NOT CAUGHT'} ({seconds:.0f} s)")
            sys.stdout.flush()
            rows.append((mutant.bug, f"`{mutant.file}`", f"`{test}`" if test else "**not caught**"))
            shutil.rmtree(folder)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    if not options.only:
        write(rows, len(chosen) - missed)
    else:
        print(table(rows))
    return int(missed > 0)


def write(rows: list[tuple[str, str, str]], count: int) -> None:
    """Put the table between the marks of docs/testing.md."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    lines = [
        f"{count} of {len(body)} planted bugs are caught.",
        "",
        head,
        "| --- | --- | --- |",
        *body,
    ]
    first, second = "<!-- mutants -->", "<!-- end of mutants -->"
    text = PAGE.read_text()
    before, rest = text.split(first)
    after = rest.split(second)[1]
    PAGE.write_text(before + first + "\n" + "\n".join(lines) + "\n" + second + after)


if __name__ == "__main__":
    raise SystemExit(main())
