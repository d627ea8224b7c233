"""Associative memories: structures × objectives, and the write rules derived from them.

A memory maps keys to values. Keys and values are rows: a linear layer of weight (in × out) reads
`keys @ weight`, the transpose of the paper's column convention. Memories of gradients hold plus
the gradient and are stepped against, the mirror image (m → -m) of the paper's W ← W + m.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from deepopt.expr import (
    Expr,
    Number,
    array,
    as_expr,
    exp,
    log,
    matmul,
    maximum,
    minimum,
    stop_gradient,
    sum_,
    tanh,
)
from deepopt.functions import ratio, solve
from deepopt.grad import grad

M = TypeVar("M", bound="Memory")
Solver = Literal["explicit", "prox", "sequential"]
Product = Callable[[Expr, Expr], Expr]

# Retentions below it count as it in a sequential write, which takes their logarithm.
SMALLEST = 1e-30


@dataclass(frozen=True)
class Layer:
    """One linear map inside a read: product = inputs @ weight."""

    weight: Expr
    inputs: Expr
    product: Expr


class Memory(ABC):
    """A structure with parameters that keys are read through."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[Expr, ...]: ...

    @abstractmethod
    def rebuilt(self: M, parameters: Sequence[Expr]) -> M:
        """The same structure with other parameters."""

    @abstractmethod
    def read(self, keys: Expr | None, product: Product = matmul) -> tuple[Expr, tuple[Layer, ...]]:
        """What the memory answers to rows of keys, and the linear maps on the way.

        product: stands in for inputs @ weight.
        """


@dataclass(frozen=True)
class Table(Memory):
    """A memory without keys: it holds one value of its own shape (a momentum buffer)."""

    value: Expr

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (self.value,)

    def rebuilt(self, parameters: Sequence[Expr]) -> Table:
        return Table(*parameters)

    def read(self, keys: Expr | None, product: Product = matmul) -> tuple[Expr, tuple[Layer, ...]]:
        if keys is not None:
            raise ValueError(f"a Table is read without keys, got keys of shape {keys.shape}")
        return self.value, ()


@dataclass(frozen=True)
class Linear(Memory):
    """A matrix memory (in × out): keys (n × in) read keys @ weight (n × out)."""

    weight: Expr

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (self.weight,)

    def rebuilt(self, parameters: Sequence[Expr]) -> Linear:
        return Linear(*parameters)

    def read(self, keys: Expr | None, product: Product = matmul) -> tuple[Expr, tuple[Layer, ...]]:
        answer = product(_present(keys), self.weight)
        return answer, (Layer(self.weight, _present(keys), answer),)


@dataclass(frozen=True)
class MLP(Memory):
    """The residual two-layer memory of paper Eq. 89: m(x) = x + tanh(x first) second.

    first (d × width) and second (width × d). An odd activation (ours; the paper leaves it open)
    makes the memory odd: the memory of -g is minus the memory of g.
    """

    first: Expr
    second: Expr

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (self.first, self.second)

    def rebuilt(self, parameters: Sequence[Expr]) -> MLP:
        return MLP(*parameters)

    def read(self, keys: Expr | None, product: Product = matmul) -> tuple[Expr, tuple[Layer, ...]]:
        keys = _present(keys)
        before = product(keys, self.first)
        hidden = tanh(before)
        after = product(hidden, self.second)
        return keys + after, (Layer(self.first, keys, before), Layer(self.second, hidden, after))


def _present(keys: Expr | None) -> Expr:
    if keys is None:
        raise ValueError("this memory is read through keys; only a Table has none")
    return keys


@dataclass(frozen=True)
class Objective(Generic[M]):
    """What a memory should answer, and how far it is from it."""

    kind: Literal["dot", "l2"]
    memory: M
    keys: Expr | None
    values: Expr
    loss: Expr
    layers: tuple[Layer, ...]
    gram: Expr | None = None


def dot(memory: M, values: Expr, keys: Expr | None = None) -> Objective[M]:
    """-⟨memory(keys), values⟩: the Hebbian objective, unbounded below, so it needs retention."""
    answer, layers = memory.read(keys)
    return Objective("dot", memory, keys, values, -sum_(answer * values), layers)


def l2(memory: M, values: Expr, keys: Expr | None = None) -> Objective[M]:
    """½‖memory(keys) - values‖²: regression, whose write erases before it adds (the delta rule)."""
    answer, layers = memory.read(keys)
    error = answer - values
    return Objective("l2", memory, keys, values, 0.5 * sum_(error * error), layers)


