"""Hope a token at a time, in the columns of the paper: Eq. 70 to 74 and 83 to 97."""

import math

import numpy as np

TAPS = 4  # of the short convolution, §8.3

erf = np.vectorize(math.erf)


def unit(x) -> np.ndarray:
    """Of length one, but for the shortest rows."""
    return x / np.maximum(np.sqrt(np.sum(x * x, axis=-1, keepdims=True)), 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0.0, x)


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight) -> np.ndarray:
    """Rows divided by their root mean square."""
    eps = 1e-6
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def convolution(x, taps) -> np.ndarray:
    """Row t is the sum of the rows t - 3 to t, each times its tap; the last tap is for row t."""
    result = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(min(t + 1, TAPS)):
            result[t] += x[t - j] * taps[TAPS - 1 - j]
    return result


def answer(structure, fixed, state, x):
    """state: list of column matrices; fixed: the constant A of "residual" (column matrix)."""
    if structure == "linear":
        return state[0] @ x
    if structure == "residual":
        return fixed @ x + state[0] @ x
    if structure == "mlp":
        return x + state[1] @ np.tanh(state[0] @ x)
    raise ValueError(structure)


def inputs_and_slopes(structure, objective, fixed, state, k, target):
    """Per layer (h, s) with gradient s h^T for the column matrix, at `state`."""
    out = answer(structure, fixed, state, k)
    if objective == "l2":
        delta = out - target
    elif objective == "dot":
        delta = -target
    else:
        raise ValueError(objective)
    if structure == "mlp":
        h = np.tanh(state[0] @ k)
        back = state[1].T @ delta
        return [(k, back * (1.0 - h * h)), (h, delta)]
    return [(k, delta)]


def titans(p, x, config) -> np.ndarray:
    """Self-modifying Titans (Eq. 83 to 90): answers [T, heads, d] to rows x [T, width].

    p: the parameters by name.
    """
    T = x.shape[0]
    width, heads = config.width, config.heads
    d = width // heads
    adaptive = tuple(config.adaptive)
    names = (*adaptive, "memory")
    G = len(names)
    inner = config.inner
    structure = inner.structure

    streams = []
    for name in ("query", "key", "value", "gates"):
        if config.projected:
            has = True
        else:
            has = name != "gates" and name not in adaptive
        if has:
            streams.append(x @ p[f"project.{name}.weight"].T)
        else:
            streams.append(x.copy())
    mixed = convolution(np.concatenate(streams, axis=1), p["convolution.taps"])

    result = np.zeros((T, heads, d))
    for head in range(heads):
        now, start, fixed, velocity, size = {}, {}, {}, {}, {}
        for i, name in enumerate(names):
            first = p["initial.0"][head * G + i].T
            fixed[name] = None
            if structure == "linear":
                now[name] = [first.copy()]
            elif structure == "residual":
                fixed[name] = first.copy()
                now[name] = [np.zeros_like(first)]
            elif structure == "mlp":
                now[name] = [first.copy(), p["initial.1"][head * G + i].T.copy()]
            else:
                raise ValueError(structure)
            velocity[name] = [np.zeros_like(M) for M in now[name]]
            size[name] = config.chunk if name == "memory" else config.slow_chunk

        for t in range(T):
            for name in names:
                if t % size[name] == 0:
                    start[name] = [M.copy() for M in now[name]]

            plain = {}
            for i, name in enumerate(("query", "key", "value", "gates")):
                plain[name] = unit(mixed[t, i * width + head * d : i * width + (head + 1) * d])

            row = {
                "query": plain["query"],
                "key": plain["key"],
                "value": plain["value"],
                "rate": plain["gates"],
                "retention": plain["gates"],
            }
            for name in adaptive:
                row[name] = answer(structure, fixed[name], start[name], row[name])

            q = unit(row["query"])
            k = unit(row["key"])
            v = unit(row["value"]) if config.unit_values else row["value"]

            z = row["rate"] @ p["rate"][head, :, 0] + p["rate_bias"][head, 0, 0]
            eta = config.rate_cap * (1.0 - np.exp(-softplus(z) / config.rate_cap))
            if config.forget > 0:
                z = row["retention"] @ p["retention"][head, :, 0] + p["retention_bias"][head, 0, 0]
                alpha = 1.0 - config.forget * sigmoid(z)
            else:
                alpha = 1.0
            if config.rate_cap > 1:
                eta = eta * (1.0 + alpha) / 2.0
            if inner.momentum:
                theta = sigmoid(
                    plain["gates"] @ p["momentum"][head, :, 0] + p["momentum_bias"][head, 0, 0]
                )
                eta = eta * (1.0 - theta)
            else:
                theta = 0.0

            # read before write
            if structure == "residual":
                result[t, head] = p["share"][head, 0] * (fixed["memory"] @ q) + now["memory"][0] @ q
            else:
                result[t, head] = answer(structure, fixed["memory"], now["memory"], q)

            # write every memory
            for name in names:
                if config.own_values:
                    target = answer(structure, fixed[name], start[name], v)
                    if config.unit_values:
                        target = unit(target)
                else:
                    target = v
                undivided = (inner.objective == "dot" and structure != "mlp") or (
                    inner.delta and not inner.momentum
                )
                step = eta if undivided else eta / size[name]
                layers = inputs_and_slopes(
                    structure, inner.objective, fixed[name], start[name], k, target
                )
                for i, (h, s) in enumerate(layers):
                    r = step / (1.0 + step * (h @ h)) if inner.exact else step
                    S = theta * velocity[name][i] - r * np.outer(s, h)
                    velocity[name][i] = S
                    M = now[name][i]
                    if inner.delta:
                        now[name][i] = M @ (alpha * np.eye(len(h)) - r * np.outer(h, h)) + S
                    else:
                        now[name][i] = alpha * M + S
    return result


def mlp(p, x) -> np.ndarray:
    """One level of a continuum memory, without its residual connection."""
    inner = rms_norm(x, p["norm.weight"]) @ p["up.weight"].T
    return (inner * 0.5 * (1 + erf(inner / math.sqrt(2)))) @ p["down.weight"].T


def chain(levels, x) -> np.ndarray:
    """The levels one after another, the fastest first (Eq. 70)."""
    for p in levels:
        x = x + mlp(p, x)
    return x


def nested_sgd(levels, periods, gradient, steps, lr):
    """Yield (levels, starts) after each step of nested SGD (Eq. 71, 72) on lists of arrays.

    gradient(levels, step): the gradient of each level where the levels are. A level that is
    slower by one learns, at its own clock, what the faster one begins from.
    """
    levels = [[w.copy() for w in level] for level in levels]
    starts = [[w.copy() for w in level] for level in levels[:-1]]
    waiting = [[np.zeros_like(w) for w in level] for level in levels]
    for_start = [[np.zeros_like(w) for w in level] for level in starts]
    for t in range(1, steps + 1):
        for i, found in enumerate(gradient(levels, t)):
            for j, g in enumerate(found):
                waiting[i][j] += g
                if i < len(starts):
                    for_start[i][j] += g
        for i, period in enumerate(periods):
            if t % period == 0:
                for j in range(len(levels[i])):
                    levels[i][j] = levels[i][j] - lr * waiting[i][j]
                    waiting[i][j] = np.zeros_like(waiting[i][j])
        for i, start in enumerate(starts):
            if t % periods[i + 1] == 0:
                for j in range(len(start)):
                    start[j] = start[j] - lr * for_start[i][j]
                    for_start[i][j] = np.zeros_like(for_start[i][j])
                    levels[i][j] = start[j].copy()
        yield levels, starts
