"""Multi-scale momentum Muon, M3 (Algorithm 1 and Eq. 75), with any number of slow levels."""

import numpy as np

from . import common


def m3(
    w0,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    decoupled=True,
    every=1,
    momentum=0.95,
    slow=(0.9,),
    period=(16,),
    weight=(0.1,),
    beta2=0.95,
    floor=0.1,
    eps=0.0,
    nesterov=True,
    accumulate="ema",
    second_moment="gradient",
    literal=False,
    stagger=False,
    index=0,
    coefficients="quintic",
    steps=5,
    scale="rms",
    cap=10.0,
) -> common.Trajectory:
    """Return the parameters and the memories (fast, slow_1, readout_1, ..., second_moment)."""
    if literal:
        accumulate, second_moment, nesterov, floor, scale = "sum", "gradient", False, 0.0, "none"
        eps = eps if eps != 0 else 1e-8
    count = max(len(slow), len(period), len(weight))
    columns = [tuple(x) * count if len(x) == 1 else tuple(x) for x in (slow, period, weight)]
    levels = list(zip(range(1, count + 1), *columns, strict=True))

    def gathered(memory, retention, x):
        """One entry of the fast memory or of the second moment."""
        if accumulate == "sum":
            return memory + retention * x
        return {"ema": retention * memory + (1 - retention) * x}[accumulate]

    def rule(w, G, memories, t):
        new = dict(memories)
        new["fast"] = gathered(memories["fast"], momentum, G)
        u = gathered(new["fast"], momentum, G) if nesterov else new["fast"]
        U = common.newton_schulz(u, coefficients, steps)
        for number, b, f, a in levels:
            U = U + a * memories[f"readout_{number}"]
            S = memories[f"slow_{number}"] + (b if accumulate == "sum" else 1 - b) * G
            if (t + (index % f if stagger else 0)) % f == 0:  # read from the next step on
                new[f"readout_{number}"] = common.newton_schulz(S, coefficients, steps)
                S = S if accumulate == "sum" else b * S
            new[f"slow_{number}"] = S
        if second_moment == "none":
            return common.scale(U, scale, orthogonal=True), new
        q = {"gradient": G, "update": U}[second_moment]
        V = gathered(memories["second_moment"], beta2, q * q)
        new["second_moment"] = V
        V_hat = V if accumulate == "sum" else V / (1 - beta2**t)
        D = np.maximum(np.sqrt(V_hat), floor * np.sqrt(np.mean(V_hat))) + eps
        # ours: where D is small, single entries spike
        return common.scale(common.divide(U, D), scale, orthogonal=False, cap=cap), new

    names = ["fast", *(f"{kind}_{n}" for n, *_ in levels for kind in ("slow", "readout"))]
    names += [] if second_moment == "none" else ["second_moment"]
    return common.run(
        rule,
        {name: np.zeros(np.shape(w0)) for name in names},
        w0,
        gradients,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled,
        every=every,
    )
