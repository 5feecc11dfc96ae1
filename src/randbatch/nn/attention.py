"""`RandomBatchAttention`: torch's multi-head self-attention with random batches, the same parameters.

Shape letters: N tokens, C channels, H heads, D = C / H head size, B padded sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from randbatch._autograd import is_transformed
from randbatch._checks import check_choice, check_integer, check_probability
from randbatch._numerics import check_tensor, has_no_numbers
from randbatch._shapes import Bool, Float, Int
from randbatch.estimators import pick_estimator
from randbatch.estimators.in_pieces import Pipeline, estimate_in_pieces
from randbatch.interactions import INTERACTIONS, Options
from randbatch.kernels import Problem, pick_backend
from randbatch.nn._sets import PaddedSets, kept_where_zero
from randbatch.nn.calls import next_seed
from randbatch.nn.former import FormerName
from randbatch.nn.opaque import attend_opaquely, is_opaque
from randbatch.nn.projected import attend_projected
from randbatch.nn.sampling import Sampling, attend_in_batches
from randbatch.orthogonal import Rounds
from randbatch.partition import Partition

__all__ = ["RandomBatchAttention", "no_fast_path"]


class RandomBatchAttention(torch.nn.MultiheadAttention):
    """Multi-head self-attention inside random batches of p tokens; full attention when `batch_size` >= N.

    `out = W_o · concat_h Σ_{j∈C(i)} softmax_j(q_i·k_j / √D) v_j + b_o`, C(i) the random batch of token i. In training
    every call draws a fresh partition from torch's default CPU generator; in eval the partition depends on `seed`
    alone, so that predictions are deterministic.

    The attribute `randbatch_config` (a `randbatch.nn.Sampling`) holds `batch_size` to `seed`; change them there.

    A subclass of `torch.nn.MultiheadAttention`: parameters, initialisation and `state_dict` are the same, both ways.

    Args:
        embed_dim: C, channels of a token; a multiple of `num_heads`.
        num_heads: H.
        batch_size: p >= 2, tokens in a random batch.
        dropout: probability that an attention weight is dropped in training. Default: 0.
        bias: whether the projections have a bias. Default: True, as in torch.
        estimator: how in-batch outputs estimate full attention. Default: `"plain"`, the paper's.
        rounds: R >= 1 orthogonal partitions per call in training: a token meets R (p − 1) others. Default: 1.
        eval_rounds: R in eval. Default: the same as `rounds`.
        interaction: `"softmax"` or `"linear"`.
        backend: the backend of the softmax interaction. Default: the first that can.
        seed: the partitions of eval. Layers that share their batches do not mix what the batches know, so each has its
            own. Default: the layer's number among those that this process made without a seed, so the same program
            has the same seeds. `randbatch.set_inference` derives them from the paths in a model instead, and tells
            deep copies apart.
        chunk_batches: batches at a time, projected, attended and projected again, and all that once more in backward:
            memory is that of input, output, their gradients and one piece, whatever p; several rounds also keep what is
            attended. `"auto"`: as many as fit into free memory, and no more than are of use. Not for the estimator
            `"corrected"`. Default: None, all at once.
        batch_first: whether padded sets are `[B, N, C]` (True, the default) or `[N, B, C]`.
        device: where the parameters live.
        dtype: the parameters' floating dtype.

    Raises:
        TypeError: an argument that must be an int is not.
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
        batch_size: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        estimator: str = "plain",
        rounds: int = 1,
        eval_rounds: int | None = None,
        interaction: str = "softmax",
        backend: str = "auto",
        seed: int | None = None,
        chunk_batches: int | Literal["auto"] | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        embed_dim = check_integer("embed_dim", embed_dim, 1)
        num_heads = check_integer("num_heads", num_heads, 1)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        check_probability("dropout", dropout)
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype)
        self.interaction = check_choice("interaction", interaction, INTERACTIONS)
        seed = next_seed() if seed is None else seed
        self.randbatch_config = Sampling(
            batch_size, estimator, rounds, eval_rounds, backend, seed, chunk_batches=chunk_batches
        )
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
            out = self._attend(query, key, value, batch)
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
        if self._is_opaque(query, padding is not None or query.shape[0] > 1):
            out = self._attend_opaquely(query, key, value, padding, None)
            return out if self.batch_first else out.transpose(0, 1)
        sets = PaddedSets.of(query, padding, "key_padding_mask")
        out = sets.restore(self._attend(*_map_distinct(sets.flatten, query, key, value), sets.batch))
        return out if self.batch_first else out.transpose(0, 1)

    def _attend(
        self,
        query: Float[Tensor, "n c"],
        key: Float[Tensor, "n c"],
        value: Float[Tensor, "n c"],
        batch: Int[Tensor, " n"] | None,
    ) -> Float[Tensor, "n c"]:
        sampling = self.randbatch_config
        if self._is_opaque(query, batch is not None):
            return self._attend_opaquely(query, key, value, None, batch)
        if self.interaction == "softmax" and sampling.wants_tokens(self.training):
            projected = self._project(query, key, value)
            out = attend_in_batches(sampling, self.training, *projected, batch=batch, dropout_p=self.dropout)
            return self.out_proj(out.flatten(1))
        rounds = sampling.draw(query.shape[0], self.training, batch=batch, device=query.device, x=query)
        options = Options(None, self.dropout if self.training else 0.0, sampling.backend)
        if sampling.chunk_batches is not None:
            return self._attend_in_pieces(query, key, value, rounds, options)
        if query is key and key is value and isinstance(rounds, Partition) and self._is_three_steps(query, options):
            return self._attend_projected(query, rounds, options)
        attend = pick_estimator(sampling.estimator)
        if isinstance(rounds, Partition):
            # Moving the C channels before the projection costs a third of moving query, key and value after it.
            q, k, v = self._project(*_map_distinct(rounds.pack, query, key, value))
            out = rounds.unpack(attend(q, k, v, rounds.packed(), self.interaction, options))
        else:
            q, k, v = self._project(query, key, value)
            out = attend(q, k, v, rounds, self.interaction, options)
        return self.out_proj(out.flatten(1))

    def _is_opaque(self, x: Tensor, several_sets: bool) -> bool:
        return is_opaque(
            self.randbatch_config,
            self.training,
            several_sets=several_sets,
            interaction=self.interaction,
            numberless=has_no_numbers(x),
        )

    def _is_three_steps(self, x: Tensor, options: Options) -> bool:
        """Whether projection, attention, projection on a CPU is all that is to be computed.

        In half precision gradients of parameters that are added up piece by piece would be rounded at every piece.
        """
        last: torch.nn.Module = self.out_proj
        return (
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and x.shape[0] > 0
            and self.interaction == "softmax"
            and self.randbatch_config.estimator == "plain"
            and options.dropout_p == 0
            and options.backend != "reference"
            and type(last) is NonDynamicallyQuantizableLinear  # neither replaced nor parametrised
            and "forward" not in vars(last)
            and not (last._forward_hooks or last._forward_pre_hooks or last._backward_hooks or last._backward_pre_hooks)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not is_transformed()
        )

    def _attend_projected(self, x: Float[Tensor, "n c"], part: Partition, options: Options) -> Float[Tensor, "n c"]:
        shape = self.num_heads, self.head_dim
        problem = Problem.of(x.unflatten(1, shape), x.unflatten(1, shape), options.scale, need_lse=True)
        first, last = (self.in_proj_weight, self.in_proj_bias), (self.out_proj.weight, self.out_proj.bias)
        backend = pick_backend(options.backend, problem)
        return attend_projected(x, *first, *last, part, self.num_heads, backend, problem)

    def _attend_opaquely(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Bool[Tensor, "b n"] | None, batch: Tensor | None
    ) -> Tensor:
        """Between compiled projections, what `torch.compile` cannot trace. Padded rows are zero, also where NaN."""
        if mask is not None:
            keep = mask.unsqueeze(-1)
            query, key, value = _map_distinct(lambda x: torch.where(keep, x, 0), query, key, value)
        q, k, v = self._project(query, key, value)
        out = attend_opaquely(
            self.randbatch_config,
            self.training,
            q,
            k,
            v,
            mask=mask,
            batch=batch,
            dropout_p=self.dropout,
            interaction=self.interaction,
        )
        out = self.out_proj(out.flatten(-2))
        return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0)

    def _attend_in_pieces(
        self, query: Tensor, key: Tensor, value: Tensor, rounds: Rounds, options: Options
    ) -> Float[Tensor, "n c"]:
        """With both projections inside each piece; what is one tensor is gathered and projected as one."""
        distinct = [query]
        for x in (key, value):
            if not any(x is y for y in distinct):
                distinct.append(x)
        where = [next(i for i, x in enumerate(distinct) if x is y) for y in (query, key, value)]
        pipeline = Pipeline(
            distinct,
            numbers=(len(distinct) + 5) * self.embed_dim,
            project=lambda *rows: self._project(*(rows[i] for i in where)),
            finish=lambda out: self.out_proj(out.flatten(1)),
            owner=self,
        )
        sampling = self.randbatch_config
        return estimate_in_pieces(
            pipeline, rounds, sampling.estimator, self.interaction, options, sampling.chunk_batches, self.num_heads
        )

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


def _is_same(query: Tensor, key: Tensor) -> bool:
    """Whether row i of both is one token: they are one tensor, or hold the same numbers."""
    if query is key:
        return True
    if torch.compiler.is_compiling() or is_transformed() or has_no_numbers(query) or has_no_numbers(key):
        return False  # no numbers to compare
    if query.data_ptr() == key.data_ptr() and query.stride() == key.stride() and query.dtype == key.dtype:
        return True  # two views of one memory; there may be NaN in it, where there is padding
    return torch.equal(query, key)


def no_fast_path(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing: where there is a hook, torch's encoder layer calls `forward`."""
