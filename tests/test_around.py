"""Functions around rules: what they return is a rule like any other, and what they refuse."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import stream
from torch import nn

from deepopt import Oracle, around, rules
from torch_backend import Optimizer, averaged, bind

ONCE = {
    "cautious": lambda r: around.cautious(r),
    "centralized": lambda r: around.centralized(r, "last"),
    "clipped": lambda r: around.clipped(r, 0.3),
    "clipped_globally": lambda r: around.clipped_globally(r, 0.3),
    "averaged": lambda r: around.averaged(r, 0.8),
    "schedule_free": lambda r: around.schedule_free(r, 0.8),
    "restarted": lambda r: around.restarted(r, 32),
    "nonlinear": lambda r: around.nonlinear(r, "sign"),
    "orthogonalized": lambda r: around.nonlinear(r, "newton_schulz"),
}


@pytest.mark.parametrize("name", ONCE)
def test_a_class_and_an_instance_are_of_one_kind(name):
    cls, rule = ONCE[name](rules.M3), ONCE[name](rules.M3(lr=0.02, period=4))
    assert issubclass(cls, rules.M3) and isinstance(rule, rules.M3)
    assert (rule.lr, rule.period) == (0.02, 4)
    assert ONCE[name](rules.M3) is cls
    for x in (cls, rule, cls()):
        assert pickle.loads(pickle.dumps(x)) == copy.deepcopy(x) == x


def test_defaults_given_to_a_class_are_its_own():
    half = around.clipped(rules.SGD, 0.5)
    assert half().max_norm == 0.5 and half(max_norm=2.0).max_norm == 2.0
    assert issubclass(half, around.clipped(rules.SGD))
    assert around.clipped(rules.SGD(lr=1.0)) == around.clipped(rules.SGD)(lr=1.0)


def test_they_compose_and_step_in_torch_as_in_the_oracle():
    rule = around.averaged(around.clipped_globally(around.cautious(rules.AdamW(lr=0.05)), 0.5))
    w, g = stream((4, 3), 12)
    oracle, p = Oracle(rule, [w]), nn.Parameter(torch.tensor(w))
    optimizer = Optimizer([p], rule)
    for step in g:
        (w,) = oracle.step([w], [step])
        p.grad = torch.tensor(step)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), w, atol=1e-13)
    with averaged(optimizer):
        offset = oracle.state[0]["average_offset"]
        np.testing.assert_allclose(p.detach().numpy(), w + offset, atol=1e-13)
    np.testing.assert_allclose(p.detach().numpy(), w, atol=1e-13)


def test_an_optimizer_of_a_wrapped_rule_survives_a_checkpoint_and_a_pickle():
    make = bind(around.schedule_free(rules.SGD))
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = make([p], lr=0.1, free_beta=0.5)
    p.grad = torch.ones(3, 2)
    optimizer.step()
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.param_groups[0]["rule"] == "ScheduleFreeSGD"
    fresh = make([nn.Parameter(torch.ones(3, 2))], lr=0.2)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.1
    other = Optimizer([nn.Parameter(torch.ones(3, 2))], rules.SGD())
    with pytest.raises(ValueError, match=r"'ScheduleFreeSGD'.*'SGD'"):
        other.load_state_dict(optimizer.state_dict())


def test_clipping_leaves_tiny_gradients_alone():
    p = nn.Parameter(torch.zeros(2))
    optimizer = Optimizer([p], around.clipped(rules.SignSGD(lr=1.0)))
    p.grad = torch.tensor([1e-30, -1e-30])
    optimizer.step()
    assert p.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: around.clipped(around.clipped(rules.SGD)), ValueError, "'max_norm' already"),
        (lambda: around.averaged(around.averaged(rules.SGD())), ValueError, "only once"),
        (lambda: around.cautious(around.clipped(around.cautious(rules.SGD))), ValueError, "once"),
        (lambda: around.clipped(rules.SGD, -1.0), ValueError, r"max_norm=-1.0\) must be"),
        (lambda: around.clipped(rules.SGD(), [1.0]), ValueError, r"max_norm=\[1.0\]\) must be"),
        (lambda: around.nonlinear(rules.SGD, "ns"), ValueError, "output='ns'.*newton_schulz"),
        (lambda: around.restarted(rules.M3(), 100), ValueError, "such as 112"),
        (lambda: around.restarted(rules.M3(stagger=True)), ValueError, "stagger=False"),
        (lambda: around.clipped_globally(rules.SGD(every=2)), ValueError, "every=2"),
        (lambda: around.cautious(3), TypeError, "takes a rule or a class of rules, not 3"),
    ],
)
def test_what_cannot_be_is_refused_at_once(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("outer", [around.cautious, lambda r: around.nonlinear(r, "sign")])
@pytest.mark.parametrize("inner", [rules.GGD(objective="dot"), around.schedule_free(rules.SGD())])
def test_what_goes_by_the_direction_belongs_inside_of_a_move(outer, inner):
    w = [np.ones((3, 3))]
    oracle = Oracle(outer(inner), w)
    with pytest.raises(ValueError, match="inside of schedule_free"):
        oracle.step(w, w)
    assert oracle.count == 0


def test_iterates_are_not_restarted():
    w = [np.ones(3)]
    with pytest.raises(ValueError, match="put schedule_free outside"):
        Oracle(around.restarted(around.schedule_free(rules.SGD()), 3), w).step(w, w)
    Oracle(around.schedule_free(around.restarted(rules.SGD(), 3)), w).step(w, w)


def test_two_averages_cannot_be_kept():
    with pytest.raises(ValueError, match=r"\['average_offset'\]"):
        Oracle(around.averaged(around.schedule_free(rules.SGD())), [np.ones(3)])


def test_an_average_is_not_restarted():
    rule = around.restarted(around.averaged(rules.HeavyBall(lr=0.1), 0.5), 3)
    w, average = np.zeros(4), np.zeros(4)
    oracle = Oracle(rule, [w])
    for _ in range(7):
        (w,) = oracle.step([w], [np.ones(4)])
        average = 0.5 * average + 0.5 * w
        np.testing.assert_allclose(w + oracle.state[0]["average_offset"], average, atol=1e-14)


def test_nothing_is_lost_inside_of_averages():
    p = nn.Parameter(torch.ones(3))
    optimizer = Optimizer([p], around.averaged(rules.SGD(lr=0.1), 0.5))
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    with averaged(optimizer):
        with pytest.raises(RuntimeError, match="leave the block first"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="leave the block first"):
            optimizer.state_dict()
        with pytest.raises(RuntimeError, match="averages already"), averaged(optimizer):
            pass
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1
    optimizer.step()
    assert optimizer.state[p]["step"] == 2
