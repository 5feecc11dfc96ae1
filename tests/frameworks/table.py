"""The one table: which cell is refused, by what sentence; every other cell is "yes". The page is written from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from refusals import REFUSALS, Refusal
from subjects import CONVERTED, FULL, LAYER, MODEL, OP, WRAPPER, Subject, subjects

MODULES = (LAYER, WRAPPER, MODEL, CONVERTED)
ALL = (OP, FULL, *MODULES)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: what was compared with what.
        columns: capabilities, by name, and what is done.
        groups: whose rows it has.
        only: which of these.
    """

    title: str
    text: str
    columns: dict[str, str]
    groups: tuple[str, ...] = ALL
    only: Callable[[Subject], bool] = lambda subject: True

    def rows(self) -> list[str]:
        return [key for key, row in subjects().items() if row.group in self.groups and self.only(row)]


def _has_sizes(subject: Subject) -> bool:
    traits = subject.traits
    merged = "rounds" in traits and traits & {"debiased", "dropout", "padded"}
    alike = merged or traits & {"corrected", "linear", "chunks"}
    if (subject.group == LAYER and alike) or (subject.group == MODEL and "local sage" not in traits):
        return False
    return subject.backend is None and "inner TransformerEncoderLayer" not in traits


SECTIONS = {
    "derivatives": Section(
        "Derivatives and transforms",
        "In train and in eval, with the same random batches on both sides. First and second derivatives are those of "
        "central differences in float64 with the formula in plain torch; those of each sample are those of a loop.",
        {
            "gradient": "`.backward()` by inputs and parameters",
            "no gradient": "a function behind the module has no gradient to hand back",
            "hvp": "second derivative, `create_graph=True`, by inputs and parameters",
            "gradgradcheck": "`torch.autograd.gradgradcheck` in float64",
            "MAML step": "differentiating through a step of gradient descent",
            "func.jvp": "`torch.func.jvp`",
            "dual numbers": "`torch.autograd.forward_ad.dual_level`",
            "functional_call": "`torch.func.functional_call` and `.backward()`",
            "func.grad": "`torch.func.grad` over `functional_call`",
            "vmap, eval": "`torch.func.vmap` over inputs",
            "vmap(grad), eval": "the gradient of each sample",
            "vmap(grad), train, same": "the same in training with `randomness='same'`: one partition for all samples",
            "vmap(grad), train, different": "with `randomness='different'`",
            "vmap(grad), train, error": "with `randomness='error'`, torch's default",
        },
    ),
    "memory": Section(
        "Memory",
        "In train (with dropout where the row has it) and in eval. Output, gradients and the state of the random "
        "generator are those of a call without.",
        {
            "checkpoint": "`torch.utils.checkpoint`, `use_reentrant=False`",
            "reentrant checkpoint": "`use_reentrant=True`",
            "save_on_cpu": "`torch.autograd.graph.save_on_cpu`",
            "backward twice": "`retain_graph=True`, and backward again",
        },
    ),
    "weights": Section(
        "Weights that are not plain parameters",
        "In train and in eval. Gradients are those of the plain module in float64 that has the weights these come to.",
        {
            "hypernetwork": "`del m.weight; m.weight = computed`",
            "parametrize": "`torch.nn.utils.parametrize`",
            "parametrize.cached": "forward inside `parametrize.cached()`",
            "cached, backward inside": "forward and backward inside",
            "weight_norm": "`torch.nn.utils.parametrizations.weight_norm`",
            "old weight_norm": "`torch.nn.utils.weight_norm`",
            "spectral_norm": "`torch.nn.utils.parametrizations.spectral_norm`",
            "prune": "`torch.nn.utils.prune`",
            "tied weights": "two modules with one set of weights",
            "frozen weights": "some with `requires_grad=False`",
            "eval() before backward": "`.train()` or `.eval()` between forward and backward",
        },
        MODULES,
    ),
    "distributed": Section(
        "Several processes",
        "Two processes by gloo, each with data of its own, in training. Gradients are their mean in one process.",
        {
            "DDP": "`DistributedDataParallel`",
            "fully_shard": "`torch.distributed.fsdp.fully_shard` of the module",
            "fully_shard inside": "of every child, then of the module",
        },
        MODULES,
    ),
    "compiled": Section(
        "Compile and export",
        "Backend `aot_eager`, so that the numbers can be compared; output and gradients are those of eager code from "
        "the same seed. GraphTransformer gets `prepare_edges(..., sparse=False)`. Triton, interpreted on a CPU, has no "
        "row.",
        {
            "compile": "`torch.compile(fullgraph=True)` in training; ten new tensors, one compilation",
            "compile, second derivative": "`create_graph=True` through that",
            "export": "`torch.export.export`, in eval",
        },
        only=lambda subject: "backend triton" not in subject.traits,
    ),
    "sizes": Section(
        "Compile and export for any number of tokens",
        "In eval, for ten numbers of tokens. What the layer computes in one operator that the compiler does not look "
        "into is the same program whatever the options, and has three rows: several rounds, `batch`, padded sets. "
        "GraphTransformer, which is that layer and a convolution, has one. What takes half a minute to compile for any "
        "number of tokens has none: the formula in plain torch in place of a kernel, and torch's encoder layer inside "
        "`RandomBatch`.",
        {
            "compile, dynamic": "`torch.compile(fullgraph=True, dynamic=True)`; at most four compilations",
            "export, dynamic N": "`torch.export.export` with a dynamic dimension",
        },
        only=_has_sizes,
    ),
    "copies": Section(
        "Copies",
        "In eval: a copy computes the same numbers.",
        {
            "deepcopy": "`copy.deepcopy`",
            "pickle": "`pickle` into a process that has not seen the module",
        },
        MODULES,
    ),
    "state": Section(
        "State",
        "Every weight is there under the same name; in one batch, softmax attention is torch's.",
        {"state_dict of MultiheadAttention": "`load_state_dict` from `torch.nn.MultiheadAttention`, and into it"},
        (LAYER,),
    ),
    "precision": Section(
        "Precision",
        "In train and in eval. Under autocast the output has the dtype of torch's own module (`MultiheadAttention`, "
        "`scaled_dot_product_attention`, the module before it was converted); numbers are those of float32 to the "
        "rounding of the dtype, and gradients are finite.",
        {
            "autocast bf16": "backward inside of the context, and outside",
            "autocast fp16": "the same",
            "autocast, mixed dtypes": "an input that is bf16 already",
            ".to(bf16)": "weights and inputs",
            ".to(fp16)": "weights and inputs",
            ".double()": "weights and inputs",
        },
    ),
    "shapes": Section(
        "Shapes and types",
        "Shape and dtype of the output, and a backward pass, without numbers; elsewhere the same numbers.",
        {
            "meta tensors": "on the meta device",
            "FakeTensorMode": "as exporters and memory planners run a module",
            "np.int64": "where an int is taken",
        },
    ),
    "tracers": Section(
        "Other tracers",
        "A traced program would keep one partition for ever.",
        {
            "jit.trace": "`torch.jit.trace`",
            "jit.script": "`torch.jit.script`",
            "fx": "`torch.fx.symbolic_trace`",
        },
    ),
    "construction": Section(
        "Construction",
        "A module built on the meta device, given memory and weights afterwards, is the module built on a CPU.",
        {"built on meta": "`with torch.device('meta')`"},
        MODULES,
    ),
    "surroundings": Section(
        "What else goes on in a process",
        "In training. Output and gradients are those of a call without.",
        {
            "inference_mode first": "a call, a partition or `prepare_edges` under `inference_mode`, then training",
            "set_num_threads between": "`torch.set_num_threads` between forward and backward",
            "detect_anomaly": "`torch.autograd.set_detect_anomaly`",
            "deterministic algorithms": "`torch.use_deterministic_algorithms`",
            "default dtype float64": "`torch.set_default_dtype` around float32",
            "no_grad, inference_mode": "the output of a call that records",
            "strides": "inputs and gradients that are not contiguous",
        },
    ),
    "hooks": Section(
        "Hooks",
        "In train and in eval.",
        {
            "forward hook": "forward hooks and forward pre-hooks of the module",
            "backward hook": "full backward hooks of the module: called once, with the gradient of the output",
        },
        MODULES,
    ),
    "projection": Section(
        "The output projection",
        "Of every `RandomBatchAttention` in the row: what is hooked or replaced is called.",
        {
            "out_proj: hook": "a forward hook",
            "out_proj: backward hook": "a full backward hook that changes the gradient",
            "out_proj: forward replaced": "`out_proj.forward = ...`",
            "out_proj: replaced": "another module in its place, as low-rank adapters do",
        },
        (LAYER, MODEL, CONVERTED),
        lambda subject: bool(subject.traits & {"mha"}),
    ),
}


def expected(section: Section, subject: Subject, column: str) -> Refusal | None:
    """What refuses a cell; None is "yes"."""
    for refusal in REFUSALS:
        wanted = any(fnmatchcase(column, pattern) for pattern in refusal.columns)
        if (
            wanted
            and any(set(traits) <= subject.traits for traits in refusal.rows)
            and not (refusal.unless & subject.traits)
        ):
            return refusal
    return None
