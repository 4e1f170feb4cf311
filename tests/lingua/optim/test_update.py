import pytest
import torch

from lingua.optim.update import GROWTH_INTERVAL_STEPS, INITIAL, LossScale, is_overflow

GOOD, BAD = torch.tensor(True), torch.tensor(False)
CPU = torch.device("cpu")


def test_an_overflow_halves_it_and_many_good_steps_double_it():
    scale = LossScale(CPU)
    for _ in range(GROWTH_INTERVAL_STEPS - 1):
        scale.update(GOOD)
    scale.update(BAD)
    assert scale.factor.item() == INITIAL / 2  # and the good steps count from 0 again
    for _ in range(GROWTH_INTERVAL_STEPS - 1):
        scale.update(GOOD)
    assert scale.factor.item() == INITIAL / 2
    scale.update(GOOD)
    assert scale.factor.item() == INITIAL


def test_it_equals_torchs_own():
    ours, torchs = LossScale(CPU), torch.amp.GradScaler("cpu")
    weight = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in (True, False, False, True, False):
        torchs.scale(weight * (1.0 if finite else float("inf"))).backward()
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(finite))
        assert ours.factor.item() == torchs.get_scale()


def test_it_ends_at_its_minimum():
    scale = LossScale(CPU, {"factor": 2.0, "good_steps": 7})
    assert scale.can_mend(torch.tensor(3.0))
    for _ in range(3):
        scale.update(BAD)
    assert scale.factor.item() == 1
    assert not scale.can_mend(torch.tensor(3.0))


def test_state_goes_on_where_it_was():
    scale = LossScale(CPU)
    for finite in (GOOD, BAD, GOOD, GOOD):
        scale.update(finite)
    assert scale.state() == {"factor": INITIAL / 2, "good_steps": 2}
    assert LossScale(CPU, scale.state()).state() == scale.state()


@pytest.mark.parametrize(
    ("loss", "factor", "overflow"),
    [(3.0, 4.0, True), (3.0, 1.0, False), (float("nan"), 4.0, False), (float("inf"), 4.0, False)],
)
def test_what_a_smaller_factor_can_mend(loss: float, factor: float, overflow: bool):
    assert is_overflow(loss, factor) == overflow
    assert LossScale(CPU, {"factor": factor, "good_steps": 0}).can_mend(torch.tensor(loss)).item() == overflow
