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


# A memory is a list of matrices: [W], or [W2, W1] of m(x) = x + W1 tanh(W2 x).


def answer(memory, x) -> np.ndarray:
    """What a memory says to one key (Eq. 89)."""
    if len(memory) == 1:
        return memory[0] @ x
    lower, upper = memory
    return x + upper @ np.tanh(lower @ x)


def gradients(memory, k, v, objective) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each layer the factors (slope, input) of the gradient slope inputᵀ (Eq. 92, 93)."""
    error = {"l2": answer(memory, k) - v, "dot": -v}[objective]
    if len(memory) == 1:
        return [(error, k)]
    lower, upper = memory
    z = np.tanh(lower @ k)
    return [((upper.T @ error) * (1 - z * z), k), (error, z)]


def step(
    now, speed, start, k, v, alpha, eta, theta=0.0, *, objective="l2", delta=True, exact=True
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One token: S <- theta S - eta G, M <- M (alpha I - eta x xᵀ) + S, the gradient G at `start`.

    Theta is 0 without momentum, which makes it Eq. 88 and 90.
    """
    new, speeds = [], []
    for w, s, (slope, x) in zip(now, speed, gradients(start, k, v, objective), strict=True):
        rate = eta / (1 + eta * x @ x) if exact else eta
        s = theta * s - rate * np.outer(slope, x)
        erased = rate * np.outer(x, x) if delta else 0.0
        new.append(w @ (alpha * np.eye(len(x)) - erased) + s)
        speeds.append(s)
    return new, speeds


def titans(p, x, config) -> np.ndarray:
    """Self-modifying Titans (Eq. 83 to 90): answers [T, heads, d] to rows x [T, width].

    p: the parameters by name. A memory of `config.adaptive` is written as if it had its own copy
    of everything; `chunk` and `slow_chunk` say how old the states are at which gradients, targets
    and what is generated are taken.
    """
    rule, names = config.inner, (*config.adaptive, "memory")
    heads, d = config.heads, config.width // config.heads
    how = {"objective": rule.objective, "delta": rule.delta, "exact": rule.exact}
    streams = []
    for name in ("query", "key", "value", "gates"):
        plain = not config.projected and (name == "gates" or name in config.adaptive)
        streams.append(x if plain else x @ p[f"project.{name}.weight"].T)
    mixed = convolution(np.concatenate(streams, 1), p["convolution.taps"])
    rows = unit(mixed.reshape(len(x), 4, heads, d))
    initial = [p[f"initial.{i}"] for i in range(2 if rule.structure == "mlp" else 1)]
    outputs = np.zeros((len(x), heads, d))
    for h in range(heads):
        now = {name: [w[h * len(names) + i].T for w in initial] for i, name in enumerate(names)}
        speed = {name: [np.zeros_like(w) for w in memory] for name, memory in now.items()}
        start = dict(now)
        # What is neither erased nor forgotten: all that a residual memory starts from.
        stays = {
            name: [w if rule.structure == "residual" else np.zeros_like(w) for w in memory]
            for name, memory in now.items()
        }

        def scalar(name, row, h=h):
            return row @ p[name][h, :, 0] + p[f"{name}_bias"][h, 0, 0]

        for t in range(len(x)):
            for name in names:
                if t % (config.chunk if name == "memory" else config.slow_chunk) == 0:
                    start[name] = now[name]
            made = dict(zip(("query", "key", "value"), rows[t, :3, h], strict=True))
            made |= {"rate": rows[t, 3, h], "retention": rows[t, 3, h]}
            made |= {name: answer(start[name], made[name]) for name in config.adaptive}
            q, k = unit(made["query"]), unit(made["key"])
            v = unit(made["value"]) if config.unit_values else made["value"]
            cap = config.rate_cap
            eta = cap * (1 - np.exp(-softplus(scalar("rate", made["rate"])) / cap))
            alpha, theta = 1.0, 0.0
            if config.forget:
                alpha = 1 - config.forget * sigmoid(scalar("retention", made["retention"]))
            if cap > 1:
                eta *= (1 + alpha) / 2
            if rule.momentum:
                theta = sigmoid(scalar("momentum", rows[t, 3, h]))
                eta *= 1 - theta
            outputs[t, h] = answer(now["memory"], q)
            if rule.structure == "residual":
                outputs[t, h] -= (1 - p["share"][h, 0]) * (stays["memory"][0] @ q)
            for name in names:
                target = v
                if config.own_values:
                    target = answer(start[name], v)
                    target = unit(target) if config.unit_values else target
                size = config.chunk if name == "memory" else config.slow_chunk
                linear_dot = rule.structure != "mlp" and rule.objective == "dot"
                alone = linear_dot or (rule.delta and not rule.momentum)
                rate = eta if alone else eta / size
                learnt = [w - a for w, a in zip(now[name], stays[name], strict=True)]
                learnt, speed[name] = step(
                    learnt, speed[name], start[name], k, target, alpha, rate, theta, **how
                )
                now[name] = [w + a for w, a in zip(learnt, stays[name], strict=True)]
    return outputs


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
