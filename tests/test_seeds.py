"""Seeds and keys against splitmix64 as it is printed, and against a count of their bits."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from randbatch._seeds import draw_seed, fold_seed, hash_positions, random_keys

_WORD = 2**64
_STRIDE = 0x9E3779B97F4A7C15


def splitmix(state: int) -> int:
    """The next number of splitmix64 (Steele, Lea, Flood 2014), from its state: as it is printed there, in C."""
    z = (state + _STRIDE) % _WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _WORD
    return z ^ (z >> 31)


SEEDS = [0, 1, -1, 2**63 - 1, 2**63, -(2**63), 2**64 + 5, 3**50]


def test_keys_are_the_numbers_of_splitmix64() -> None:
    """The first of them for seed 1234567 are known (Rosetta Code, "Pseudo-random numbers/Splitmix64")."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix(1234567 + i * _STRIDE) for i in range(4)] == known
    cpu = torch.device("cpu")
    for seed in SEEDS:
        start = splitmix(seed % _WORD - _STRIDE)  # the hash of the seed is where the numbers of tokens begin
        numbers = [splitmix(start + (i - 1) * _STRIDE) % 2**63 for i in range(50)]
        assert random_keys(50, seed, cpu).tolist() == numbers
        places, salts = [7, 0, 49, 7], [0, 1, 2**62, 3]
        assert hash_positions(torch.tensor(places), seed).tolist() == [numbers[i] for i in places]
        salted = [splitmix(start + (i - 1) * _STRIDE + salt) % 2**63 for i, salt in zip(places, salts, strict=True)]
        assert hash_positions(torch.tensor(places), seed, torch.tensor(salts)).tolist() == salted
        assert [fold_seed(seed, i) for i in (0, 1, 9)] == [splitmix(start + i * _STRIDE) // 2 for i in (0, 1, 9)]


def test_keys_are_63_bits_wide() -> None:
    """Tokens of equal keys stay in their order, so none are: 2^20 keys of b bits have 2^(39 − b) equal pairs."""
    number = 2**20
    for keys in (random_keys(number, 1, torch.device("cpu")), hash_positions(torch.arange(number), 1)):
        assert int(keys.min()) >= 0
        assert keys.unique().numel() == number  # at 63 bits two are equal with probability 6e-8
        for bit in range(63):
            ones = int(((keys >> bit) & 1).sum())
            assert abs(ones - number / 2) < 6 * number**0.5 / 2


def test_drawn_seeds_are_63_bits_wide() -> None:
    drawn = torch.tensor([draw_seed() for _ in range(4096)])
    assert int(drawn.min()) >= 0
    for bit in range(63):
        assert abs(int(((drawn >> bit) & 1).sum()) - 2048) < 6 * 32


def test_a_seed_is_not_drawn_for_each_sample_of_a_transform() -> None:
    samples = torch.zeros(3, dtype=torch.int64)
    found = torch.func.vmap(lambda x: x + draw_seed(), randomness="same")(samples)
    assert found.unique().numel() == 1
    with pytest.raises(NotImplementedError, match="say randomness='same'"):
        torch.func.vmap(lambda x: x + draw_seed(), randomness="different")(samples)


class Called(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_what_is_compiled_calls_the_hash_and_does_not_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler makes of its shifts and products may be other keys: it sees one operator, and the shape."""
    cpu = torch.device("cpu")
    keys = [random_keys(9, seed, cpu) for seed in range(4)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Called() as called:
        assert all(torch.equal(random_keys(9, seed, cpu), keys[seed]) for seed in range(4))
    assert torch.ops.randbatch.random_keys.default in called.operators
    with FakeTensorMode(), Called() as called:
        fake = random_keys(9, 3, cpu)
    assert fake.shape == (9,)
    assert fake.dtype == torch.int64
    monkeypatch.undo()
    with Called() as called:
        random_keys(9, 3, cpu)
    assert torch.ops.randbatch.random_keys.default not in called.operators  # nothing between
