"""Rows of tensors: against torch's own indexing, bit by bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from randbatch import _rows
from randbatch._rows import gather_rows
from randbatch.kernels import cpu
from randbatch.kernels.cpu import rows

SHAPES = [(), (0,), (1,), (3,), (4,), (2, 3), (16,), (5, 4), (64,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


@pytest.fixture(params=["torch", "compiled", "streamed"])
def scatter_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(rows, "_CACHED", 0 if request.param == "streamed" else 2**62)
    return _rows.scatter_rows if request.param == "torch" else cpu.scatter_rows


def bits(x: Tensor) -> list[int]:
    return x.contiguous().flatten().view(torch.uint8).tolist() if x.numel() else []


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_are_moved_as_they_are(
    shape: tuple[int, ...], dtype: torch.dtype, offset: int, scatter_rows: Callable[..., None]
) -> None:
    """All bits, those of NaN too; whole tensors, and views that begin in the middle of one."""
    size = 11 * torch.Size(shape).numel()
    high, width = (2, 1) if dtype == torch.bool else (256, dtype.itemsize)
    numbers = (torch.randint(high, ((size + 1) * width,), dtype=torch.uint8) for _ in range(2))
    source, target = (row.view(dtype)[offset : offset + size].view(11, *shape) for row in numbers)
    order = torch.tensor([7, 0, 3, 10])
    want = target.clone()
    want[order] = source[:4]
    assert bits(gather_rows(source, order)) == bits(source[order])
    scatter_rows(target, order, source[:4])
    assert bits(target) == bits(want)


def test_rows_of_a_view_with_strides(scatter_rows: Callable[..., None]) -> None:
    source, target = torch.randn(8, 11).T, torch.zeros(8, 11).T
    order = torch.tensor([7, 0, 3])
    scatter_rows(target, order, source[:3])
    assert torch.equal(target[order], source[:3])
    assert target.count_nonzero() == 24


def test_no_rows(scatter_rows: Callable[..., None]) -> None:
    target = torch.ones(3, 4)
    scatter_rows(target, torch.empty(0, dtype=torch.int64), torch.empty(0, 4))
    assert torch.equal(target, torch.ones(3, 4))
