"""What goes around a rule, each thing written out around plain SGD and around AdamW."""

import numpy as np

from . import common


def inner_rule(inner, w0, betas, eps) -> tuple[common.Rule, common.Memories]:
    """The rule and the start memories of "sgd" or of "adamw"."""
    b1, b2 = betas

    def sgd(w, G, memories, t):
        return G, {}

    def adamw(w, G, memories, t):
        m = common.average(memories["exp_avg"], G, b1)
        v = common.average(memories["exp_avg_sq"], G * G, b2)
        d = common.divide(m / (1 - b1**t), np.sqrt(v / (1 - b2**t)) + eps)
        return d, {"exp_avg": m, "exp_avg_sq": v}

    if inner == "sgd":
        return sgd, {}
    if inner == "adamw":
        return adamw, {"exp_avg": np.zeros(np.shape(w0)), "exp_avg_sq": np.zeros(np.shape(w0))}
    raise ValueError(inner)


def cautious(w0, gradients, *, inner, betas=(0.9, 0.999), eps=1e-8, **frame) -> common.Trajectory:
    """Drop the entries of d whose sign is not that of g, and rescale the others to make up."""
    within, start = inner_rule(inner, w0, betas, eps)

    def rule(w, G, memories, t):
        d, memories = within(w, G, memories, t)
        mask = (d * G > 0).astype(np.float64)
        return d * mask / max(np.mean(mask), 1e-3), memories

    return common.run(rule, start, w0, gradients, **frame)


def centralized(
    w0, gradients, *, inner, betas=(0.9, 0.999), eps=1e-8, **frame
) -> common.Trajectory:
    """Take the mean over all axes but the first off the gradient, if there are such axes."""
    within, start = inner_rule(inner, w0, betas, eps)

    def prepare(G):
        return G - G.mean(axis=tuple(range(1, G.ndim)), keepdims=True) if G.ndim > 1 else G

    return common.run(within, start, w0, gradients, prepare=prepare, **frame)


def clipped(
    w0, gradients, *, inner, max_norm=1.0, betas=(0.9, 0.999), eps=1e-8, **frame
) -> common.Trajectory:
    """Shorten the gradient of the tensor to the norm `max_norm`."""
    within, start = inner_rule(inner, w0, betas, eps)

    def prepare(G):
        norm = common.frob(G)
        return G * (max_norm / norm if norm > max_norm else 1.0)

    return common.run(within, start, w0, gradients, prepare=prepare, **frame)


def clipped_globally(w0s, gradients, *, inner, **arguments) -> list[common.Trajectory]:
    """Shorten the gradients of all tensors together: the tensors, end to end, are one vector.

    The arguments are one start and one list of gradients a tensor, and so are the trajectories.
    """
    shapes = [np.shape(w0) for w0 in w0s]
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1]

    def joined(tensors):
        return np.concatenate([np.ravel(x) for x in tensors])

    def parts(vector):
        return [x.reshape(s) for x, s in zip(np.split(vector, ends), shapes, strict=True)]

    together = [joined(step) for step in zip(*gradients, strict=True)]
    parameters, history = clipped(joined(w0s), together, inner=inner, **arguments)
    parameters = [parts(w) for w in parameters]
    history = [{name: parts(x) for name, x in memories.items()} for memories in history]
    return [
        ([w[i] for w in parameters], [{name: x[i] for name, x in m.items()} for m in history])
        for i in range(len(shapes))
    ]


def averaged(
    w0,
    gradients,
    *,
    inner,
    average_retention=0.999,
    every=1,
    betas=(0.9, 0.999),
    eps=1e-8,
    **frame,
) -> common.Trajectory:
    """Keep the moving average of the weights, as its difference average_offset from them."""
    within, start = inner_rule(inner, w0, betas, eps)
    parameters, history = common.run(within, start, w0, gradients, every=every, **frame)
    a = np.array(w0, dtype=np.float64)
    for t, (w, memories) in enumerate(zip(parameters, history, strict=True), start=1):
        if t % every == 0:
            a = common.average(a, w, average_retention)
        memories["average_offset"] = a - w
    return parameters, history


def schedule_free(
    w0,
    gradients,
    *,
    inner,
    lr,
    weight_decay=0.0,
    decoupled=True,
    beta=0.9,
    betas=(0.9, 0.999),
    eps=1e-8,
    **frame,
) -> common.Trajectory:
    """Step z at the gradients of y, between z and the average x; lr may be one number an update."""
    within, start = inner_rule(inner, w0, betas, eps)
    rates = np.broadcast_to(np.asarray(lr, dtype=np.float64), len(gradients))
    z = x = np.array(w0, dtype=np.float64)

    def rule(y, G, memories, t):
        nonlocal z, x
        rate, total = rates[t - 1], np.sum(rates[:t] ** 2)
        d, memories = within(y, G, memories, t)
        z = z - rate * (d + (weight_decay * y if decoupled else 0.0))
        c = rate**2 / total if total > 0 else 0.0
        x = (1 - c) * x + c * z
        new = (1 - beta) * z + beta * x
        return np.zeros_like(y), {**memories, "average_offset": x - new}, new - y

    return common.run(
        rule,
        {**start, "average_offset": np.zeros(np.shape(w0))},
        w0,
        gradients,
        lr=0.0,
        weight_decay=weight_decay,
        decoupled=decoupled,
        **frame,
    )


def restarted(
    w0, gradients, *, inner, restart_period, betas=(0.9, 0.999), eps=1e-8, **frame
) -> common.Trajectory:
    """Put the memories and the clock back to the start after every `restart_period`-th update."""
    within, start = inner_rule(inner, w0, betas, eps)

    def rule(w, G, memories, t):
        since = (t - 1) % restart_period + 1
        d, memories = within(w, G, memories, since)
        return d, start if since == restart_period else memories

    return common.run(rule, start, w0, gradients, **frame)


def nonlinear(
    w0,
    gradients,
    *,
    inner,
    output,
    steps=5,
    coefficients="quintic",
    betas=(0.9, 0.999),
    eps=1e-8,
    **frame,
) -> common.Trajectory:
    """Read the direction of the rule out through a nonlinear map (Eq. 52)."""
    within, start = inner_rule(inner, w0, betas, eps)

    def rule(w, G, memories, t):
        d, memories = within(w, G, memories, t)
        return common.readout(d, output, "none", steps, coefficients), memories

    return common.run(rule, start, w0, gradients, **frame)
