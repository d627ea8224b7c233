"""The element-wise relatives of Adam: AdaGrad, RMSProp, NAdam, RAdam and AMSGrad."""

import numpy as np

from . import common


def zeros(w0, *names) -> common.Memories:
    """Memories of the parameter's shape at the start."""
    return {name: np.zeros(np.shape(w0)) for name in names}


def adagrad(w0, gradients, *, eps=1e-10, initial=0.0, **frame) -> common.Trajectory:
    """Return the parameters and the memories (sum_sq) after each step."""

    def rule(w, G, memories, t):
        total = memories["sum_sq"] + G * G
        return common.divide(G, np.sqrt(total + initial) + eps), {"sum_sq": total}

    return common.run(rule, zeros(w0, "sum_sq"), w0, gradients, **frame)


def rmsprop(w0, gradients, *, beta2=0.99, eps=1e-8, centered=False, **frame) -> common.Trajectory:
    """Return the parameters and the memories (exp_avg_sq; centered also exp_avg) of each step."""

    def rule(w, G, memories, t):
        v = common.average(memories["exp_avg_sq"], G * G, beta2)
        if not centered:
            return common.divide(G, np.sqrt(v) + eps), {"exp_avg_sq": v}
        a = common.average(memories["exp_avg"], G, beta2)
        d = common.divide(G, np.sqrt(np.maximum(v - a * a, 0)) + eps)
        return d, {"exp_avg_sq": v, "exp_avg": a}

    start = zeros(w0, "exp_avg_sq", "exp_avg") if centered else zeros(w0, "exp_avg_sq")
    return common.run(rule, start, w0, gradients, **frame)


def nadam(
    w0,
    gradients,
    *,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum_decay=0.004,
    schedule="dozat",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories (exp_avg, exp_avg_sq; dozat also mu_product)."""
    b1, b2 = betas

    def mu(t):
        return {"dozat": b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)), "constant": b1}[schedule]

    def rule(w, G, memories, t):
        m = common.average(memories["exp_avg"], G, b1)
        v = common.average(memories["exp_avg_sq"], G * G, b2)
        new = {"exp_avg": m, "exp_avg_sq": v}
        product = b1**t
        if schedule == "dozat":
            new["mu_product"] = memories["mu_product"] * mu(t)
            product = new["mu_product"]
        u = (1 - mu(t)) * G / (1 - product) + mu(t + 1) * m / (1 - product * mu(t + 1))
        return common.divide(u, np.sqrt(v / (1 - b2**t)) + eps), new

    start = zeros(w0, "exp_avg", "exp_avg_sq")
    if schedule == "dozat":
        start["mu_product"] = np.ones(1)
    return common.run(rule, start, w0, gradients, **frame)


def radam(w0, gradients, *, betas=(0.9, 0.999), eps=1e-8, **frame) -> common.Trajectory:
    """Return the parameters and the memories (exp_avg, exp_avg_sq) after each step."""
    b1, b2 = betas
    limit = 2 / (1 - b2) - 1

    def rule(w, G, memories, t):
        m = common.average(memories["exp_avg"], G, b1)
        v = common.average(memories["exp_avg_sq"], G * G, b2)
        d = m / (1 - b1**t)
        rho = limit - 2 * t * b2**t / (1 - b2**t)
        if rho > 5:
            top, bottom = (rho - 4) * (rho - 2) * limit, (limit - 4) * (limit - 2) * rho
            d = np.sqrt(top / bottom) * common.divide(d, np.sqrt(v / (1 - b2**t)) + eps)
        return d, {"exp_avg": m, "exp_avg_sq": v}

    return common.run(rule, zeros(w0, "exp_avg", "exp_avg_sq"), w0, gradients, **frame)


def amsgrad(
    w0, gradients, *, betas=(0.9, 0.999), eps=1e-8, corrected=False, **frame
) -> common.Trajectory:
    """Return the parameters and the memories (exp_avg, exp_avg_sq, max_exp_avg_sq) of each step."""
    b1, b2 = betas

    def rule(w, G, memories, t):
        m = common.average(memories["exp_avg"], G, b1)
        v = common.average(memories["exp_avg_sq"], G * G, b2)
        correction = 1 - b2**t
        top = np.maximum(memories["max_exp_avg_sq"], v / correction if corrected else v)
        root = np.sqrt(top) if corrected else np.sqrt(top) / np.sqrt(correction)
        d = common.divide(m / (1 - b1**t), root + eps)
        return d, {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": top}

    start = zeros(w0, "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return common.run(rule, start, w0, gradients, **frame)