def l2_of_moments(memory: Linear, gram: Expr, cross: Expr) -> Objective[Linear]:
    """The l2 objective of keys X and values V that are known by XᵀX (`gram`) and XᵀV (`cross`).

    Up to the constant ½‖V‖²: all that a write of a linear memory needs of many keys.
    """
    w, product = memory.weight, stop_gradient(gram @ memory.weight)
    # ½⟨W, AW⟩ with the derivative AW: A is symmetric, which grad cannot know.
    half = sum_(w * product) - 0.5 * stop_gradient(sum_(w * product))
    loss = half - sum_(stop_gradient(cross) * w)
    return Objective("l2", memory, None, cross, loss, (), gram)


@dataclass(frozen=True)
class Level:
    """A recorded write, for the table of the nest."""

    structure: str
    name: str
    keys: Expr | None
    values: Expr
    objective: str
    solver: str
    retention: Expr
    rate: Expr
    result: tuple[Expr, ...]


_levels: ContextVar[list[Level] | None] = ContextVar("levels", default=None)


@contextmanager
def recording() -> Generator[list[Level], None, None]:
    """Collect the writes made inside the block."""
    levels: list[Level] = []
    token = _levels.set(levels)
    try:
        yield levels
    finally:
        _levels.reset(token)


def write(
    objective: Objective[M],
    *,
    retention: Number = 1.0,
    rate: Number = 1.0,
    solver: Solver = "explicit",
    delta: bool = False,
    normalize: bool = False,
    anchor: Sequence[Expr] | None = None,
) -> M:
    """The memory after one write: a step on its objective, found by `grad`.

    retention α: share of the parameters that is kept (1 keeps all); `anchor` is what they decay
        to (zero by default).
    rate η: inner learning rate, in units of parameter per gradient of the objective.
    solver "explicit": αp - η∇. "prox": the exact minimiser of objective + ‖p - αp_old‖²/2η, for an
        l2 objective on a Linear memory. "sequential": the rows are tokens in time, α and η are
        columns (n × 1), each token is one step, and all gradients are taken at the old memory
        (paper §8.2, a chunk); computed without a loop over tokens, for α of 1e-30 to 1.
    delta: delta gradient descent (paper Eq. 57, 88): also descend ½‖inputs @ weight‖² of every
        layer with its inputs held fixed, so that what the keys held is erased before it is written.
    normalize: divide the rate of each layer by the squared Frobenius norm of its inputs, which
        bounds the explicit step for any key (ours). With "sequential", token t has the rate of the
        exact delta step, η_t / (1 + η_t‖x_t‖²).
    """
    retention, rate = as_expr(retention), as_expr(rate)
    memory = objective.memory
    if (delta or normalize or solver == "sequential") and not objective.layers:
        raise ValueError("delta, normalize and 'sequential' go by keys; this objective has none")
    extra = {"delta": delta, "normalize": normalize, "anchor": anchor is not None}
    takes = {"explicit": extra, "prox": {}, "sequential": {"delta", "normalize"}}
    refused = [k for k, given in extra.items() if given and k not in takes.get(solver, extra)]
    if refused:
        raise ValueError(
            f"solver={solver!r} does not take {refused}; 'explicit' takes delta, normalize and "
            "anchor, 'sequential' the first two"
        )
    match solver:
        case "prox":
            new = [_proximal(objective, retention, rate)]
        case "sequential":
            walked = walk(
                objective, retention=retention, rate=rate, delta=delta, normalize=normalize
            )
            new = list(walked.memory.parameters)
        case "explicit":
            loss = objective.loss
            for layer in objective.layers if delta else ():
                product = matmul(stop_gradient(layer.inputs), layer.weight)
                loss = loss + 0.5 * sum_(product * product)
            old = memory.parameters
            rates = [rate] * len(old)
            if normalize:
                rates = [_normalized(rate, layer) for layer in objective.layers]
            steps = [eta * d for eta, d in zip(rates, grad(loss, old), strict=True)]
            kept = [
                retention * p if a is None else a + retention * (p - a)
                for p, a in zip(old, anchor or [None] * len(old), strict=True)
            ]
            new = [p - step for p, step in zip(kept, steps, strict=True)]
        case _:  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError(f"solver={solver!r} must be 'explicit', 'prox' or 'sequential'")
    _record(objective, retention, rate, solver, tuple(new))
    return memory.rebuilt(new)


def descent(objective: Objective[M], rate: Number, solver: Literal["explicit", "prox"]) -> Expr:
    """The direction d of a write to weights w without decay: new = w - rate·d.

    "explicit": the gradient ∇. "prox": (I + ηXᵀX)⁻¹∇, exact for an l2 objective on a Linear
    memory, and the gradient where the rate η is zero.
    """
    (old,) = objective.memory.parameters
    (d,) = grad(objective.loss, [old])
    if solver == "prox":
        gram = _gram(objective)
        d = solve(array("eye", gram.shape) + as_expr(rate) * gram, d)
    _record(objective, as_expr(1.0), as_expr(rate), solver, (d,), name="w")
    return d


