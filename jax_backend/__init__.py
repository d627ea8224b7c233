"""deepopt's rules as optax gradient transformations."""

from deepopt import rules
from jax_backend.step import RuleState as RuleState
from jax_backend.transform import alias as alias
from jax_backend.transform import scale_by_rule as scale_by_rule
from jax_backend.transform import transform as transform

sgd = alias(rules.SGD, "sgd")
heavy_ball = alias(rules.HeavyBall, "heavy_ball")
delta_momentum = alias(rules.DeltaMomentum, "delta_momentum")
deep_momentum = alias(rules.DeepMomentum, "deep_momentum")
adamw = alias(rules.AdamW, "adamw")
lion = alias(rules.Lion, "lion")
muon = alias(rules.Muon, "muon")
m3 = alias(rules.M3, "m3")
