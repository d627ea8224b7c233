"""What Hope is compared with, a token at a time: rotary attention, gated delta rule, Titans."""

import numpy as np

from .hope import answer, convolution, inputs_and_slopes, rms_norm, sigmoid, silu, softplus, unit


def softmax(x) -> np.ndarray:
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def split(p, name, x, heads) -> np.ndarray:
    """Three linear maps of rows, [T, 3, heads, d]."""
    return (x @ p[f"{name}.weight"].T).reshape(len(x), 3, heads, -1)


def rotation(t, d) -> np.ndarray:
    """The matrix of position t (arXiv 2104.09864): channel i turns with channel i + d/2."""
    R = np.zeros((d, d))
    for i in range(d // 2):
        angle = t * 10_000.0 ** (-2 * i / d)
        j = i + d // 2
        R[i, i] = R[j, j] = np.cos(angle)
        R[j, i] = np.sin(angle)
        R[i, j] = -R[j, i]
    return R


def attention(q, keys, values) -> np.ndarray:
    """One query over a list of keys and values."""
    weights = softmax(np.array([q @ k for k in keys]) / np.sqrt(len(q)))
    return sum(w * v for w, v in zip(weights, values, strict=True))


def rotary(p, x, heads) -> np.ndarray:
    """Causal softmax attention with rotary positions, [T, heads, d]."""
    rows = split(p, "project", x, heads)
    outputs = np.zeros_like(rows[:, 0])
    d = rows.shape[-1]
    for h in range(heads):
        keys = [rotation(t, d) @ rows[t, 1, h] for t in range(len(x))]
        for t in range(len(x)):
            q = rotation(t, d) @ rows[t, 0, h]
            outputs[t, h] = attention(q, keys[: t + 1], rows[: t + 1, 2, h])
    return outputs


def convolved(p, x, heads) -> np.ndarray:
    """Causal softmax attention without positions, of rows that went through a convolution."""
    rows = convolution(x @ p["project.weight"].T, p["convolution.taps"])
    rows = rows.reshape(len(x), 3, heads, -1)
    outputs = np.zeros_like(rows[:, 0])
    for h in range(heads):
        for t in range(len(x)):
            outputs[t, h] = attention(rows[t, 0, h], rows[: t + 1, 1, h], rows[: t + 1, 2, h])
    return outputs


def gated_delta(p, x, heads) -> np.ndarray:
    """M <- alpha M (I - beta k kᵀ) + alpha beta v kᵀ from zero, then M q."""
    T, width = x.shape
    d = width // heads
    mixed = convolution(x @ p["project.weight"].T, p["convolution.taps"])
    mixed = silu(mixed)
    result = np.zeros((T, heads, d))
    for head in range(heads):
        M = np.zeros((d, d))
        for t in range(T):
            a = head * d
            q = unit(mixed[t, a : a + d])
            k = unit(mixed[t, width + a : width + a + d])
            v = mixed[t, 2 * width + a : 2 * width + a + d]
            gates = p["gates.weight"] @ x[t] + p["gates.bias"]
            beta = 2.0 * sigmoid(gates[head])
            alpha = np.exp(-softplus(gates[heads + head] + p["decay"][head]))
            M = alpha * (M @ (np.eye(d) - beta * np.outer(k, k)) + beta * np.outer(v, k))
            result[t, head] = M @ q
    return result


def titans_as_context(p, x, heads, size) -> np.ndarray:
    """Titans, memory as context (arXiv 2501.00663, Eq. 21 to 25), [T, heads, d]."""
    T, width = x.shape
    d = width // heads
    mixed = convolution(x @ p["project.weight"].T, p["convolution.taps"])

    now = [[p["initial.0"][head].T.copy(), p["initial.1"][head].T.copy()] for head in range(heads)]
    velocity = [[np.zeros_like(M) for M in now[head]] for head in range(heads)]
    start = [None] * heads
    keys = [None] * heads
    values = [None] * heads

    result = np.zeros((T, heads, d))
    for t in range(T):
        place = t % size
        R = rotation(place, d)
        y = np.zeros(width)
        for head in range(heads):
            if place == 0:
                start[head] = [M.copy() for M in now[head]]
                keys[head] = [row for row in p["persistent"][0, head]]
                values[head] = [row for row in p["persistent"][1, head]]
            a = head * d
            q = mixed[t, a : a + d]
            k = mixed[t, width + a : width + a + d]
            v = mixed[t, 2 * width + a : 2 * width + a + d]
            recalled = answer("mlp", None, start[head], unit(q))
            keys[head].append(R @ recalled)
            values[head].append(recalled)
            keys[head].append(R @ k)
            values[head].append(v)
            y[a : a + d] = attention(R @ q, keys[head], values[head])

        learnt = p["learn.weight"] @ y
        gates = sigmoid(p["gates.weight"] @ y + p["gates.bias"])
        for head in range(heads):
            a = head * d
            query = unit(learnt[a : a + d])
            key = unit(learnt[width + a : width + a + d])
            value = unit(learnt[2 * width + a : 2 * width + a + d])
            eta, f, theta = gates[head], gates[heads + head], gates[2 * heads + head]
            eta = eta / size * (1.0 - theta)
            for i, (h, s) in enumerate(
                inputs_and_slopes("mlp", "l2", None, start[head], key, value)
            ):
                r = eta / (1.0 + eta * (h @ h))
                velocity[head][i] = theta * velocity[head][i] - r * np.outer(s, h)
                now[head][i] = (1.0 - 0.1 * f) * now[head][i] + velocity[head][i]
            result[t, head] = y[a : a + d] * answer("mlp", None, now[head], query)
    return result


def swiglu(p, x) -> np.ndarray:
    """x + W (silu(U x) * V x) of the normalised rows (arXiv 2002.05202)."""
    gate, value = np.split(rms_norm(x, p["norm.weight"]) @ p["up.weight"].T, 2, axis=1)
    return x + (silu(gate) * value) @ p["down.weight"].T