def average(m: Expr, value: Expr, retention: Number) -> Expr:
    """The exponential moving average: a dot-product memory of `value` with rate 1 - retention."""
    return write(dot(Table(m), value), retention=retention, rate=1.0 - as_expr(retention)).value


def _normalized(rate: Expr, layer: Layer) -> Expr:
    return ratio(rate * array("full", (1, 1)), sum_(layer.inputs * layer.inputs))


def _gram(objective: Objective[M]) -> Expr:
    """XᵀX of the keys of an l2 objective on a Linear memory."""
    keys, gram = objective.keys, objective.gram
    if isinstance(objective.memory, Linear) and objective.kind == "l2":
        if gram is not None:
            return gram
        if keys is not None:
            return keys.mT @ keys
    raise ValueError(
        f"solver='prox' is exact for an l2 objective on a Linear memory, "
        f"not for {objective.kind} on {type(objective.memory).__name__}"
    )


def _proximal(objective: Objective[M], retention: Expr, rate: Expr) -> Expr:
    """(I + ηXᵀX)⁻¹(αW + ηXᵀV), by the smaller of the two Gram matrices of the keys X."""
    gram, keys, values = _gram(objective), objective.keys, objective.values
    kept = retention * objective.memory.parameters[0]
    if keys is None or keys.shape[1] <= keys.shape[0]:
        cross = values if keys is None else keys.mT @ values
        return solve(array("eye", gram.shape) + rate * gram, kept + rate * cross)
    small = keys @ keys.mT
    system = array("eye", small.shape) + rate * small
    return kept + rate * (keys.mT @ solve(system, values - keys @ kept))


@dataclass(frozen=True)
class _Products:
    """Products of a column of numbers in (0, 1] over stretches of rows."""

    logs: Expr
    until: Expr  # logarithms of the products of rows 1 to t

    @classmethod
    def of(cls, column: Expr) -> _Products:
        logs = log(maximum(column, SMALLEST))
        # A sum of products, for torch's autocast would round the operands of a matrix product.
        until = sum_(array("lower", (column.shape[0],) * 2) * logs.mT, (-1,))
        return cls(logs, until)

    @property
    def before(self) -> Expr:
        return exp(self.until - self.logs)

    @property
    def through(self) -> Expr:
        return exp(self.until)

    @property
    def total(self) -> Expr:
        return exp(sum_(self.logs))

    @property
    def after(self) -> Expr:
        return exp(sum_(self.logs) - self.until)

    def between(self, *, inclusive: bool) -> Expr:
        """Entry (t, s) for s < t: over the rows s < j < t, or s < j ≤ t, where (t, t) is 1."""
        end = self.until if inclusive else self.until - self.logs
        # Above the diagonal the exponent is positive and the mask is zero.
        mask = array("lower" if inclusive else "strictly_lower", (end.shape[0],) * 2)
        return exp(minimum(end - self.until.mT, 0.0)) * mask


@dataclass(frozen=True)
class _Path:
    """A weight along a sequential write of n rows x.

    At row t it is Σ share_t matrix over `starts` minus Σ_s push_ts x_sᵀ u_s over `pushes`. Of the
    three coefficients each has, one is for before row t is written, one for after, one for the end.
    """

    inputs: Expr
    starts: list[tuple[tuple[Expr, ...], Expr]]  # [n, 1], [n, 1], [1, 1]; [in, out]
    pushes: list[tuple[tuple[Expr, ...], Expr]]  # [n, n], [n, n], [n, 1]; u [n, out]

    def answer(self, x: Expr, after: bool = False) -> Expr:
        """Row t of x through the weight as it is before, or after, row t is written."""
        overlap = x @ self.inputs.mT
        parts = [share[after] * (x @ matrix) for share, matrix in self.starts]
        parts += [-((push[after] * overlap) @ u) for push, u in self.pushes]
        return sum(parts[1:], parts[0])

    def end(self) -> Expr:
        parts = [share[2] * matrix for share, matrix in self.starts]
        parts += [-((push[2] * self.inputs).mT @ u) for push, u in self.pushes]
        return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class Walk(Generic[M]):
    """A sequential write, seen whole: the memory and its velocities at the end, and on the way.

    velocity: one per parameter, empty without momentum.
    """

    memory: M
    velocity: tuple[Expr, ...]
    start: M
    paths: dict[Expr, _Path]

    def read(self, queries: Expr, *, after: bool = False) -> Expr:
        """Row t: the answer to query t when only the rows s < t, or s ≤ t, have been written."""
        return self.start.read(queries, lambda x, weight: self.paths[weight].answer(x, after))[0]


