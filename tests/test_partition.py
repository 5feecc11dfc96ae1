"""A partition covers every token once, in balanced batches, at random, and is the same everywhere."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import randbatch as rb
from randbatch.partition import Partition, balanced_groups, fold_seed
from randbatch.partition.orthogonal import draw_rounds
from randbatch.partition.sets import largest_set, number_sets


def check_partition(part: rb.Partition, num_tokens: int, batch_size: int, graph: torch.Tensor | None = None) -> None:
    """Everything the contract promises, counted without the code under test."""
    graph = torch.zeros(num_tokens, dtype=torch.int64) if graph is None else graph
    index, mask = part.index, part.mask
    assert index.dtype == torch.int64
    real = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
    assert sorted(index[real].tolist()) == list(range(num_tokens))  # every token once
    if mask is not None:
        assert not mask.all()  # None where every slot is filled
    for row in range(index.shape[0]):
        assert len(set(graph[index[row]].tolist())) == 1  # graphs never mix, masked slots included
    sizes = real.sum(1)
    rows_graph = graph[index[:, 0]] if len(index) else graph[:0]
    for g in graph.unique().tolist():
        mine = sizes[rows_graph == g]
        total = int((graph == g).sum())
        assert len(mine) == -(-total // batch_size)  # M = ceil(N / p)
        assert int(mine.max() - mine.min()) <= 1  # balanced


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 300), st.integers(2, 400), st.integers(-(2**70), 2**70))
def test_one_set(num_tokens: int, batch_size: int, seed: int) -> None:
    part = rb.random_partition(num_tokens, batch_size, seed=seed)
    check_partition(part, num_tokens, batch_size)
    if part.mask is not None:
        assert part.mask[:, :-1].all()  # only the last slot can be masked


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(2, 40), st.integers(0, 99), st.booleans())
def test_several_graphs(sizes: list[int], batch_size: int, seed: int, shuffle: bool) -> None:
    graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # some graphs are empty
    if shuffle:
        graph = graph[torch.randperm(len(graph))]
    part = rb.random_partition(len(graph), batch_size, batch=graph, seed=seed)
    check_partition(part, len(graph), batch_size, graph)


def test_one_graph_is_no_graph() -> None:
    one = rb.random_partition(100, 7, seed=3, batch=torch.zeros(100, dtype=torch.int64))
    assert torch.equal(one.index, rb.random_partition(100, 7, seed=3).index)


def test_one_batch_is_not_moved() -> None:
    for num_tokens, batch_size in ((0, 2), (1, 2), (5, 5), (5, 9)):
        part = rb.random_partition(num_tokens, batch_size, seed=1)
        assert part.order.tolist() == list(range(num_tokens))
        assert part.in_order
    assert not rb.random_partition(6, 5, seed=1).in_order


def test_no_tokens_are_no_batches() -> None:
    part = Partition(torch.empty(0, dtype=torch.int64), ())
    assert part.num_slots == part.num_batches == 0
    assert part.gather(torch.ones(0, 3)).shape == (0, 0, 3)
    assert part.scatter(torch.ones(0, 0, 3)).shape == (0, 3)
    assert part.index.shape == (0, 0)
    assert part.count_met().shape == part.count_others().shape == (0,)


def test_whole_sets_are_told() -> None:
    sets = torch.tensor([0, 1, 1, 0, 1, 1, 1])
    assert rb.random_partition(7, 7).is_whole
    assert not rb.random_partition(7, 6).is_whole
    assert rb.random_partition(7, 5, batch=sets).is_whole
    assert not rb.random_partition(7, 4, batch=sets).is_whole
    assert not next(rb.random_partition(7, 4).chunks(1))[1].is_whole
    assert all(piece.is_whole for _, piece in rb.random_partition(7, 5, batch=sets).chunks(1))


@pytest.mark.parametrize("batch", [None, torch.tensor([3, 0, 3, 3, 0, 3, 3, 7, 3, 3, 3])])
def test_others_are_counted(batch: torch.Tensor | None) -> None:
    """Those that a token meets, and those that there are, one by one."""
    part = rb.random_partition(11, 4, batch=batch, seed=1)
    sets = torch.zeros(11, dtype=torch.int64) if batch is None else batch
    met = torch.zeros(11, dtype=torch.int64)
    for block in part.split(part.order):
        for row in block:
            met[row] = len(row) - 1
    assert part.unpack(part.count_met()).tolist() == met.tolist()
    assert part.unpack(part.count_others()).tolist() == [int((sets == each).sum()) - 1 for each in sets]
    for tokens, piece in part.chunks(2):
        assert piece.count_met().tolist() == met[tokens].tolist()
        assert piece.count_others().tolist() == [int((sets == sets[token]).sum()) - 1 for token in tokens]


@pytest.mark.unchecked
def test_one_program_serves_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is traced, N is a symbol: nothing is asked of it, and a size without batches stays."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    shapes, source = ShapeEnv(), ConstantSource("num_tokens")
    symbol = shapes.create_symbol(40, source, DimDynamic.DYNAMIC)
    groups = balanced_groups(shapes.create_symintnode(symbol, hint=40, source=source), 8)
    assert not shapes.guards  # the program is not made for 40
    assert [(int(rows), int(width)) for rows, width in groups] == [(0, 9), (5, 8)]
    assert balanced_groups(16, 8) == ((2, 8),)


def test_gather_and_scatter_match_indexing() -> None:
    graph = torch.randint(0, 5, (83,))
    for num_tokens, batch in ((83, None), (83, graph), (80, None)):
        part = rb.random_partition(num_tokens, 8, batch=batch, seed=1)
        x = torch.randn(part.num_tokens, 3, 2)
        slots = part.gather(x)
        expected = x[part.index]
        if part.mask is not None:
            expected = torch.where(part.mask[..., None, None], expected, 0.0)
        torch.testing.assert_close(slots, expected, rtol=0, atol=0)
        torch.testing.assert_close(part.scatter(slots), x, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("columns", [0, 1, 2, 3, 4, 8])
def test_short_rows_are_moved_bit_by_bit(dtype: torch.dtype, columns: int) -> None:
    part = rb.random_partition(50, 4, seed=1)
    every = torch.randn(51, columns).to(dtype)
    if dtype is torch.float32 and columns:
        every[7, 0] = torch.nan
    for x in (every[:50], every[1:], torch.randn(columns, 50).to(dtype).T):  # at an odd address, and with strides
        torch.testing.assert_close(part.pack(x), x[part.order], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(part.unpack(part.pack(x)), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_tokens", [0, 1, 17, 24])
def test_gather_and_scatter_gradients(num_tokens: int) -> None:
    part = rb.random_partition(num_tokens, 4, seed=5)
    x = torch.randn(num_tokens, 2, dtype=torch.float64, requires_grad=True)
    slots = torch.randn(part.num_batches, part.num_slots, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(part.gather, x)
    assert torch.autograd.gradcheck(part.scatter, slots)
    assert torch.autograd.gradgradcheck(part.gather, x)


def test_backward_of_a_gather_is_a_gather() -> None:
    part = rb.random_partition(1000, 10)
    x = torch.randn(1000, 4, requires_grad=True)
    with torch.profiler.profile() as profile:
        part.gather(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert not any("index_add" in name or "index_put" in name or "scatter" in name or "sort" in name for name in names)


def test_pairs_meet_as_often_as_chance_has_it() -> None:
    """Co-occurrence over seeds is binomial: mean (p−1)/(N−1), variance within 2 %. An affine generator is 5 × off."""
    num_tokens, batch_size, seeds = 1000, 40, 2000
    met = torch.zeros(num_tokens, num_tokens)
    for seed in range(seeds):
        part = rb.random_partition(num_tokens, batch_size, seed=seed)
        row = torch.empty(num_tokens, dtype=torch.int64)
        row[part.order] = torch.arange(num_tokens) // batch_size
        member = torch.nn.functional.one_hot(row).float()
        met.addmm_(member, member.T)
    counts = met[torch.triu(torch.ones_like(met), 1).bool()].double()
    chance = (batch_size - 1) / (num_tokens - 1)
    assert counts.mean().item() == pytest.approx(seeds * chance, rel=1e-6)
    assert counts.var().item() == pytest.approx(seeds * chance * (1 - chance), rel=0.02)


def test_every_token_visits_every_slot() -> None:
    seeds = 4000
    first = torch.stack([rb.random_partition(12, 4, seed=seed).order for seed in range(seeds)])
    counts = torch.nn.functional.one_hot(first, 12).sum(0).double()
    chi2 = ((counts - seeds / 12) ** 2 / (seeds / 12)).sum().item()
    assert 121 - 5 * (2 * 121) ** 0.5 < chi2 < 121 + 5 * (2 * 121) ** 0.5  # 11² degrees of freedom


def test_a_seed_is_a_partition_for_ever() -> None:
    """A published result names a seed; this order must not change between versions or machines."""
    assert rb.random_partition(10, 4, seed=0).order.tolist() == [0, 3, 5, 7, 9, 8, 6, 1, 2, 4]
    code = """
