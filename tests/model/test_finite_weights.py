"""The check that loaded weights are finite, also of shards that ZeRO-3 pads."""

import pytest
import torch
from torch import nn

from dpokit.errors import ModelError
from dpokit.model.check import check_finite_weights

NAN = float("nan")


def shard(numbers: list[float], *, whole_size: int) -> nn.Parameter:
    """A parameter as ZeRO-3 leaves it: empty, with this rank's part beside it."""
    weight = nn.Parameter(torch.empty(0))
    weight.ds_tensor, weight.ds_numel = torch.tensor(numbers), whole_size
    return weight


FINITE = {
    "a weight": nn.Parameter(torch.ones(2, 3)),
    "a whole shard": shard([1.0, 2.0], whole_size=4),
    "a shard with padding": shard([1.0, NAN], whole_size=1),
    "a shard of padding alone": shard([NAN, NAN], whole_size=0),
    "whole numbers": nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False),
}
NOT_FINITE = {
    "a weight": nn.Parameter(torch.tensor([1.0, NAN])),
    "an infinite weight": nn.Parameter(torch.tensor([1.0, -float("inf")])),
    "a shard": shard([1.0, NAN], whole_size=2),
    "a shard with padding": shard([NAN, 1.0], whole_size=1),
}


@pytest.mark.parametrize("case", FINITE)
def test_finite_weights_and_any_padding_are_accepted(case):
    check_finite_weights("tiny", [("layer", FINITE[case])])


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_weight_that_is_not_finite_is_refused(case):
    with pytest.raises(ModelError, match="tiny: layer holds values that are not finite"):
        check_finite_weights("tiny", [("layer", NOT_FINITE[case])])
