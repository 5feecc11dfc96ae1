"""Query, key and value `[N, 1, D]` of many kinds: soft and peaked, alike and unlike, with light and heavy tails."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]
FAMILIES: dict[str, Callable[[int, int, torch.Generator], Inputs]] = {}


def family(function: Callable[[int, int, torch.Generator], Inputs]) -> Callable[[int, int, torch.Generator], Inputs]:
    """Put a family under its function's name."""
    FAMILIES[function.__name__] = function
    return function


def make(name: str, sharpness: float, num_tokens: int, size: int, seed: int = 0) -> Inputs:
    """One family; `sharpness` multiplies the query."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = FAMILIES[name](num_tokens, size, generator)
    return (sharpness * query).unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _project(x: Tensor, generator: torch.Generator, alike: bool = False) -> Inputs:
    size = x.shape[1]
    query, key, value = (x @ _normal(generator, size, size) / math.sqrt(size) for _ in range(3))
    return (query, query.clone(), value) if alike else (query, key, value)


def _heavy(generator: torch.Generator, num_tokens: int, freedom: int) -> Tensor:
    """The factors that make a normal vector one of Student's t."""
    return (_normal(generator, num_tokens, freedom).square().mean(dim=1, keepdim=True)).rsqrt()


def _clusters(num_tokens: int, size: int, generator: torch.Generator, number: int, spread: float) -> Tensor:
    centres = _normal(generator, number, size)
    which = torch.randint(number, (num_tokens,), generator=generator)
    return centres[which] + spread * _normal(generator, num_tokens, size)


@family
def gauss(n: int, d: int, g: torch.Generator) -> Inputs:
    """Independent tokens."""
    return _project(_normal(g, n, d), g)


@family
def clusters(n: int, d: int, g: torch.Generator) -> Inputs:
    """20 clusters of spread .5."""
    return _project(_clusters(n, d, g, 20, 0.5), g)


@family
def clusters_alike(n: int, d: int, g: torch.Generator) -> Inputs:
    """20 clusters; a token likes its own."""
    return _project(_clusters(n, d, g, 20, 0.5), g, alike=True)


@family
def clusters_15(n: int, d: int, g: torch.Generator) -> Inputs:
    """15 clusters of spread .4."""
    return _project(_clusters(n, d, g, 15, 0.4), g)


@family
def alike(n: int, d: int, g: torch.Generator) -> Inputs:
    """Independent tokens that like themselves most."""
    return _project(_normal(g, n, d), g, alike=True)


@family
def heavy(n: int, d: int, g: torch.Generator) -> Inputs:
    """Tokens of Student's t with three degrees of freedom."""
    return _project(_normal(g, n, d) * _heavy(g, n, 3), g)


@family
def heavy_keys(n: int, d: int, g: torch.Generator) -> Inputs:
    """Keys of Student's t."""
    query, key, value = gauss(n, d, g)
    return query, key * _heavy(g, n, 3), value


@family
def heavy_queries(n: int, d: int, g: torch.Generator) -> Inputs:
    """Queries of Student's t with two degrees of freedom."""
    query, key, value = gauss(n, d, g)
    return query * _heavy(g, n, 2), key, value


@family
def rank_3(n: int, d: int, g: torch.Generator) -> Inputs:
    """Tokens in a space of three dimensions."""
    return _project(_normal(g, n, 3) @ _normal(g, 3, d) / math.sqrt(3), g)


@family
def rank_1_keys(n: int, d: int, g: torch.Generator) -> Inputs:
    """Keys on a line."""
    query, _, value = gauss(n, d, g)
    return query, _normal(g, n, 1) * _normal(g, 1, d), value


@family
def copies(n: int, d: int, g: torch.Generator) -> Inputs:
    """Every token twenty times."""
    return _project(_normal(g, n // 20 + 1, d).repeat(20, 1)[:n], g)


@family
def copies_alike(n: int, d: int, g: torch.Generator) -> Inputs:
    """Every token twenty times, and it likes its copies."""
    return _project(_normal(g, n // 20 + 1, d).repeat(20, 1)[:n], g, alike=True)


@family
def needle(n: int, d: int, g: torch.Generator) -> Inputs:
    """Every query looks for one key."""
    key = _normal(g, n, d)
    query = 2 * key[torch.randperm(n, generator=g)] + 0.3 * _normal(g, n, d)
    return query, key, _normal(g, n, d)


@family
def hubs(n: int, d: int, g: torch.Generator) -> Inputs:
    """One key in a hundred attracts all."""
    query, key, value = gauss(n, d, g)
    few = max(n // 100, 1)
    key[:few] += 1
    value[:few] += 2
    return query + 1, key, value


@family
def sphere(n: int, d: int, g: torch.Generator) -> Inputs:
    """Queries and keys of one length."""
    query, key, value = gauss(n, d, g)
    query, key = (x / x.norm(dim=1, keepdim=True) * math.sqrt(d) for x in (query, key))
    return query, key, value


@family
def local(n: int, d: int, g: torch.Generator) -> Inputs:
    """Points of a square that attend to their neighbours."""
    points = torch.rand(n, 2, generator=g) * 2 - 1
    angles = points @ _normal(g, 2, d) * 2
    x = torch.cat([angles[:, : d // 2].cos(), angles[:, d // 2 :].sin()], dim=1) * 1.4
    return x, x.clone(), x @ _normal(g, d, d) / math.sqrt(d)


SOFT_TO_SHARP = [
    ("gauss", 0.3), ("gauss", 1.0), ("gauss", 2.0), ("clusters", 0.3), ("clusters", 1.0), ("clusters", 2.0),
    ("clusters_alike", 0.3), ("clusters_alike", 1.0), ("clusters_alike", 2.0),
]  # fmt: skip
MANY = [
    ("gauss", 0.3), ("gauss", 1.0), ("clusters_15", 0.4), ("clusters_15", 1.2), ("heavy", 0.5), ("rank_3", 1.0),
    ("alike", 0.3), ("alike", 1.0), ("alike", 2.5), ("heavy_keys", 0.5), ("heavy_queries", 1.0), ("rank_1_keys", 1.0),
    ("copies", 1.0), ("copies_alike", 1.0), ("needle", 0.5), ("needle", 1.0), ("hubs", 0.5), ("hubs", 1.0),
    ("sphere", 1.0), ("local", 1.0), ("local", 4.0),
]  # fmt: skip
