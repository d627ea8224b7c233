"""Plans: how many stages each rule takes, and what is in a kernel."""

import re

import pytest

from deepopt import Memories, Rule, Slot, Time, Update, rules
from deepopt.__main__ import main
from deepopt.algebra import Program
from deepopt.expr import Expr, sum_
from deepopt.functions import named
from deepopt.kernels.c import C
from deepopt.kernels.plan import Plan, plan
from deepopt.kernels.show import kernels

ALL = frozenset({"every"})
# (kernels, matrix functions and products) of an ordinary step, and where all clocks tick.
ELEMENTWISE = ((1, 0), (1, 0))
STAGES = {
    "DGD": ((4, 2), (4, 2)),
    "GGD": ((4, 2), (4, 2)),
    "DeltaMomentum": ((4, 3), (4, 3)),
    "DeepMomentum": ((10, 8), (10, 8)),
    "Muon": ((2, 1), (2, 1)),
    "AdaMuon": ((2, 1), (2, 1)),
    "Shampoo": ((6, 4), (9, 10)),
    "SOAP": ((7, 8), (14, 16)),
    "MultiFrequency": ((6, 4), (9, 10)),
    "M3": ((2, 1), (2, 2)),
    "Nest": ((2, 1), (2, 2)),
}


def counts(found: Plan) -> tuple[int, int]:
    work = [x.op for f in found.functions for x in f.nodes if x.op in ("call", "matmul")]
    return len(found.regions), len(work)


@pytest.mark.parametrize("cls", rules.ALL, ids=lambda cls: cls.__name__)
def test_the_number_of_stages_of_every_rule(cls):
    rule = cls()
    ordinary = plan(rule, (64, 48), ALL)
    ticking = plan(rule, (64, 48), ALL | frozenset(rule.clocks()))
    assert (counts(ordinary), counts(ticking)) == STAGES.get(cls.__name__, ELEMENTWISE)


def test_m3_is_two_kernels_and_one_orthogonalisation():
    first, middle, last = plan(rules.M3(), (64, 48), ALL).stages
    assert isinstance(middle, Program) and len(first) == len(last) == 1
    assert [x["name"] for x in middle.nodes if x.op == "call"] == ["newton_schulz"]
    # The second moment is summed where it is made; the direction's size takes a sweep of its own.
    assert [len(first[0].sweeps), len(last[0].sweeps)] == [1, 2]
    # Nothing but the orthogonalised matrix and one number passes between them.
    passed = set(last[0].loads) & set(first[0].stores) - {"exp_avg_sq"}
    assert len(passed) == 1 and passed <= first[0].singles


@pytest.mark.parametrize("view", ["flat", "scalar"])
def test_the_vector_views_of_delta_momentum_have_no_matrix_product(view):
    found = plan(rules.DeltaMomentum(view=view, output="identity"), (64, 48), ALL)
    assert counts(found) == (1, 0)


def test_a_kernel_does_not_depend_on_the_shape():
    for rule in (rules.AdamW(), rules.M3(), rules.DeltaMomentum(view="flat")):
        texts = set()
        for shape in ((64, 48), (31, 7), (7, 31)):
            texts.add(
                tuple(
                    C(r, dict.fromkeys(r.tensors, "float32")).source()
                    for r in plan(rule, shape, ALL).regions
                )
            )
        assert len(texts) == 1


def test_a_memory_is_not_overwritten_while_it_is_still_to_be_read():
    @named
    def doubled(x: Expr) -> Expr:
        return x @ x.mT @ x

    class Late(Rule):
        """A rule that reads the old memory after a matrix product of the new one."""

        domain = "matrix"

        def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
            return {"m": Slot(shape)}

        def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
            new = 0.5 * s["m"] + g
            return doubled(new) + s["m"] * sum_(g * g), {"m": new}

    found = plan(Late(), (6, 4), ALL)
    first, _, last = found.stages
    assert "m" not in first[0].stores and {"m", "w"} <= set(last[0].stores)
    assert "m" in last[0].loads


@pytest.mark.parametrize("language", ["c", "triton"])
@pytest.mark.parametrize("cls", rules.ALL, ids=lambda cls: cls.__name__)
def test_kernels_can_be_read(cls, language):
    text = kernels(cls(), language)
    assert "sweep_0" in text and repr(cls()) in text
    where = {x for x in re.findall(r"(\w+\.py):\d+  \S", text)}
    assert where & {f"{cls.__module__.rpartition('.')[2]}.py"}


def test_the_command_line_prints_kernels(capsys):
    assert main(["describe", "m3", "--kernel", "c"]) == 0
    assert "newton_schulz" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["list", "--kernel", "c"])
    assert "--kernel goes with describe" in capsys.readouterr().err
    with pytest.raises(ValueError, match="language='metal' must be one of"):
        kernels(rules.M3(), "metal")
