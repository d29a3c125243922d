"""How are the projections of nn.MultiheadAttention rounded? As the linear layers that they are.

The module holds the weights of q, k and v as parameters of its own and calls none of its layers,
so that no hook sees a projection's input. Opened, it computes the same with four linear layers,

    q = W_q x + b_q,    k = W_k y + b_k,    v = W_v z + b_v,    out = W_o attention(q, k, v) + b_o

and closed again it is what it was, with the weights that the layers have by then.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlhelpers.quantization.batches import Batch, Outputs, run_float

__all__ = [
    "PADDING",
    "close_attention_",
    "open_attention_",
    "part_of_attention",
    "run_reference",
    "take_slow_paths_",
]

PADDING = (
    "where src_key_padding_mask is True, nn.TransformerEncoder gives what it gives in training "
    "mode, not the zeros of its fast path: ignore those positions, or set them to zero"
)
"""What the report says of encoders that were given a padding mask."""
_PLACES = ("q", "k", "v")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class _OpenAttention(nn.MultiheadAttention):
    """Attention whose projections are the layers ``in_proj.q``, ``.k``, ``.v`` and ``out_proj``."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what ``nn.MultiheadAttention`` returns."""
        given = zip(_PLACES, (query, key, value), strict=True)
        parts = [self.in_proj[place](x) for place, x in given]
        turned = self.batch_first and query.dim() == 3
        q, k, v = (x.transpose(0, 1) for x in parts) if turned else parts
        same = torch.eye(self.embed_dim, dtype=q.dtype, device=q.device)
        attended, weights = F.multi_head_attention_forward(
            q,
            k,
            v,
            self.embed_dim,
            self.num_heads,
            None,
            None,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            same,  # a product with it is exact
            None,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=same,
            k_proj_weight=same,
            v_proj_weight=same,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return self.out_proj(attended.transpose(0, 1) if turned else attended), weights


def open_attention_(model: nn.Module) -> nn.Module:
    """Let each ``nn.MultiheadAttention`` compute with four linear layers; return the model."""
    made: dict[tuple[int, ...], nn.ModuleDict] = {}
    for module in list(model.modules()):
        if type(module) is not nn.MultiheadAttention:
            continue
        own = [module.in_proj_weight, *(getattr(module, name) for name in _SEPARATE)]
        shared = tuple(map(id, (*own, module.in_proj_bias)))
        module.in_proj = made.setdefault(shared, _layers(module))
        for name in ("in_proj_weight", "in_proj_bias", *_SEPARATE):
            setattr(module, name, None)
        module.__class__ = _OpenAttention
    for module in model.modules():  # an encoder's fast path reads these weights
        if isinstance(module, nn.TransformerEncoder) and "_nested_before" not in vars(module):
            module._nested_before = getattr(module, "use_nested_tensor", False)
            module.use_nested_tensor = False
    return model


def _layers(module: nn.MultiheadAttention) -> nn.ModuleDict:
    whole, bias = module.in_proj_weight, module.in_proj_bias
    weights = [getattr(module, name) for name in _SEPARATE] if whole is None else whole.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    layers = nn.ModuleDict()
    for place, weight, one in zip(_PLACES, weights, biases, strict=True):
        layer = layers[place] = nn.utils.skip_init(nn.Linear, *weight.shape[::-1])
        layer.weight, layer.bias = _parameter(weight), one if one is None else _parameter(one)
        layer.train(module.training)
    return layers


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def close_attention_(model: nn.Module) -> nn.Module:
    """Make each opened attention an ``nn.MultiheadAttention`` again, in place; return the model."""
    made: dict[int, tuple[Any, ...]] = {}
    for module in list(model.modules()):
        if type(module) is not _OpenAttention:
            continue
        layers = [module.in_proj[place] for place in _PLACES]
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers]
        if id(module.in_proj) not in made:
            one = None if biases[0] is None else _parameter(torch.cat(biases))
            packed = _parameter(torch.cat(weights)) if module._qkv_same_embed_dim else None
            made[id(module.in_proj)] = packed, one, module.in_proj  # holds it, and its id
        module.in_proj_weight, module.in_proj_bias, _ = made[id(module.in_proj)]
        if not module._qkv_same_embed_dim:
            for name, weight in zip(_SEPARATE, weights, strict=True):
                setattr(module, name, weight)
        del module.in_proj
        module.__class__ = nn.MultiheadAttention
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and "_nested_before" in vars(module):
            module.use_nested_tensor = vars(module).pop("_nested_before")
    return model


def take_slow_paths_(model: nn.Module) -> list[nn.Module]:
    """Let torch's transformers call their layers, in place: their fast path reads weights.

    Returns:
        The encoders that used nested tensors, which hold nothing where a padding mask is True.
    """
    nested = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            if getattr(module, "use_nested_tensor", False):
                nested.append(module)
            module.use_nested_tensor = False
    return nested


def run_reference(model: nn.Module, batches: list[Batch]) -> tuple[list[Outputs], list[str]]:
    """Return what backends are compared with, and notes on it; the model takes the slow paths.

    An exported graph holds those, and they differ from the fast ones at padded positions.

    Raises:
        ValueError: as ``run_float``.
    """
    padded: list[bool] = []

    def watch(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = ("src", "mask", "src_key_padding_mask")
        named = {**dict(zip(names, given, strict=False)), **options}
        padded.append(named.get("mask") is None and named.get(names[2]) is not None)

    encoders = take_slow_paths_(model)
    hooks = [one.register_forward_pre_hook(watch, with_kwargs=True) for one in encoders]
    try:
        outputs = run_float(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, [PADDING] if any(padded) else []


def part_of_attention(model: nn.Module, name: str) -> str:
    """Return the name of the opened attention that a layer belongs to, else its own."""
    for end in (".out_proj", *(f".in_proj.{place}" for place in _PLACES)):
        owner = name.removesuffix(end)
        if owner != name and type(model.get_submodule(owner)) is _OpenAttention:
            return owner
    return name
