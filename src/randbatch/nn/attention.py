"""`RandomBatchAttention`: torch's multi-head self-attention with random batches, the same parameters.

Shape letters: N tokens, C channels, H heads, D = C / H head size, B padded sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from randbatch._autograd import is_transformed
from randbatch._checks import check_batch_vector, check_integer, check_probability
from randbatch._errors import InvalidValue
from randbatch._numerics import check_tensor, has_no_elements
from randbatch._shapes import Shaped
from randbatch.execution import LinearProjections, run
from randbatch.execution.padding import kept_where_zero
from randbatch.interactions.rounds import Projections
from randbatch.nn.config import RandomBatchConfig, own_config
from randbatch.nn.former import FormerName

__all__ = ["RandomBatchAttention", "no_fast_path"]


class RandomBatchAttention(torch.nn.MultiheadAttention):
    """Multi-head self-attention inside random batches of p tokens; full attention when `batch_size` >= N.

    `out = W_o · concat_h Σ_{j∈C(i)} softmax_j(q_i·k_j / √D) v_j + b_o`, C(i) the random batch of token i. In training
    every call draws a fresh partition from torch's default CPU generator; in eval the partition depends on `seed`
    alone, so that predictions are deterministic.

    The attribute `randbatch_config` (a `RandomBatchConfig`) holds the options; change them there.

    A subclass of `torch.nn.MultiheadAttention`: parameters, initialisation and `state_dict` are the same, both ways. An
    interaction with parameters becomes the child `interaction`.

    Args:
        embed_dim: C, channels of a token; a multiple of `num_heads`.
        num_heads: H.
        batch_size: p >= 2, tokens in a random batch; or a `RandomBatchConfig`, whose options the layer takes over.
        dropout: probability that an attention weight is dropped in training. Default: 0.
        bias: whether the projections have a bias. Default: True, as in torch.
        batch_first: whether padded sets are `[B, N, C]` (True, the default) or `[N, B, C]`.
        device: where the parameters live.
        dtype: the parameters' floating dtype.
        **options: any option of `RandomBatchConfig`: `interaction`, `estimator`, `rounds`, … Default of `seed`: the
            layer's number among those that this process made without a seed, so the same program has the same seeds.
            Layers that share their batches do not mix what the batches know, so each has its own;
            `randbatch.set_inference` derives them from the paths in a model instead, and tells deep copies apart.

    Raises:
        TypeError: an argument that must be an int is not, or there is no such option.
        ValueError: a number out of range, `embed_dim` not a multiple of `num_heads`, an unknown name.

    Example:
        >>> attention = RandomBatchAttention(embed_dim=64, num_heads=4, batch_size=128)
        >>> attention(torch.randn(1000, 64)).shape  # flat tokens
        torch.Size([1000, 64])
        >>> x = torch.randn(2, 500, 64)  # two padded sets
        >>> out, _ = attention(x, x, x, key_padding_mask=torch.zeros(2, 500, dtype=torch.bool), need_weights=False)
        >>> out.shape
        torch.Size([2, 500, 64])
    """

    sampling = FormerName()

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        batch_size: int | RandomBatchConfig,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        embed_dim = check_integer("embed_dim", embed_dim, 1)
        num_heads = check_integer("num_heads", num_heads, 1)
        if embed_dim % num_heads:
            raise InvalidValue(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        check_probability("dropout", dropout)
        config = own_config(batch_size, options)
        config.check(dropout)
        interaction, _ = config.resolved()
        interaction.check_attention()
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype)
        self.randbatch_config = config
        if isinstance(interaction, torch.nn.Module):
            self.interaction = interaction.to(device=device, dtype=dtype)
        # TransformerEncoderLayer's fast path reads the weights and never calls forward; a hook turns it off.
        self.register_forward_pre_hook(no_fast_path)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        batch: Tensor | None = None,
        same_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, None]:
        """Attend; `m(x, batch=...)` returns a tensor, `m(query, key, value, ...)` returns `(out, None)` as in torch.

        Args:
            query: flat tokens `[N, C]`, or padded sets `[B, N, C]` (`[N, B, C]` if not `batch_first`).
            key: `query` itself or an equal tensor, since row i of query, key and value is one token; another one only
                with `same_tokens`. Default: `query`.
            value: like `query`; row i belongs to row i of the key. Default: `key`.
            key_padding_mask: `[B, N]`, or `[N]` for one set `[N, C]`: True or −inf where there is no token. Such a row
                takes no part, and its output is zero.
            need_weights: must be False: the weights of a random batch are not those of the whole set.
            attn_mask: must be None.
            average_attn_weights: taken for compatibility; it concerns weights, which are never returned.
            is_causal: must be False.
            batch: integers `[N]`, the graph of each token, for flat tokens only; graphs never mix. `m(x, batch)` is
                understood as `m(x, batch=batch)`, since a key is never an integer.
            same_tokens: says that row i of query and key is one token, though they are two tensors (a position added
                to one of them). Default: False, two tensors are taken for cross-attention, which is refused.

        Returns:
            The shape of `query`; zero at padded rows.

        Raises:
            TypeError: an input is not floating point, or `batch` is not an integer vector.
            ValueError: shapes that do not fit, or an option that has no meaning inside random batches.
        """
        if key is not None and value is None and not key.is_floating_point():
            key, batch = None, key
        as_torch = key is not None
        key = query if key is None else key
        value = key if value is None else value
        self._check(query, key, value, need_weights, attn_mask, is_causal)
        if not (same_tokens or _is_same(query, key)):
            raise ValueError(
                "key must be query itself: random batches are for self-attention, where row i of both is one token. If "
                "it is one, though the numbers differ, say same_tokens=True"
            )
        if query.dim() == 2 and key_padding_mask is None:
            check_batch_vector(batch, query.shape[0], query.device)
            out = self._attend(query, key, value, batch=batch)
        elif batch is not None:
            raise ValueError("batch is for flat tokens [N, C] without key_padding_mask; leave the padding out of them")
        else:
            out = self._attend_padded(query, key, value, key_padding_mask)
        return (out, None) if as_torch else out

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        check_tensor("query", query)
        if query.is_nested:
            raise TypeError(
                "query must not be a nested tensor: set `use_nested_tensor = False` on the TransformerEncoder, or "
                "convert the whole encoder, which does so"
            )
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"query must be [N, {self.embed_dim}] or [B, N, {self.embed_dim}], got {list(query.shape)}"
            )
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not tensor.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
            if tensor.shape != query.shape:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)} but query has {list(query.shape)}; random batches are for "
                    "self-attention, where row i of query, key and value is one token"
                )
        if need_weights:
            raise ValueError("need_weights must be False: weights inside a random batch are not those of the whole set")
        if attn_mask is not None:
            raise ValueError("attn_mask must be None: random batches take no mask between tokens; see key_padding_mask")
        if is_causal:
            raise ValueError("is_causal must be False: a random batch has no order")

    def _attend_padded(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        if query.dim() == 2:  # one set with padding, as torch takes it too
            sets = _map_distinct(lambda x: x.unsqueeze(0 if self.batch_first else 1), query, key, value)
            return self._attend_padded(*sets, None if padding is None else padding.unsqueeze(0)).flatten(0, 1)
        if not self.batch_first:
            query, key, value = _map_distinct(lambda x: x.transpose(0, 1), query, key, value)
        if padding is not None:  # torch's True means no token
            padding = ~padding if padding.dtype == torch.bool else kept_where_zero(padding, "key_padding_mask")
        out = self._attend(query, key, value, padded=True, mask=padding)
        return out if self.batch_first else out.transpose(0, 1)

    def _attend(
        self,
        query: Shaped[Tensor, "... n c"],
        key: Shaped[Tensor, "... n c"],
        value: Shaped[Tensor, "... n c"],
        *,
        padded: bool = False,
        **sets: Any,
    ) -> Shaped[Tensor, "... n c"]:
        """With both projections; `sets` are `batch`, or `mask` of padded sets."""
        projections = self._projections(query, key, value)
        config = self.randbatch_config
        interaction, _ = config.resolved()
        if isinstance(interaction, torch.nn.Module) and self._modules.get("interaction") is not interaction:
            raise InvalidValue(
                f"interaction {interaction.name!r} has parameters that this layer does not hold: give it to the layer "
                "when it is made"
            )
        return run(
            config.call(
                projections, self.training, dropout_p=self.dropout, padded=padded, mask_name="key_padding_mask", **sets
            )
        )  # fmt: skip

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> Projections:
        """What is done with single tokens; what is one tensor is gathered and projected as one."""
        distinct = [query]
        for x in (key, value):
            if not any(x is y for y in distinct):
                distinct.append(x)
        where = [next(i for i, x in enumerate(distinct) if x is y) for y in (query, key, value)]
        sizes = [(self.num_heads, self.head_dim)] * 3
        elements = (len(distinct) + 5) * self.embed_dim

        def project(*rows: Tensor) -> list[Tensor]:
            return self._project(*(rows[i] for i in where))

        def finish(out: Tensor) -> Tensor:
            return self.out_proj(out.flatten(-2))

        if len(distinct) == 1 and _is_plain(self.out_proj):
            return LinearProjections(
                distinct, sizes, project, finish, self, elements, self.in_proj_weight, self.in_proj_bias,
                self.out_proj.weight, self.out_proj.bias,
            )  # fmt: skip
        return Projections(distinct, sizes, project, finish, self, elements)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """`[N, C]` each to query, key, value `[N, H, D]`; one product where all three are one tensor."""
        if query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            bias: Any = self.in_proj_bias  # None without a bias, whatever torch's annotation says
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            weights = self.in_proj_weight.chunk(3)
            projected = [
                F.linear(x, weight, b) for x, weight, b in zip((query, key, value), weights, biases, strict=True)
            ]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)) for x in projected]

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return self.randbatch_config.describe()


def _map_distinct(
    function: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `function` once to each distinct tensor: what was one tensor stays one, and is moved and projected once."""
    q = function(query)
    k = q if key is query else function(key)
    v = q if value is query else k if value is key else function(value)
    return q, k, v


def _is_plain(last: Any) -> bool:
    """Whether the output projection is the one that torch made: neither replaced nor parametrised nor hooked."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = type(last) is NonDynamicallyQuantizableLinear and "forward" not in vars(last)
    return plain and not any(getattr(last, name) for name in hooks)


def _is_same(query: Tensor, key: Tensor) -> bool:
    """Whether row i of both is one token: they are one tensor, or hold the same numbers."""
    if query is key:
        return True
    if torch.compiler.is_compiling() or is_transformed() or has_no_elements(query) or has_no_elements(key):
        return False  # no numbers to compare
    if query.data_ptr() == key.data_ptr() and query.stride() == key.stride() and query.dtype == key.dtype:
        return True  # two views of one memory; there may be NaN in it, where there is padding
    return torch.equal(query, key)


def no_fast_path(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing: where there is a hook, torch's encoder layer calls `forward`."""
