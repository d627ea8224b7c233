"""The common frame of every rule, and the helpers that several rules share."""

from collections.abc import Callable, Iterable

import numpy as np

Memories = dict[str, np.ndarray]
Trajectory = tuple[list[np.ndarray], list[Memories]]
Step = tuple[np.ndarray, Memories] | tuple[np.ndarray, Memories, np.ndarray]
Rule = Callable[[np.ndarray, np.ndarray, Memories, int], Step]

POLYNOMIALS = {"quintic": (3.4445, -4.7750, 2.0315), "cubic": (1.5, -0.5, 0.0)}

# The list that the authors of Polar Express publish, for singular values from 1e-3 on; the last
# polynomial repeats. All are to be taken at x / 1.05.
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def run(
    rule: Rule,
    memories: Memories,
    w0,
    gradients: Iterable,
    *,
    lr: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    every: int = 1,
    stagger: bool = False,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda total: total,
) -> Trajectory:
    """Apply w <- w + shift - lr * (d + weight_decay * w) on every `every`-th step.

    The gradients in between are summed, and prepared before any decay joins them; a rule returns
    d, its memories and, if any, the shift.
    A context is for the rule itself to look up by its step t, and `stagger` has no effect.
    """
    w = np.array(w0, dtype=np.float64)
    total = np.zeros_like(w)
    parameters, history = [], []
    for t, g in enumerate(gradients, start=1):
        total = total + np.asarray(g, dtype=np.float64)
        if t % every == 0:
            G = prepare(total) + (0.0 if decoupled else weight_decay * w)
            d, memories, *shift = rule(w, G, memories, t // every)
            w = (
                w
                + (shift[0] if shift else 0.0)
                - lr * (d + (weight_decay * w if decoupled else 0.0))
            )
            total = np.zeros_like(w)
        parameters.append(w.copy())
        history.append({name: memory.copy() for name, memory in memories.items()})
    return parameters, history


def divide(x: np.ndarray, by) -> np.ndarray:
    """x / by, with an exact 0 wherever the divisor is an exact 0."""
    by = np.broadcast_to(np.asarray(by, dtype=np.float64), x.shape)
    return np.divide(x, by, out=np.zeros(x.shape), where=by != 0)


def average(memory: np.ndarray, x: np.ndarray, retention: float) -> np.ndarray:
    """The exponential moving average, retention * memory + (1 - retention) * x."""
    return retention * memory + (1 - retention) * x


def columns(*settings: tuple) -> list[tuple]:
    """The settings of each level, a setting of one entry holding for all levels."""
    count = max(map(len, settings))
    return list(zip(*(s * count if len(s) == 1 else s for s in map(tuple, settings)), strict=True))


def rms(x: np.ndarray) -> float:
    """Root of the mean square over all entries."""
    return float(np.sqrt(np.mean(x * x)))


def frob(x: np.ndarray) -> float:
    """Frobenius norm."""
    return float(np.sqrt(np.sum(x * x)))


def newton_schulz(x: np.ndarray, coefficients: str = "quintic", steps: int = 5) -> np.ndarray:
    """Iterate X <- aX + (bA + cAA)X with A = XX^T from x / frob(x), on the wide orientation."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, coefficients, steps).T
    X = divide(x, frob(x))
    for t in range(steps):
        if coefficients == "polar_express":
            a, b, c = POLAR_EXPRESS[min(t, 7)]
            a, b, c = a / 1.05, b / 1.05**3, c / 1.05**5
        else:
            a, b, c = POLYNOMIALS[coefficients]
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def scale(x: np.ndarray, how: str, orthogonal: bool, cap: float = 10.0) -> np.ndarray:
    """The step-size convention: "none", "spectral" or "rms"."""
    if how == "none":
        return x
    if how == "spectral":
        r, c = x.shape
        return np.sqrt(max(1.0, r / c)) * x
    if how == "rms":
        if orthogonal:
            return 0.2 * np.sqrt(max(x.shape)) * x
        return np.clip(0.2 * divide(x, rms(x)), -cap, cap)
    raise ValueError(how)


def readout(
    x: np.ndarray, output: str, how: str, steps: int = 5, coefficients: str = "quintic"
) -> np.ndarray:
    """The output map "identity", "sign", "rms" or "newton_schulz", and then the scale `how`."""
    if output == "newton_schulz":
        return scale(newton_schulz(x, coefficients, steps), how, orthogonal=True)
    mapped = {"identity": x, "sign": np.sign(x), "rms": divide(x, rms(x))}[output]
    return scale(mapped, how, orthogonal=False)
