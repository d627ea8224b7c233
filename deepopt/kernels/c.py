"""Regions as C: one function per sweep over part of one parameter's entries."""

from __future__ import annotations

from collections.abc import Sequence

from deepopt.expr import COMPARISONS, Expr
from deepopt.kernels.plan import REDUCTIONS, Sweep, filling
from deepopt.kernels.source import LOW, Writer, salt

TYPES = {"float64": "double", "float32": "float"}
WIDE = frozenset(TYPES)

OPERATIONS = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "neg": "(-{0})",
    "power": "pow{f}({0}, {1})",
    "sqrt": "sqrt{f}({0})",
    "rsqrt": "({one} / sqrt{f}({0}))",
    "exp": "exp{f}({0})",
    "log": "log{f}({0})",
    "sigmoid": "({one} / ({one} + exp{f}(-{0})))",
    "tanh": "tanh{f}({0})",
    # Each of these gives NaN where an operand is NaN.
    "sign": "({0} != {0} ? {0} : ({T}) (({0} > 0) - ({0} < 0)))",
    "absolute": "fabs{f}({0})",
    "floor": "floor{f}({0})",
    "maximum": "((({0} > {1}) | ({0} != {0})) ? {0} : {1})",
    "minimum": "((({0} < {1}) | ({0} != {0})) ? {0} : {1})",
    "less": "({0} < {1})",
    "less_equal": "({0} <= {1})",
    "equal": "({0} == {1})",
    "where": "({0} ? {1} : {2})",
    "reshape": "{0}",
    "stop_gradient": "{0}",
}

# The same beside a scalar, which is no NaN: compilers vectorise no chain of the longer form.
CLAMPS = {
    "maximum": "({0} < {1} ? {1} : {0})",
    "minimum": "({0} > {1} ? {1} : {0})",
}

PRELUDE = """\
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 1024

// What a sweep is given: addresses of tensors, parameters, sums of earlier sweeps; the key of the
// random numbers that round, and the step and the weights' place in the whole.
typedef struct { void *const *tensors; const double *parameters; const double *sums;
                 uint32_t key[2]; uint32_t counter[2]; } deepopt_entry;
"""

CONVERSIONS = """\
static inline void from_bfloat16(float *restrict out, const uint16_t *restrict in, int n) {
  for (int i = 0; i < n; i++) {
    const uint32_t bits = (uint32_t) in[i] << 16;
    memcpy(out + i, &bits, 4);
  }
}

static inline void to_bfloat16(uint16_t *restrict out, const float *restrict in, int n) {
  for (int i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, in + i, 4);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[i] = (uint16_t) (in[i] != in[i] ? 0x7fc0 : nearest);
  }
}
"""

HALF = """\
static inline void from_float16(float *restrict out, const uint16_t *restrict in, int n) {
  for (int i = 0; i < n; i++) {
    _Float16 x;
    memcpy(&x, in + i, 2);
    out[i] = (float) x;
  }
}

static inline void to_float16(uint16_t *restrict out, const float *restrict in, int n) {
  for (int i = 0; i < n; i++) {
    const _Float16 x = (_Float16) in[i];
    memcpy(out + i, &x, 2);
  }
}
"""

RANDOM = """\
#define from_stochastic from_bfloat16

// Philox4x32-10 (Salmon et al. 2011): four random words for a counter and a key.
static inline void philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
  uint32_t a = counter[0], b = counter[1], c = counter[2], d = counter[3];
  uint32_t k = key[0], l = key[1];
  for (int i = 0; i < 10; i++) {
    const uint64_t p = (uint64_t) 0xD2511F53u * a, q = (uint64_t) 0xCD9E8D57u * c;
    a = (uint32_t) (q >> 32) ^ b ^ k;
    b = (uint32_t) q;
    c = (uint32_t) (p >> 32) ^ d ^ l;
    d = (uint32_t) p;
    k += 0x9E3779B9u;
    l += 0xBB67AE85u;
  }
  out[0] = a; out[1] = b; out[2] = c; out[3] = d;
}

// 16 random bits are added below what is kept, so that the mean of the results is the value.
// `at` is the place of the first entry in its tensor, which `salt` tells from others of the same
// parameter; a block of four shares one draw.
static inline void to_stochastic(uint16_t *restrict out, const float *restrict in, int n,
                                 const deepopt_entry *entry, int64_t at, uint32_t salt) {
  const uint32_t key[2] = {entry->key[0], entry->key[1] ^ salt};
  for (int i = 0; i < n;) {
    const uint64_t block = (uint64_t) (at + i) / 4;
    const uint32_t counter[4] = {(uint32_t) block, (uint32_t) (block >> 32),
                                 entry->counter[0], entry->counter[1]};
    uint32_t draw[4];
    philox(draw, counter, key);
    for (int j = (int) ((at + i) % 4); j < 4 && i < n; j++, i++) {
      uint32_t bits;
      memcpy(&bits, in + i, 4);
      const uint32_t below = (bits & 0x7f800000) == 0x7f800000 ? 0 : draw[j] & 0xffff;
      out[i] = (uint16_t) (in[i] != in[i] ? 0x7fc0 : (bits + below) >> 16);
    }
  }
}
"""

