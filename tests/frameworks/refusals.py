"""What is refused, where, by what sentence, and what to do instead: read by `table`."""

from __future__ import annotations

from dataclasses import dataclass

Traits = tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """A sentence, and the cells that it stands in.

    Attributes:
        sentence: is in the exception's text, word by word.
        columns: names, or patterns of them.
        rows: rows that have all traits of one of these.
        instead: what the page says beside the sentence, where torch's own words do not say what to do.
        unless: not for rows that have one of these traits.
    """

    sentence: str
    columns: tuple[str, ...]
    rows: tuple[Traits, ...]
    instead: str = ""
    unless: frozenset[str] = frozenset()


TRANSFORMS = (
    "func.jvp", "dual numbers", "func.grad", "vmap, eval", "vmap(grad), eval", "vmap(grad), train, same",
)  # fmt: skip
SECOND = ("hvp", "gradgradcheck", "MAML step")
INNER = "inner TransformerEncoderLayer"
TORCHS_ATTENTION = "It is torch's own attention in the module inside: put `sdpa_kernel(SDPBackend.MATH)` around it."


def _inside(what: str, instead: str) -> str:
    return f"{what} cannot run inside torch.func transforms or forward-mode differentiation: {instead}"


def _once(what: str, instead: str) -> str:
    return f"{what} has first derivatives only (create_graph must be False): {instead}"


def _backend(name: str, reason: str) -> str:
    return f"backend '{name}' cannot be used here: {reason}"


DRAWN = (
    Refusal(_inside("tolerance", "give rounds instead"), (*TRANSFORMS, "vmap(grad), train, *"), (("tolerance",),)),
    Refusal(_inside("chunk_size", "leave it out"), (*TRANSFORMS, "vmap(grad), train, *"), (("full chunks",),)),
    Refusal(
        "torch.func.vmap cannot draw other random batches for each sample: say randomness='same', which draws once for "
        "all",
        ("vmap(grad), train, different",),
        (("draws",),),
    ),
    Refusal(
        "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
        "randomness flags on vmap",
        ("vmap(grad), train, error",),
        (("draws",),),
        "Say `randomness='same'`.",
    ),
    Refusal(
        "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
        "randomness flags on vmap",
        ("vmap, eval", "vmap(grad), eval"),
        (("op", "dropout"),),
        "Say `randomness='same'`.",
        frozenset({"chunks"}),
    ),
)

DERIVATIVES = (
    Refusal(_once("chunk_batches", "set chunk_batches to None"), SECOND, (("chunks",),)),
    Refusal(_inside("chunk_batches", "set chunk_batches to None"), TRANSFORMS, (("chunks",),)),
    Refusal(
        "chunk_batches computes a module again in backward, but its parameters are others by now (by "
        "torch.func.functional_call, or a change of the module?): set chunk_batches to None there",
        ("functional_call",),
        (("chunks",),),
        unless=frozenset({"op"}),
    ),
    Refusal(
        _once("estimator 'corrected'", "take 'plain' or 'debiased', whose weights are not fitted to the input"),
        SECOND,
        (("corrected",),),
    ),
    Refusal(_inside("estimator 'corrected'", "take 'plain' or 'debiased'"), TRANSFORMS, (("corrected",),)),
    Refusal(
        _once("attention with dropout in a fused kernel", "use backend 'reference', or no dropout"),
        ("hvp",),
        (("dropout",),),
        unless=frozenset({"reference"}),
    ),
    Refusal(
        _once("attention with dropout in a fused kernel", "use backend 'reference', or no dropout"),
        ("MAML step",),
        (("dropout", "op"),),  # a layer drops nothing in eval
        unless=frozenset({"reference"}),
    ),
    Refusal(
        _once(
            "the mean over neighbours by a sparse product",
            "say model.prepare_edges(edge_index, num_nodes, sparse=False)",
        ),
        SECOND,
        (("local sage",),),
    ),
    Refusal(
        "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented",
        SECOND,
        ((INNER,),),
        TORCHS_ATTENTION,
    ),
    Refusal(
        "Trying to use forward AD with _scaled_dot_product_flash_attention_for_cpu that does not support it",
        ("func.jvp", "dual numbers"),
        ((INNER,),),
        TORCHS_ATTENTION,
    ),
    *(
        Refusal(
            _backend(
                name, "inside torch.func transforms and forward-mode differentiation only backend 'reference' is right"
            ),
            TRANSFORMS,
            ((f"backend {name}",),),
        )
        for name in ("triton", "cpu", "sdpa")
    ),
    Refusal(
        _backend("cpu", "it takes float32, got torch.float64"), ("gradgradcheck", ".double()"), (("backend cpu",),)
    ),
    Refusal(
        _backend("triton", "it takes float32, bfloat16 and float16, got torch.float64"),
        ("gradgradcheck", ".double()"),
        (("backend triton",),),
    ),
)

