"""What Hope is compared with, a token at a time: rotary attention, gated delta rule, Titans."""

import numpy as np

from .hope import answer, convolution, rms_norm, sigmoid, silu, softplus, step, unit


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
    rows = silu(convolution(x @ p["project.weight"].T, p["convolution.taps"]))
    rows = rows.reshape(len(x), 3, heads, -1)
    gates = (x @ p["gates.weight"].T + p["gates.bias"]).reshape(len(x), 2, heads)
    outputs = np.zeros_like(rows[:, 0])
    d = rows.shape[-1]
    for h in range(heads):
        M = np.zeros((d, d))
        for t in range(len(x)):
            q, k, v = unit(rows[t, 0, h]), unit(rows[t, 1, h]), rows[t, 2, h]
            beta = 2 * sigmoid(gates[t, 0, h])
            alpha = np.exp(-softplus(gates[t, 1, h] + p["decay"][h]))
            M = alpha * (M @ (np.eye(d) - beta * np.outer(k, k)) + beta * np.outer(v, k))
            outputs[t, h] = M @ q
    return outputs


def titans_as_context(p, x, heads, size) -> np.ndarray:
    """Titans, memory as context (arXiv 2501.00663, Eq. 21 to 25), [T, heads, d].

    Persistent rows, what the memory of the segments before recalls, and the segment itself are
    attended to; the memory learns the outputs by S <- theta S - eta G, M <- alpha M + S.
    """
    rows = convolution(x @ p["project.weight"].T, p["convolution.taps"])
    rows = rows.reshape(len(x), 3, heads, -1)
    outputs = np.zeros_like(rows[:, 0])
    y = np.zeros_like(outputs)
    d = rows.shape[-1]
    memories = [[p["initial.0"][h].T, p["initial.1"][h].T] for h in range(heads)]
    speeds = [[np.zeros_like(w) for w in memory] for memory in memories]
    for begin in range(0, len(x), size):
        starts = list(memories)
        keys = [list(p["persistent"][0, h]) for h in range(heads)]
        values = [list(p["persistent"][1, h]) for h in range(heads)]
        for t in range(begin, min(begin + size, len(x))):
            R = rotation(t - begin, d)
            for h in range(heads):
                q, k, v = rows[t, :, h]
                recalled = answer(starts[h], unit(q))
                keys[h] += [R @ recalled, R @ k]
                values[h] += [recalled, v]
                y[t, h] = attention(R @ q, keys[h], values[h])
            learnt = split(p, "learn", y[t].reshape(1, -1), heads)[0]
            gates = p["gates.weight"] @ y[t].reshape(-1) + p["gates.bias"]
            eta, forget, theta = sigmoid(gates).reshape(3, heads)
            for h in range(heads):
                query, key, value = unit(learnt[:, h])
                memories[h], speeds[h] = step(
                    *(memories[h], speeds[h], starts[h], key, value),
                    *(1 - 0.1 * forget[h], eta[h] * (1 - theta[h]) / size, theta[h]),
                    delta=False,
                )
                outputs[t, h] = y[t, h] * answer(memories[h], query)
    return outputs


def swiglu(p, x) -> np.ndarray:
    """x + W (silu(U x) * V x) of the normalised rows (arXiv 2002.05202)."""
    gate, value = np.split(rms_norm(x, p["norm.weight"]) @ p["up.weight"].T, 2, axis=1)
    return x + (silu(gate) * value) @ p["down.weight"].T
