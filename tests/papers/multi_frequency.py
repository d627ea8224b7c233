"""Shampoo whose factors are weighted sums of memories of several frequencies."""

import numpy as np

from . import common, kronecker


def multi_frequency(
    w0,
    gradients,
    *,
    momentum=0.9,
    retention=(0.9, 0.9),
    period=(1, 16),
    weight=(0.5, 0.5),
    weighting="static",
    root=1,
    sides="both",
    floor=1e-6,
    block=1024,
    graft="none",
    beta2=0.99,
    eps=1e-8,
    scale="rms",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories after each step.

    They are momentum_buffer, left_0, right_0, mass_0, left_1, ... (a mass only where the period is
    above 1), left_root and right_root, and exp_avg_sq with Adam's size.
    """
    shape, p = np.shape(w0), {"both": 4, "left": 2, "right": 2}[sides]
    names = kronecker.sides_of(sides)
    levels = list(enumerate(common.columns(retention, period, weight)))

    def rule(w, G, memories, t):
        new = {"momentum_buffer": common.average(memories["momentum_buffer"], G, momentum)}
        grams = {side: kronecker.gram(G, side, block) for side in names}
        total, total_mass = {side: 0.0 * gram for side, gram in grams.items()}, 0.0
        for number, (b, T, a) in levels:
            share = (1 - b) / T
            if T == 1:
                mass = 1 - b**t
                F = {s: common.average(memories[f"{s}_{number}"], grams[s], b) for s in names}
            else:
                mass = memories[f"mass_{number}"] + share
                F = {s: memories[f"{s}_{number}"] + share * grams[s] for s in names}
            for side in names:
                if weighting == "static":
                    total[side] = total[side] + a * F[side] / mass
                elif weighting == "mass":
                    total[side] = total[side] + a * F[side]
                else:
                    raise ValueError(weighting)
            total_mass = total_mass + a * mass
            kept = b if T > 1 and t % T == 0 else 1.0
            new |= {f"{s}_{number}": kept * F[s] for s in names}
            if T > 1:
                new[f"mass_{number}"] = kept * mass
        factors = {}
        for side in names:
            read = total[side] if weighting == "static" else total[side] / total_mass
            factors[side] = memories[f"{side}_root"]
            if t % root == 0:
                factors[side] = kronecker.roots(read, p, floor)
            new[f"{side}_root"] = factors[side]
        u = kronecker.between(factors, new["momentum_buffer"])
        v = None
        if graft == "adam":
            v = new["exp_avg_sq"] = common.average(memories["exp_avg_sq"], G * G, beta2)
        filtered = new["momentum_buffer"] / (1 - momentum**t)
        sized = {"graft": graft, "beta2": beta2, "eps": eps, "scale": scale}
        return kronecker.grafted(u, filtered, v, t, **sized), new

    start = {"momentum_buffer": np.zeros(shape)}
    for side in names:
        start[f"{side}_root"] = kronecker.identity(shape, side, block)
        start |= {f"{side}_{number}": kronecker.zeros(shape, side, block) for number, _ in levels}
    start |= {f"mass_{number}": np.zeros(1) for number, (_, T, _) in levels if T > 1}
    if graft == "adam":
        start["exp_avg_sq"] = np.zeros(shape)
    return common.run(rule, start, w0, gradients, **frame)
