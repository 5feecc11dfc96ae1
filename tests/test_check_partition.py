"""What a partition must be, checked where a user makes one, and only there."""

import pytest
import torch

import randbatch as rb
from randbatch.partition import Partition


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"order": torch.arange(6, dtype=torch.int32)}, TypeError, "order must be int64"),
        ({"order": [0, 1, 2, 3, 4, 5]}, TypeError, "order must be a tensor"),
        ({"order": torch.arange(6).view(2, 3)}, ValueError, "order must have one dimension"),
        ({"order": torch.tensor([0, 1, 2, 3, 4, 6])}, ValueError, "tokens 0 to 5, got 6"),
        ({"order": torch.tensor([0, 1, 2, -1, 4, 5])}, ValueError, "tokens 0 to 5, got -1"),
        ({"order": torch.tensor([0, 1, 2, 3, 4, 4])}, ValueError, "5 is missing"),
        ({"groups": ((2, 4),)}, ValueError, "as many tokens as order, 6, got 8"),
        ({"groups": ((1, 3), (1, 2))}, ValueError, "as many tokens as order, 6, got 5"),
        ({"groups": ((1, 2), (1, 4))}, ValueError, "widest first"),
        ({"groups": ((-1, 4), (5, 2))}, ValueError, "rows >= 1"),
        ({"groups": ((2, 3), (1, 0))}, ValueError, "widths >= 1"),
        ({"groups": [(2, 3)]}, TypeError, "groups must be a tuple"),
        ({"groups": ((2.0, 3),)}, TypeError, "groups must be a tuple"),
        ({"set_sizes": torch.tensor([6])}, ValueError, "given together"),
        ({"set_of_batch": torch.tensor([0, 1]), "set_sizes": torch.tensor([6])}, ValueError, "sets 0 to 0"),
        ({"set_of_batch": torch.tensor([-1, 0]), "set_sizes": torch.tensor([6])}, ValueError, "sets 0 to 0"),
        ({"set_of_batch": torch.tensor([0, 0]).to("meta"), "set_sizes": torch.tensor([6])}, ValueError, "one device"),
        ({"set_of_batch": torch.tensor([0, 0]), "set_sizes": torch.tensor([6]).to("meta")}, ValueError, "one device"),
        ({"set_of_batch": torch.tensor([0, 0]), "set_sizes": torch.tensor([5])}, ValueError, "set_sizes must be"),
        ({"set_of_batch": torch.tensor([0]), "set_sizes": torch.tensor([6])}, ValueError, "each of 2 batches"),
        ({"order": torch.tensor([1, 0, 2, 3, 4, 5]), "in_order": True}, ValueError, "in_order"),
    ],
)
def test_a_partition_is_checked_where_it_is_made(change: dict, error: type[Exception], why: str) -> None:
    good = {"order": torch.tensor([3, 1, 2, 0, 5, 4]), "groups": ((2, 3),)}
    assert Partition(**good).num_batches == 2
    with pytest.raises(error, match=why):
        Partition(**(good | change))


def test_what_is_made_here_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check reads all of a partition, on a GPU too, which would wait for it in every call."""

    def fail(*_: object) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr("randbatch.partition.partition.check_partition", fail)
    with pytest.raises(AssertionError, match="checked"):
        Partition(torch.arange(4), ((2, 2),))
    sets = torch.arange(50) % 3
    for options in ({}, {"batch": sets}):
        for part in (rb.random_partition(50, 7, **options), *rb.orthogonal_partitions(50, 7, 3, **options)):
            assert [*part.chunks(2), part.packed(), part.to("cpu")]
    assert rb.random_partition(5, 7).num_batches == 1