def walk(
    objective: Objective[M],
    *,
    retention: Number = 1.0,
    rate: Number = 1.0,
    delta: bool = False,
    normalize: bool = False,
    begin: Sequence[Expr] | None = None,
    momentum: Number | None = None,
    velocity: Sequence[Expr] | None = None,
) -> Walk[M]:
    """The sequential `write`: one step per row, W_t = α_t W_{t-1} - η_t x_tᵀ (x_t W_{t-1} + δ_t).

    All at once: the u_t = x_t W_{t-1} + δ_t solve one unit lower triangular system. Without delta
    u_t = δ_t. Nothing is divided by a product of α. The arguments of `write`, and

    begin: the parameters before the first row when these rows continue a chunk, whose start is the
        objective's memory: there all gradients are taken.
    momentum θ: share of the velocity kept per row, a number or a column in [1e-30, 1]: the
        gradients go through S_t = θ_t S_{t-1} - η_t x_tᵀ δ_t and W_t gains S_t (Titans). The delta
        term stays outside of it (ours).
    velocity: S before the first row, one per parameter; zero by default.
    """
    if velocity is not None and momentum is None:
        raise ValueError("velocity without momentum: nothing says how much of it is kept")
    old = objective.memory.parameters
    weights = dict(zip(old, old if begin is None else begin, strict=True))
    speeds = {} if velocity is None else dict(zip(old, velocity, strict=True))
    n = objective.layers[0].inputs.shape[0]
    ones, eye = array("full", (n, 1)), array("eye", (n, n))
    kept = _Products.of(as_expr(retention) * ones)
    between = kept.between(inclusive=False), kept.between(inclusive=True)
    flow = None if momentum is None else _Products.of(as_expr(momentum) * ones)
    paths: dict[Expr, _Path] = {}
    velocities: list[Expr] = []
    for layer in objective.layers:
        x, weight = layer.inputs, layer.weight
        (errors,) = grad(objective.loss, [layer.product])
        eta = as_expr(rate) * ones
        if normalize:
            eta = eta / (1.0 + eta * sum_(x * x, (-1,)))
        shares = kept.before, kept.through, kept.total
        path = paths[weight] = _Path(x, [(shares, weights[weight])], [])
        if flow is not None:
            # W_t holds every S_s before it, S_s every gradient before it.
            run, since, speed = flow.between(inclusive=True), flow.through, speeds.get(weight)
            surge = [(b @ run) * eta.mT for b in between]
            path.pushes.append(((*surge, (run.mT @ kept.after) * eta), errors))
            new = -((flow.after * eta * x).mT @ errors)
            if speed is not None:
                carried = [b @ since for b in between]
                path.starts.append(((*carried, kept.after.mT @ since), speed))
                new = flow.total * speed + new
            velocities.append(new)
        push = [b * eta.mT for b in between]
        if delta:
            found = path.answer(x) + errors if flow is None else path.answer(x)
            errors = solve(eye + push[0] * (x @ x.mT), found, lower=True)
        if delta or flow is None:
            path.pushes.append(((*push, kept.after * eta), errors))
    memory = objective.memory.rebuilt([path.end() for path in paths.values()])
    return Walk(memory, tuple(velocities), objective.memory, paths)


def read_along(
    objective: Objective[M],
    queries: Expr,
    *,
    retention: Number = 1.0,
    rate: Number = 1.0,
    delta: bool = False,
    normalize: bool = False,
) -> Expr:
    """Row t: what the memory answers to query t when only the rows s < t have been written.

    The arguments are those of the sequential `write`, and the work is shared with it.
    """
    walked = walk(objective, retention=retention, rate=rate, delta=delta, normalize=normalize)
    return walked.read(queries)


def _record(
    objective: Objective[M],
    retention: Expr,
    rate: Expr,
    solver: str,
    result: tuple[Expr, ...],
    name: str = "",
) -> None:
    levels = _levels.get()
    if levels is None:
        return
    names = [name] if name else []
    for p in () if name else objective.memory.parameters:
        while p.op in ("transpose", "reshape"):
            p = p.args[0]
        names += [str(p["name"])] if p.op == "input" else []
    structure, kind = type(objective.memory).__name__, objective.kind
    pairs = objective.keys, objective.values
    level = Level(structure, ", ".join(names), *pairs, kind, solver, retention, rate, result)
    levels.append(level)
