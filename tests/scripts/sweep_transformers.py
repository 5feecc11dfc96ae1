"""Every model of transformers that can be made small: converted with one batch it gives what it gave, or is named.

    python tests/scripts/sweep_transformers.py [NAME ...] [--json FILE]

Each model type gets a small config, random weights and inputs. Then
`equal`: converted, random batches ran, and the outputs are those of the unconverted model;
`unused`: converted, but the inputs that were found here reach none of it;
`left`: nothing was converted, and every attention has a reason;
`none`: it holds nothing that looks like attention;
`-`: it could not be made small or given inputs here, so nothing is known;
`FAIL`: converted, and it raises, or gives something else, or a converted module never ran.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import randbatch as rb
from randbatch.nn import RandomBatchConfig
from randbatch.nn.config import config_of

ONE_BATCH = 10**6
SECONDS = 40
MOST_PARAMETERS = 40_000_000
# what each config calls its sizes; a list keeps its length
SMALL: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "embed_dim": 32, "dim": 32, "n_embd": 32, "projection_dim": 32, "width": 32,
    "encoder_hidden_size": 32, "decoder_hidden_size": 32, "embedding_size": 32, "emb_dim": 32, "hidden_dim": 32,
    "encoder_dim": 32, "d_embed": 32, "out_hidden_size": 32, "text_embed_dim": 32, "hidden_dims": 32,
    "num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "depth": 2, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "num_decoder_layers": 2,
    "encoder_num_layers": 2, "decoder_num_layers": 2, "num_encoder_layers": 2, "mlp_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "heads": 4,
    "decoder_attention_heads": 4, "attention_heads": 4, "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "d_kv": 8, "attention_head_dim": 8,
    "intermediate_size": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_ff": 64, "n_inner": 64, "ffn_dim": 64,
    "encoder_intermediate_size": 64, "mlp_dim": 64, "ffn_hidden_size": 64, "intermediate_dim": 64, "hidden_ff": 64,
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 99, "max_position_embeddings": 64, "max_source_positions": 64, "n_positions": 64,
    "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "num_conv_pos_embeddings": 16, "tubelet_size": [1, 8, 8],
    "conv_dim": [32, 32], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_conv_pos_embedding_groups": 2,
    "num_frames": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "max_window_layers": 1,
}  # fmt: skip


def sizes_of(config: Any) -> dict[str, Any]:
    """The arguments for a config of the same class with every size small, also inside."""
    names = {config.attribute_map.get(name, name): value for name, value in SMALL.items()}
    sizes: dict[str, Any] = {}
    staged = any(isinstance(vars(config).get(name), list) for name in ("num_heads", "depths", "hidden_sizes"))
    for name, value in names.items():
        before = vars(config).get(name)
        if before is None or isinstance(before, (bool, dict, str)) or (staged and name in ("embed_dim", "num_layers")):
            continue
        if isinstance(before, (list, tuple)) is isinstance(value, list):
            sizes[name] = type(before)(value) if isinstance(value, list) else value
    layer_types = vars(config).get("layer_types")
    if isinstance(layer_types, list):
        sizes["layer_types"] = layer_types[:2]
    for inner in config.sub_configs:
        if getattr(config, inner, None) is not None:
            sizes[inner] = sizes_of(getattr(config, inner))
            if hasattr(type(config), "sub_configs") and "model_type" in getattr(config, inner).to_dict():
                sizes[inner]["model_type"] = getattr(config, inner).model_type
    return sizes


def shrink(config: Any) -> Any:
    """The config with every size small, also inside: made anew, or else changed in place."""
    with contextlib.suppress(Exception):
        return type(config)(**sizes_of(config))
    for name, value in sizes_of(config).items():
        with contextlib.suppress(Exception):
            if name in config.sub_configs:
                setattr(config, name, shrink(getattr(config, name)))
            else:
                setattr(config, name, value)
    return config


def inputs_of(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs to try, by the names in the signature."""
    parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (3, 16), generator=generator)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    keep = (torch.arange(16) < torch.tensor([[16], [9], [12]])).long()

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    text: dict[str, Tensor] = {"input_ids": ids, "attention_mask": keep}
    text = {name: value for name, value in text.items() if name in parameters}
    if "decoder_input_ids" in parameters:
        text["decoder_input_ids"] = ids[:, :5]
    if "bbox" in parameters:
        text["bbox"] = torch.randint(0, 20, (3, 16, 4), generator=generator).sort(-1).values
    audio = {name: name in parameters for name in ("input_features", "input_values")}
    sizes = [32, 64, 224]
    if "pixel_values" in parameters:
        for size in sizes:
            for shape in ((2, 3, size, size), (2, 2, 3, size, size)):
                yield {
                    "pixel_values": random(*shape),
                    **({} if "input_ids" not in text else text | {k: v[:2] for k, v in text.items()}),
                }
                if "input_ids" not in parameters:
                    continue
                yield {"pixel_values": random(*shape)}
    if "pixel_values_videos" in parameters:
        yield {"pixel_values_videos": random(2, 2, 3, 32, 32)}
    if audio["input_features"]:
        more = {k: v for k, v in text.items() if k.startswith("decoder")}
        for shape in ((3, 16, 128), (3, 128, 16), (3, 40, 16), (3, 16, 80), (3, 80, 64), (3, 40, 80), (3, 40, 160)):
            yield {"input_features": random(*shape), **more}
    if audio["input_values"]:
        for shape in ((3, 400), (3, 4000), (3, 1, 800), (3, 16, 16), (3, 1024, 128)):
            yield {"input_values": random(*shape)}
    if text:
        yield text
        yield {name: value for name, value in text.items() if name != "attention_mask"}
    if "query_embeds" in parameters:
        yield {"query_embeds": random(3, 16, 32), "encoder_hidden_states": random(3, 16, 32)}
    if "grid_thw" in parameters:
        grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
        for width in (3 * 2 * 8 * 8, 3 * 8 * 8, 3 * 2 * 14 * 14):
            yield {list(parameters)[1]: random(24, width), "grid_thw": grid}
    yield {model.main_input_name: ids}
    yield {model.main_input_name: random(3, 16, 32)}


