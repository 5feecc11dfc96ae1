"""Orthogonal rounds: every pair meets once and only once, in batches that are balanced and not too large."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import randbatch as rb
from randbatch.partition import Partitions
from randbatch.partition.orthogonal import OrthogonalRounds, all_rounds, count_rounds, draw_rounds


def meetings(parts: list[rb.Partition], num_tokens: int) -> Tensor:
    """How often each pair shared a batch, the diagonal left out."""
    met = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for part in parts:
        assert sorted(part.order.tolist()) == list(range(num_tokens))
        for block in part.split(part.order):
            for row in block:
                met[row.unsqueeze(1), row] += 1
    return met.fill_diagonal_(0)


def all_pairs(batch: Tensor) -> Tensor:
    return (batch.unsqueeze(1) == batch).long().fill_diagonal_(0)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 49, 50, 97, 1000])
@pytest.mark.parametrize("batch_size", [2, 7, 8, 10, 64])
def test_all_rounds_let_every_pair_meet_once(num_tokens: int, batch_size: int) -> None:
    parts = rb.orthogonal_partitions(num_tokens, batch_size, 10**6)
    assert all(part.num_slots <= batch_size for part in parts)
    assert torch.equal(meetings(parts, num_tokens), all_pairs(torch.zeros(num_tokens)))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_some_rounds_let_no_pair_meet_twice(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(0, 60))
    sets = data.draw(st.lists(st.integers(0, 4), min_size=num_tokens, max_size=num_tokens))
    batch = torch.tensor(sets, dtype=torch.int64)
    batch_size, rounds = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(-(2**70), 2**70))
    parts = rb.orthogonal_partitions(num_tokens, batch_size, rounds, batch=batch, seed=seed)
    assert 1 <= len(parts) <= rounds
    met = meetings(parts, num_tokens)
    assert (met <= all_pairs(batch)).all()
    if len(parts) < rounds:
        assert torch.equal(met, all_pairs(batch))


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(49, 7), (10_000, 64), (1000, 64), (65_537, 128)])
def test_batches_are_balanced_and_as_large_as_they_may_be(num_tokens: int, batch_size: int) -> None:
    for part in rb.orthogonal_partitions(num_tokens, batch_size, 3):
        widths = [width for _, width in part.groups]
        assert max(widths) - min(widths) <= 1
        assert max(widths) >= 0.85 * min(batch_size, num_tokens**0.5)


def test_the_first_round_is_a_random_partition() -> None:
    """Pair co-occurrence: the mean, and the variance over seeds of a binomial, for all pairs with token 0."""
    num_tokens, seeds = 100, 1500
    counts = torch.zeros(num_tokens)
    groups = rb.orthogonal_partitions(num_tokens, 10, 1)[0].groups  # 11 lines of 9 or 10 tokens
    for seed in range(seeds):
        part = rb.orthogonal_partitions(num_tokens, 10, 1, seed=seed)[0]
        for block in part.split(part.order):
            counts[block[(block == 0).any(dim=1)].flatten()] += 1
    chance = sum(rows * width * (width - 1) for rows, width in groups) / (num_tokens * (num_tokens - 1))
    expected, variance = seeds * chance, seeds * chance * (1 - chance)
    spread = ((counts[1:] - expected) ** 2).mean() / variance
    assert abs(counts[1:].mean() - expected) < 1.5
    assert 0.6 < spread < 1.5


def test_each_token_keeps_its_set() -> None:
    batch = torch.tensor([3, 0, 3, 3, 0, 3, 3, 7, 3])
    sizes = torch.bincount(batch)[batch]
    for part in rb.orthogonal_partitions(9, 2, 100, batch=batch):
        assert torch.equal(part.unpack(part.count_others()) + 1, sizes)


def test_rounds_are_made_anew_each_time_and_count_keys() -> None:
    rounds = OrthogonalRounds(1000, 64, 2, seed=5)
    first, second = (torch.stack([part.order for part in rounds]) for _ in range(2))
    assert torch.equal(first, second)
    met = sum(part.unpack(part.count_met()) for part in rounds)
    assert met.min() >= 2 * 63 * 0.9  # lines of about √1000 tokens, so more of them
    assert len(list(OrthogonalRounds(1000, 1000, 5))) == 1


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 4, 1), ValueError, "num_tokens must be at least 0"),
        ((9, 1, 1), ValueError, "batch_size must be at least 2"),
        ((9, 4, 0), ValueError, "rounds must be at least 1"),
        ((9, 4, 1.5), TypeError, "rounds must be an int"),
        ((9, 4, 2, torch.zeros(8, dtype=torch.int64)), ValueError, r"batch must have shape \[9\]"),
        ((3, 2, 2, torch.tensor([0, -2, 1])), ValueError, "batch must hold graph numbers >= 0, got -2"),
    ],
)
def test_bad_input(arguments: tuple, error: type[Exception], message: str) -> None:
    batch = arguments[3] if len(arguments) == 4 else None
    with pytest.raises(error, match=message):
        rb.orthogonal_partitions(*arguments[:3], batch=batch)


def orders(rounds: Partitions) -> list[list[int]]:
    return [part.order.tolist() for part in ([rounds] if rounds.only is not None else rounds)]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("batch", [None, torch.arange(90) % 2])
def test_without_a_seed_every_call_draws_anew(rounds: int, batch: Tensor | None) -> None:
    torch.manual_seed(5)
    first, second = (orders(draw_rounds(90, 8, rounds, batch=batch)) for _ in range(2))
    assert first != second
    torch.manual_seed(5)
    assert first == orders(draw_rounds(90, 8, rounds, batch=batch))


def test_one_batch_draws_nothing() -> None:
    state = torch.get_rng_state()
    draw_rounds(8, 8, 1)
    assert torch.equal(state, torch.get_rng_state())
    draw_rounds(9, 8, 1)
    assert not torch.equal(state, torch.get_rng_state())


@pytest.mark.unchecked
def test_rounds_that_are_drawn_are_checked() -> None:
    for rounds, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="rounds must be"):
            draw_rounds(50, 8, rounds)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(49, 7), (25, 5), (35, 5)])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_no_more_partitions_are_made_than_are_needed(num_tokens: int, batch_size: int, rounds: int) -> None:
    """On a full grid: without the last of them some token has met fewer than R (p − 1) others, pair by pair."""
    parts = list(draw_rounds(num_tokens, batch_size, rounds, seed=3))
    wanted = min(rounds * (batch_size - 1), num_tokens - 1)
    assert int(meetings(parts, num_tokens).sum(dim=1).min()) >= wanted
    assert int(meetings(parts[:-1], num_tokens).sum(dim=1).min()) < wanted


def test_one_set_is_no_set_of_its_own() -> None:
    """What looks for sets finds none, and takes the shorter way."""
    for part in rb.orthogonal_partitions(50, 8, 20):
        assert part.set_of_batch is None
        assert part.set_sizes is None


@pytest.mark.parametrize("sizes", [(16,), (64,), (49,), (100,), (97, 30, 5), (200, 1, 2)])
@pytest.mark.parametrize("batch_size", [2, 4, 8, 30])
@pytest.mark.parametrize("rounds", [2, 5, 9, 40])
def test_every_token_meets_as_many_others_as_are_promised(sizes: tuple[int, ...], batch_size: int, rounds: int) -> None:
    """R (p − 1) others, or all of its set; on average where batches are of one or two. Counted pair by pair."""
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    met = torch.zeros(len(batch), len(batch), dtype=torch.int64)
    parts = list(draw_rounds(len(batch), batch_size, rounds, batch=batch, seed=3))  # type: ignore[arg-type]
    for part in parts:
        for rows in part.split(part.order):
            met[rows.unsqueeze(2), rows.unsqueeze(1)] += 1
    met.fill_diagonal_(0)
    assert int(met.max()) <= 1
    enough = (torch.tensor(sizes)[batch] - 1).clamp(max=rounds * (batch_size - 1))
    few = min(width for _, width in parts[0].groups) < 2
    assert (met.sum() >= enough.sum()) if few else (met.sum(dim=1) >= enough).all()


@pytest.mark.parametrize("sizes", [(1,), (16,), (64,), (49,), (100,), (97, 30, 5), (200, 1, 2)])
@pytest.mark.parametrize("batch_size", [2, 7, 30])
def test_rounds_are_counted(sizes: tuple[int, ...], batch_size: int) -> None:
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    made = sum(1 for _ in all_rounds(len(batch), batch_size, batch, 0, None))
    assert made == count_rounds(len(batch), batch_size, batch)