OTHERS = (
    Refusal(
        "again in backward, which fully_shard has sharded: shard the module around it instead, or set chunk_batches to "
        "None",
        ("fully_shard inside",),
        (("chunks",),),
    ),
    Refusal(
        _backend("cpu", "it takes float32, got torch.bfloat16"),
        ("autocast bf16", "autocast, mixed dtypes", ".to(bf16)"),
        (("backend cpu",),),
    ),
    Refusal(
        _backend("cpu", "it takes float32, got torch.float16"), ("autocast fp16", ".to(fp16)"), (("backend cpu",),)
    ),
    Refusal(
        "Tensor.item() cannot be called on meta tensors",
        ("meta tensors",),
        (("bert",),),
        "transformers looks at its mask: leave out `attention_mask`.",
    ),
    Refusal(
        "torch.compile cannot trace random batches of several sets here, and meta and fake tensors have none: how many "
        "batches there are of each size is known only when they are drawn. Leave out batch and mask",
        ("meta tensors", "FakeTensorMode"),
        (("wrapper", "padded"), ("performer",)),
    ),
    Refusal(
        "nonzero() raises unimplemented",
        ("meta tensors",),
        (("local gat",),),
        "torch_geometric's GATConv looks at the edges.",
    ),
    Refusal(
        "aten.nonzero",
        ("FakeTensorMode",),
        (("local gat",),),
        "torch_geometric's GATConv looks at the edges.",
    ),
    Refusal(
        "torch.jit.trace would keep one partition for ever; use torch.compile or torch.export", ("jit.trace",), ((),)
    ),
    Refusal(
        "Cannot copy out of meta tensor; no data!",
        ("built on meta",),
        (("performer",),),
        "torch_geometric computes a projection when its module is made: make it on a CPU.",
    ),
)

EAGER = "Run it without compiling."
WRAPPED = (
    "torch.compile cannot trace chunk_batches, or several rounds in training, of a wrapped module: leave them out, "
    "or compile without fullgraph=True"
)
COMPILED = (
    Refusal(
        "torch.compile cannot trace an observer or a tolerance; run them without it",
        ("compile*", "export*"),
        (("op", "tolerance"),),
    ),
    Refusal(
        "torch.compile cannot trace random batches of several sets here",
        ("compile*", "export*"),
        (("wrapper", "padded"), ("performer",)),
        "Leave out `batch` and mask, or compile without `fullgraph=True`.",
    ),
    Refusal(
        WRAPPED,
        ("compile*", "export*"),
        (("wrapper", "chunks"),),
    ),
    Refusal(
        WRAPPED,
        ("compile", "compile, second derivative"),  # the other columns are in eval
        (("wrapper", "rounds"),),
    ),
    Refusal(
        "Unsupported input type <class 'randbatch.partition.partition.Partition'>",
        ("export*",),
        (("partition",),),
        "Draw it inside of what is exported.",
    ),
    Refusal(
        "assume_constant_result argument conversion failed",
        ("compile, dynamic",),
        (("op",),),
        "The size of heads must be a number: mark the tokens alone, by `torch._dynamo.mark_dynamic(x, 0)`.",
        frozenset({"full", "rounds", "corrected", "linear", "chunks", "graphs"}),
    ),
    Refusal(
        "lift_tracked_freevar_to_input should not be called on root",
        ("compile, dynamic",),
        (("full chunks",),),
        "Leave out `chunk_size`.",
    ),
    Refusal(
        "compiled with non-empty donated buffers which requires create_graph=False",
        ("compile, second derivative",),
        ((),),
        EAGER,
    ),
    Refusal(
        "Guard failed",
        ("export, dynamic N",),
        (("wrapper",), ("full",)),
        "The program holds for what its first N led to: export one for each N, or compile with `dynamic=True`.",
    ),
)

USE_EXPORT = "Use `torch.compile` or `torch.export`."
TRACERS = (
    Refusal("Could not cast value of type Optional[Tensor] to bool", ("jit.script",), (("local gat",),), USE_EXPORT),
    Refusal(
        "Expression of type dots cannot be used in a type expression", ("jit.script",), (("no attention",),), USE_EXPORT
    ),
    Refusal("Failed to get source for", ("jit.script",), (("bert",),), USE_EXPORT),
    Refusal(
        "Compiled functions can't take variable number of arguments or use keyword-only arguments with defaults",
        ("jit.script",),
        ((),),
        USE_EXPORT,
    ),
    Refusal("input to _none_or_dtype() must be None or torch.Tensor", ("fx",), (("encoder",),), USE_EXPORT),
    Refusal("'Proxy' object does not support item assignment", ("fx",), (("bert",),), USE_EXPORT),
    Refusal("Proxy object cannot be iterated", ("fx",), (("gps",), ("performer",), ("sdpa",)), USE_EXPORT),
    Refusal("torch.fx cannot trace random batches, use torch.export", ("fx",), ((),)),
)

REFUSALS = [*DRAWN, *DERIVATIVES, *OTHERS, *COMPILED, *TRACERS]