EXACT = """\
// A float32 as its bfloat16, half away from zero, and the 16 bits that are left.
static inline void from_exact(float *restrict out, const uint16_t *restrict high,
                              const uint16_t *restrict low, int n) {
  for (int i = 0; i < n; i++) {
    const uint32_t both = ((uint32_t) high[i] << 16) + low[i] - ((uint32_t) (low[i] >> 15) << 16);
    // Weights that somebody else has written since have no low half.
    const int ours = ((both + 0x8000) >> 16 == high[i]) & (both >> 31 == high[i] >> 15);
    const uint32_t bits = ours ? both : (uint32_t) high[i] << 16;
    memcpy(out + i, &bits, 4);
  }
}

static inline void to_exact(uint16_t *restrict high, uint16_t *restrict low,
                            const float *restrict in, int n) {
  for (int i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, in + i, 4);
    bits = in[i] != in[i] ? 0x7fc00000 : bits;
    high[i] = (uint16_t) ((bits + 0x8000) >> 16);
    low[i] = (uint16_t) bits;
  }
}
"""


class C(Writer):
    """A region in C99, with functions `sweep_0`, `sweep_1`, … and `epilogue` if there is one.

    Each takes an entry (one parameter's addresses), the sums that it adds to, and the range of
    entries to work on. Narrow tensors are converted by blocks that stay in the first cache.
    """

    operations = OPERATIONS

    @property
    def type(self) -> str:
        return "float" if self.single_precision else "double"

    def literal(self, value: float) -> str:
        return f"{value!r}f" if self.single_precision else repr(value)

    def spelled(self, x: Expr, args: Sequence[str]) -> str:
        f = "f" if self.single_precision else ""
        text = self.operations[x.op]
        # A truth value is an int, which would divide as one.
        args = [
            f"(({self.type}) {text})"
            if arg.op in COMPARISONS and (x.op, i) != ("where", 0)
            else text
            for i, (arg, text) in enumerate(zip(x.args, args, strict=True))
        ]
        if x.op in CLAMPS and not all(arg.shape for arg in x.args):
            text = CLAMPS[x.op]
            args = args if x.args[0].shape else args[::-1]
        return text.format(*args, T=self.type, f=f, one=self.literal(1.0))

    def source(self) -> str:
        """The whole file."""
        kinds = set(self.storage.values())
        parts = [PRELUDE]
        if kinds - {"float32", "float64"}:
            parts.append(CONVERSIONS)
        if "float16" in kinds:
            parts.append(HALF)
        if "stochastic" in kinds:
            parts.append(RANDOM)
        if "exact" in kinds:
            parts.append(EXACT)
        last = len(self.region.sweeps) - 1
        for i, sweep in enumerate(self.region.sweeps):
            parts.append(self._sweep(f"sweep_{i}", sweep, i == last))
        if self.region.epilogue or any(k in self.region.singles for k in self.region.stores):
            parts.append(self._epilogue())
        return "\n".join(parts)

    def _head(self, name: str, used: Sequence[Expr]) -> list[str]:
        """The signature, and what is read once: parameters, sums so far, single tensors."""
        region, t = self.region, self.type
        lines = [
            f"void {name}(const deepopt_entry *entry, double *acc, int64_t lo, int64_t hi) {{",
            "  (void) acc; (void) lo; (void) hi;",
        ]
        for i, x in enumerate(region.parameters):
            if x in used:
                lines.append(f"  const {t} c{i} = ({t}) entry->parameters[{i}];")
        for i, x in enumerate(region.reductions):
            if x in used:
                lines.append(f"  const {t} s{i} = ({t}) entry->sums[{i}];")
        for tensor, x in region.loads.items():
            if tensor in region.singles and x in used:
                lines += self._single(tensor, self.name(x))
        return lines

    def _single(self, tensor: str, name: str) -> list[str]:
        kind, t = self.storage[tensor], self.type
        at = f"entry->tensors[{self.tensors.index(tensor)}]"
        if kind in WIDE:
            return [f"  const {t} {name} = ({t}) *(const {TYPES[kind]} *) {at};"]
        return [
            f"  float {name}_wide;",
            f"  from_{kind}(&{name}_wide, {at}, 1);",
            f"  const {t} {name} = ({t}) {name}_wide;",
        ]

    def _used(self, nodes: Sequence[Expr], roots: Sequence[Expr] = ()) -> list[Expr]:
        """What the lines of nodes read: them, and their arguments."""
        return [
            *nodes,
            *roots,
            *(filling(x) for x in (*nodes, *roots) if x.op == "array"),
            *(arg for x in nodes for arg in x.args if x.op not in REDUCTIONS),
        ]

    def _sweep(self, name: str, sweep: Sweep, last: bool) -> str:
        region, t = self.region, self.type
        stores = {k: x for k, x in region.stores.items() if last and k not in region.singles}
        read = [x for x in (*sweep.body, *(arg for r in sweep.reductions for arg in r.args))]
        used = self._used((*sweep.before, *sweep.body), (*stores.values(), *read))
        lines = self._head(name, used)
        lines += [f"  const {t} {n} = {e};{note}" for n, e, note in self.statements(sweep.before)]
        places = {x: i for i, x in enumerate(region.reductions)}
        sums = [x for x in sweep.reductions if x.op == "sum"]
        peaks = [x for x in sweep.reductions if x.op == "max"]
        lines += [f"  double a{places[x]} = 0;" for x in sums]
        lines += [f"  double a{places[x]} = -INFINITY;" for x in peaks]
        lines += [
            "  for (int64_t at = lo; at < hi; at += BLOCK) {",
            "    const int n = hi - at < BLOCK ? (int) (hi - at) : BLOCK;",
        ]
        loads = {k: x for k, x in region.loads.items() if k not in region.singles and x in used}
        for tensor in dict.fromkeys((*loads, *stores)):
            lines += self._open(tensor, tensor in loads)
        simd = ["#pragma omp simd", *(f"reduction(+:a{places[x]})" for x in sums)]
        lines += [] if peaks else ["    " + " ".join(simd)]
        lines.append("    for (int i = 0; i < n; i++) {")
        for tensor, x in loads.items():
            lines.append(f"      const {t} {self.name(x)} = ({t}) {self.word(tensor)}_at[i];")
        lines += [f"      const {t} {n} = {e};{note}" for n, e, note in self.statements(sweep.body)]
        for x in sweep.reductions:
            a, value = f"a{places[x]}", f"(double) {self.value(x.args[0])}"
            if x.op == "sum":
                lines.append(f"      {a} += {value};")
            else:
                lines.append(f"      {a} = ({value} > {a} || {value} != {value}) ? {value} : {a};")
        for tensor, x in stores.items():
            lines.append(f"      {self.word(tensor)}_at[i] = {self.value(x)};")
        lines.append("    }")
        lines += [line for tensor in stores for line in self._close(tensor)]
        lines.append("  }")
        lines += [f"  acc[{places[x]}] = a{places[x]};" for x in sweep.reductions]
        return "\n".join([*lines, "}", ""])

    def _open(self, tensor: str, loaded: bool) -> list[str]:
        """A pointer to the entries of a block, which for narrow tensors is a wide copy."""
        kind, word = self.storage[tensor], self.word(tensor)
        at = f"entry->tensors[{self.tensors.index(tensor)}]"
        if kind in WIDE:
            return [f"    {TYPES[kind]} *restrict {word}_at = ({TYPES[kind]} *) {at} + at;"]
        lines = [f"    float {word}_at[BLOCK];"]
        if loaded:
            low = f", {self._low()}" if kind == "exact" else ""
            lines.append(f"    from_{kind}({word}_at, (uint16_t *) {at} + at{low}, n);")
        return lines

    def _close(self, tensor: str) -> list[str]:
        """Write back what narrow tensors have got."""
        kind, word = self.storage[tensor], self.word(tensor)
        if kind in WIDE:
            return []
        at = f"(uint16_t *) entry->tensors[{self.tensors.index(tensor)}] + at"
        low = f", {self._low()}" if kind == "exact" else ""
        rest = f", entry, at, {salt(tensor)}u" if kind == "stochastic" else ""
        return [f"    to_{kind}({at}{low}, {word}_at, n{rest});"]

    def _low(self) -> str:
        return f"(uint16_t *) entry->tensors[{self.tensors.index(LOW)}] + at"

    def _epilogue(self) -> str:
        region, t = self.region, self.type
        stores = {k: x for k, x in region.stores.items() if k in region.singles}
        lines = self._head("epilogue", self._used(region.epilogue, tuple(stores.values())))
        lines += [
            f"  const {t} {n} = {e};{note}" for n, e, note in self.statements(region.epilogue)
        ]
        for tensor, x in stores.items():
            kind, at = self.storage[tensor], f"entry->tensors[{self.tensors.index(tensor)}]"
            if kind in WIDE:
                lines.append(f"  *({TYPES[kind]} *) {at} = {self.value(x)};")
            else:
                word = self.word(tensor)
                lines.append(f"  const float {word}_new = (float) {self.value(x)};")
                lines.append(f"  to_{kind}({at}, &{word}_new, 1);")
        return "\n".join([*lines, "}", ""])