import torch, randbatch as rb
torch.set_num_threads(THREADS)
print(hash(tuple(rb.random_partition(100_000, 64, seed=9).order.tolist())))
"""
    runs = {
        subprocess.run([sys.executable, "-c", code.replace("THREADS", n)], capture_output=True, check=True).stdout
        for n in "125"
    }
    assert len(runs) == 1


def test_sets_are_numbered_and_told_to_be_in_order() -> None:
    for batch, number, ordered in (
        ([4, 4, 7, 7, 7, 10**12], [0, 0, 1, 1, 1, 2], True),
        ([7, 4, 7, 10**12, 4, 7], [1, 0, 1, 2, 0, 1], False),
    ):
        numbers, sizes, in_order = number_sets(torch.tensor(batch))
        assert numbers.tolist() == number
        assert sizes.tolist() == [2, 3, 1]
        assert in_order is ordered


def test_the_largest_set() -> None:
    assert largest_set(7, None) == 7
    assert largest_set(7, torch.tensor([5, 0, 5, 10**12, 5, 0, 3])) == 3
    assert largest_set(0, torch.empty(0, dtype=torch.int64)) == 0


def test_seeds_and_folds_differ() -> None:
    orders = {tuple(rb.random_partition(50, 5, seed=seed).order.tolist()) for seed in (0, 1, -1, 2**64 - 2, 2**63)}
    assert len(orders) == 5
    assert len({fold_seed(seed, i) for seed in range(50) for i in range(50)}) == 2500


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_the_gpu() -> None:
    graph = torch.randint(0, 9, (5000,))
    for batch in (None, graph):
        cpu = rb.random_partition(5000, 32, seed=4, batch=batch)
        gpu = rb.random_partition(5000, 32, seed=4, batch=batch, device="cuda")
        assert torch.equal(cpu.index, gpu.index.cpu())


def test_many_small_graphs_waste_nothing() -> None:
    graph = torch.arange(10_000).repeat_interleave(20)[torch.randperm(200_000)]
    part = rb.random_partition(200_000, 256, batch=graph)
    assert part.index.numel() <= 1.03 * 200_000
    ragged = torch.arange(2000).repeat_interleave(torch.randint(1, 60, (2000,)))
    blocks = rb.random_partition(len(ragged), 256, batch=ragged).groups  # what is computed, whatever the index pads
    assert sum(rows * width for rows, width in blocks) == len(ragged)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 1), ValueError, "batch_size must be at least 2, got 1"),
        ((10, 2.5), TypeError, "batch_size must be an int, got float"),
        ((10, True), TypeError, "batch_size must be an int, got bool"),
        ((-1, 4), ValueError, "num_tokens must be at least 0"),
        ((3, 4, torch.zeros(2, dtype=torch.int64)), ValueError, r"batch must have shape \[3\]"),
        ((3, 4, torch.zeros(3)), TypeError, "batch must be an int64 or int32 tensor, got torch.float32"),
        ((3, 4, torch.tensor([0, -2, 1])), ValueError, "batch must hold graph numbers >= 0, got -2"),
    ],
)
@pytest.mark.unchecked
def test_bad_input(arguments: tuple, error: type[Exception], message: str) -> None:
    batch = arguments[2] if len(arguments) == 3 else None
    with pytest.raises(error, match=message):
        rb.random_partition(*arguments[:2], batch=batch)


@pytest.mark.unchecked
def test_bad_rows() -> None:
    part = rb.random_partition(10, 4)
    with pytest.raises(ValueError, match=r"x must start with \[10\]"):
        part.gather(torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"y must start with \[3, 4\]"):
        part.scatter(torch.zeros(3, 3, 2))
    with pytest.raises(TypeError, match="seed must be an int"):
        rb.random_partition(10, 4, seed="a")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [None, torch.arange(50) % 3])
def test_pieces_are_the_batches_in_their_order(batch: torch.Tensor | None) -> None:
    part = rb.random_partition(50, 7, batch=batch, seed=1)
    tokens = iter(part.order.tolist())
    seen = 0
    for rows, piece in part.chunks(3):
        check_partition(piece, len(rows), 7)
        widths = [width for count, width in piece.groups for _ in range(count)]
        starts, found = piece.starts_and_widths()
        assert found.tolist() == widths
        assert starts.tolist() == [sum(widths[:i]) for i in range(len(widths))]
        assert rows.tolist() == [next(tokens) for _ in range(sum(widths))]
        if batch is not None:
            assert piece.set_of_batch.tolist() == batch[rows[starts]].tolist()
        seen += len(widths)
    assert seen == part.num_batches
    assert next(tokens, None) is None


def test_what_inference_has_worked_out_serves_training() -> None:
    """Positions and batches are remembered; those that are made in inference mode could not be saved for backward."""
    x = torch.randn(20, 2, 16, requires_grad=True)
    for backend in ("sdpa", "cpu"):
        part = rb.random_partition(20, 6, seed=0)
        with torch.inference_mode():
            want = rb.random_batch_attention(x, x, x, partition=part, backend=backend)
        out = rb.random_batch_attention(x, x, x, partition=part, backend=backend)
        assert torch.equal(out, want)
        out.sum().backward()


def _graphs(*sizes: int) -> torch.Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def _batches(part: Partition, start: int, stop: int) -> set[frozenset[int]]:
    """The random batches of the tokens from `start` on, as they are numbered in their own graph."""
    found = (frozenset((row - start).tolist()) for block in part.split(part.order) for row in block)
    return {batch for batch in found if min(batch) >= 0 and max(batch) < stop - start}


@pytest.mark.parametrize("ids", [[0, 1, 2], [7, 10**12, -1 + 2**40], [5, 3, 9]])
def test_a_graph_is_split_as_if_it_were_alone(ids: list[int]) -> None:
    sizes = (13, 29, 40)
    batch = torch.tensor(ids).repeat_interleave(torch.tensor(sizes))
    part = rb.random_partition(len(batch), 8, batch=batch, seed=5)
    rounds = list(draw_rounds(len(batch), 8, 3, batch=batch, seed=5))
    start = 0
    for size in sizes:
        alone = rb.random_partition(size, 8, seed=5)
        assert _batches(part, start, start + size) == _batches(alone, 0, size)
        own = list(draw_rounds(size, 8, 3, seed=5))
        for number, each in enumerate(rounds):
            met = {batch for batch in _batches(each, start, start + size) if len(batch) > 1}
            want = {batch for batch in _batches(own[number], 0, size) if len(batch) > 1} if number < len(own) else set()
            assert met == want
        start += size


def test_unordered_graphs_are_split_as_ordered_ones() -> None:
    batch = torch.randint(0, 4, (90,))
    part = rb.random_partition(90, 8, batch=batch, seed=1)
    for graph in range(4):
        tokens = (batch == graph).nonzero().squeeze(1)
        place = torch.full((90,), -1).index_copy_(0, tokens, torch.arange(len(tokens)))
        found = {frozenset(place[row].tolist()) for block in part.split(part.order) for row in block}
        own = {batch for batch in found if min(batch) >= 0}
        assert own == _batches(rb.random_partition(len(tokens), 8, seed=1), 0, len(tokens))


def test_equal_graphs_are_split_independently_on_request() -> None:
    """Two of 100 graphs of 12 in batches of 6 are split alike with probability 1/462; in training few may be."""
    batch = _graphs(*[12] * 100)
    for part in (
        rb.random_partition(1200, 6, batch=batch, seed=1, independent=True),
        draw_rounds(1200, 6, 1, batch=batch),
    ):
        assert isinstance(part, Partition)
        splits = {frozenset(_batches(part, start, start + 12)) for start in range(0, 1200, 12)}
        assert len(splits) > 80
    alike = rb.random_partition(1200, 6, batch=batch, seed=1)
    assert len({frozenset(_batches(alike, start, start + 12)) for start in range(0, 1200, 12)}) == 1


def test_what_stands_in_order_is_not_copied() -> None:
    x = torch.randn(12, 3)
    part = rb.random_partition(12, 4).packed()
    assert part.pack(x) is x
    assert part.unpack(x) is x
    assert part.gather(x).data_ptr() == x.data_ptr()


def test_partitions_made_in_inference_mode_can_train() -> None:
    with torch.inference_mode():
        own = Partition(torch.tensor([1, 0, 2, 3]), ((2, 2),))
        parts = [own, rb.random_partition(4, 2), own.to("cpu"), *rb.orthogonal_partitions(4, 2, 2)]
        parts += [rb.random_partition(4, 2, batch=torch.tensor([0, 0, 0, 1]))]
    for part in parts:
        x = torch.randn(4, 1, 8, requires_grad=True)
        rb.random_batch_attention(x, x, x, partition=part).sum().backward()
        assert x.grad is not None
