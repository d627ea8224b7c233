"""deepopt's rules as optax gradient transformations."""

from deepopt import rules
from jax_backend.algebra import lift as lift
from jax_backend.interchange import export_state as export_state
from jax_backend.interchange import import_state as import_state
from jax_backend.metrics import metrics as metrics
from jax_backend.sharding import state_sharding as state_sharding
from jax_backend.step import RuleState as RuleState
from jax_backend.transform import alias as alias
from jax_backend.transform import averaged as averaged
from jax_backend.transform import scale_by_rule as scale_by_rule
from jax_backend.transform import transform as transform

sgd, sign_sgd = alias(rules.SGD, "sgd"), alias(rules.SignSGD, "sign_sgd")
dgd, ggd = alias(rules.DGD, "dgd"), alias(rules.GGD, "ggd")
heavy_ball, nesterov = alias(rules.HeavyBall, "heavy_ball"), alias(rules.Nesterov, "nesterov")
signum = alias(rules.Signum, "signum")
preconditioned_momentum = alias(rules.PreconditionedMomentum, "preconditioned_momentum")
feature_momentum = alias(rules.FeatureMomentum, "feature_momentum")
delta_momentum = alias(rules.DeltaMomentum, "delta_momentum")
deep_momentum = alias(rules.DeepMomentum, "deep_momentum")
adagrad, rmsprop = alias(rules.AdaGrad, "adagrad"), alias(rules.RMSProp, "rmsprop")
adam, adamw = alias(rules.Adam, "adam"), alias(rules.AdamW, "adamw")
nadam, radam = alias(rules.NAdam, "nadam"), alias(rules.RAdam, "radam")
amsgrad = alias(rules.AMSGrad, "amsgrad")
diagonal_memory, lion = alias(rules.DiagonalMemory, "diagonal_memory"), alias(rules.Lion, "lion")
muon, ada_muon = alias(rules.Muon, "muon"), alias(rules.AdaMuon, "ada_muon")
shampoo, soap = alias(rules.Shampoo, "shampoo"), alias(rules.SOAP, "soap")
multi_frequency = alias(rules.MultiFrequency, "multi_frequency")
m3, ademamix = alias(rules.M3, "m3"), alias(rules.AdEMAMix, "ademamix")
nest = alias(rules.Nest, "nest")