def tensors(out: Any) -> Iterator[Tensor]:
    """All floating-point tensors in what a model returned."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from tensors(value)
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from tensors(value)


def call(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the model returns, with padded rows left out, which mean nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        outs = list(tensors(model(**copy.deepcopy(inputs))))
    keep = inputs.get("attention_mask")
    if keep is None:
        return outs
    return [out[keep.bool()] if out.shape[:2] == keep.shape else out for out in outs]


def make(config_class: Any) -> tuple[Any, dict[str, Tensor]] | str:
    """A small model and inputs that it takes, or why there is none."""
    try:
        config = shrink(config_class())
        cls = MODEL_MAPPING[config_class]
        cls = cls[0] if isinstance(cls, tuple) else cls
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        if count > MOST_PARAMETERS:
            return f"{count:,} parameters"
        torch.manual_seed(0)
        model = cls(config).eval()
    except Exception as error:
        return f"cannot be made: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + parameter.data
    errors = []
    for dtype in (torch.float64, torch.float32):  # some make tensors in float32, whatever the model's dtype
        model = model.to(dtype)
        for inputs in inputs_of(model):
            try:
                if call(model, inputs):
                    return model, inputs
            except Exception as error:
                errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120])
    return f"no inputs: {errors[0] if errors else ''}"


def judge(model: Any, inputs: dict[str, Tensor]) -> tuple[str, list[str]]:
    """What converting does to the model, and the reasons or faults."""
    want = call(model, inputs)
    converted = copy.deepcopy(model)
    try:
        report = rb.convert(converted, ONE_BATCH)
    except ValueError as error:
        text = str(error)
        if "was left alone" not in text:
            return "none", [text]
        return "left", sorted({line.strip() for line in text.splitlines()[2:]})
    samplings = {id(found): path for path, module in converted.named_modules() if (found := config_of(module))}
    drawn: set[int] = set()
    entered: set[int] = set()
    for module in converted.modules():
        if config_of(module):
            module.register_forward_pre_hook(lambda module, _: entered.add(id(config_of(module))))
    draw = RandomBatchConfig.call

    def counted(self: RandomBatchConfig, *args: Any, **kwargs: Any) -> Any:
        drawn.add(id(self))
        return draw(self, *args, **kwargs)

    RandomBatchConfig.call = counted
    try:
        got = call(converted, inputs)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "FAIL", [f"{type(error).__name__}: {error} ({last.filename.split('/')[-1]}:{last.lineno})"[:400]]
    finally:
        RandomBatchConfig.call = draw
    reasons = sorted({f"{row.kind}: {row.reason}" for row in report.left_alone})
    silent = [path for key, path in samplings.items() if key in entered and key not in drawn]
    if silent:
        return "FAIL", [f"called, but without random batches: {silent[:3]}", *reasons]
    idle = [path for key, path in samplings.items() if key not in entered]
    rtol, atol = (1e-7, 1e-8) if model.dtype == torch.float64 else (1e-3, 1e-4)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    if any(getattr(config, "_attn_implementation", "") == "eager" for config in configs):
        rtol, atol = max(rtol, 1e-5), max(atol, 1e-6)  # eager softmax is in float32, whatever the model's dtype
    for a, b in zip(want, got, strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True):
            worst = "shapes" if a.shape != b.shape else f"{(a - b).abs().max():.2g}"
            return "FAIL", [f"another output, by {worst}", *reasons]
    report.undo()
    if any(not torch.equal(a, b) for a, b in zip(want, call(converted, inputs), strict=True) if not a.isnan().any()):
        return "FAIL", ["undo does not give back what was there"]
    kinds = Counter(row.kind for row in report.converted)
    return "equal" if drawn else "unused", [
        ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        *(f"idle: {p}" for p in idle[:1] if drawn),
        *reasons,
    ]


def _stop(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; default: all")
    parser.add_argument("--json", help="where to write the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _stop)
    rows: dict[str, tuple[str, list[str]]] = {}
    for name in options.names or list(CONFIG_MAPPING.keys()):
        signal.alarm(SECONDS)
        try:
            config_class = CONFIG_MAPPING[name]
            made = make(config_class) if config_class in MODEL_MAPPING else "no model of its own"
            rows[name] = ("-", [made]) if isinstance(made, str) else judge(*made)
        except Exception as error:
            rows[name] = ("-", [f"{type(error).__name__}: {error}"[:150]])
        signal.alarm(0)
        verdict, notes = rows[name]
        print(f"{verdict:6} {name:32} {'; '.join(notes)[:300]}", flush=True)
    print(dict(Counter(verdict for verdict, _ in rows.values())))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    return any(verdict == "FAIL" for verdict, _ in rows.values())


if __name__ == "__main__":
    sys.exit(main())
