"""How one BatchNorm2d is read: as `_BatchNorm.forward` reads it, without counting a batch before it is accepted."""

import pytest
import torch
from torch import nn

from fused_resnet.nn import _norm


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What `BatchNorm2d.forward` hands to `F.batch_norm`."""
    seen: dict[str, object] = {}

    def record(x, mean, var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
        seen.update(zip(_norm.NormOperands._fields, (mean, var, weight, bias, training, momentum, eps), strict=True))
        return x

    monkeypatch.setattr(nn.functional, "batch_norm", record)
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("counter", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_reads_what_batch_norm_reads(
    training: bool,
    track: bool,
    buffers: bool,
    counter: bool,
    momentum: float | None,
    forwarded: dict[str, object],
) -> None:
    bn = nn.BatchNorm2d(3, momentum=momentum, track_running_stats=buffers).train(training)
    bn.track_running_stats = track
    if not counter:
        bn.num_batches_tracked = None
    elif bn.num_batches_tracked is not None:
        bn.num_batches_tracked.fill_(6)
    before = None if bn.num_batches_tracked is None else int(bn.num_batches_tracked)
    got = _norm.operands(bn)
    assert before is None or int(bn.num_batches_tracked) == before, "reading counted"
    _norm.count(bn)
    ours = None if bn.num_batches_tracked is None else int(bn.num_batches_tracked)
    if before is not None:
        bn.num_batches_tracked.fill_(before)
    bn(torch.zeros(1, 3, 1, 1))
    theirs = None if bn.num_batches_tracked is None else int(bn.num_batches_tracked)
    assert ours == theirs
    for name, value in got._asdict().items():
        want = forwarded[name]
        assert value is want or value == want, name
