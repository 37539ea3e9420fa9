"""Access to the blocks of CLIP's transformers, and to the linear maps inside a block.

This is the only file that depends on the insides of open_clip's, timm's and Hugging Face's modules. Finetuning methods
such as LoRA find blocks by `tower_blocks`, and their weights by `Block.linears`; video towers that run CLIP's image
tower block by block use `vision_view`. Nothing here adds or changes modules, and parameters keep their names. timm,
whose import takes a while, is imported where a model has a tower of it.
"""

# Modules of open_clip and timm are Any here: what they return has no type.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import open_clip.transformer as oc
import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from adaclip_finetune.errors import UserError
from adaclip_finetune.weights.loaded import text_tower

TowerName = Literal["image", "text"]
TOWER_NAMES: tuple[TowerName, ...] = ("image", "text")
Role = Literal["q", "k", "v", "out", "fc", "proj"]
ROLES: tuple[Role, ...] = ("q", "k", "v", "out", "fc", "proj")

QKV = tuple[Tensor, Tensor, Tensor]


class Linear(NamedTuple):
    """A linear map inside a block: rows `start` to `stop` of the parameter `weight` of `module`.

    `bias` names the parameter of the same module whose elements `start` to `stop` are the map's bias; it is None if
    that module has no bias (EVA-01 keeps the biases of a fused q and v elsewhere). Several maps may be rows of one
    parameter, such as q, k and v of `in_proj_weight`: `(module, weight)` identifies the parameter.
    """

    module: nn.Module
    weight: str
    bias: str | None
    start: int
    stop: int

    def rows(self) -> Tensor:
        """Return the map's matrix (outputs, inputs), with any parametrization applied."""
        return getattr(self.module, self.weight)[self.start : self.stop]


class Block(ABC):
    """A transformer block, the module `module`: attention, then an MLP."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @abstractmethod
    def linears(self) -> dict[Role, list[Linear]]:
        """Return the block's linear maps by role: one a role, but two for the `fc` of an MLP with a separate gate."""

    @abstractmethod
    def add_to_mlp(self, network: nn.Module, parallel: bool) -> None:
        """Add network(x) to the output of the MLP from now on: x is that output, or the MLP's input if `parallel`.

        The caller makes the network a part of some module, or it would not be trained.
        """


class OpenBlock(Block):
    """A block that can also be computed in pieces: x + attention, then + MLP.

    The pieces together equal the whole block (except for dropout inside attention, which no CLIP uses):

        q, k, v = block.qkv(x)
        x = x + block.attention_out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        x = x + block.mlp(x)                 # = block(x, mask)

    A mask is what `F.scaled_dot_product_attention` takes: numbers that are added, or booleans that are true where a
    token may attend; its shape is (L, L), or one that broadcasts to (n, heads, L, L).

    `positions`, (L) or (n, L), are the places of the tokens in the grid of patches, row by row from 0; −1 is a token
    without a place, such as a class token. Pass them if tokens were added, dropped or merged after `VisionView.place`.
    Only blocks with rotary position embeddings use them.
    """

    def __init__(self, module: Any, rotary_trunk: Any = None) -> None:
        super().__init__(module)
        self.heads: int = module.attn.num_heads
        self._rotary_trunk = rotary_trunk  # timm's trunk, where it has rotary position embeddings

    def add_to_mlp(self, network: nn.Module, parallel: bool) -> None:
        self.module.mlp.register_forward_hook(partial(_plus, network, parallel))

    @abstractmethod
    def qkv(self, x: Tensor, positions: Tensor | None = None) -> QKV:
        """Return q, k and v, each (n, heads, L, d), of tokens (n, L, W).

        The first norm, the projection, the norms of q and k and the rotary embedding are applied.
        """

    @abstractmethod
    def attention_out(self, values: Tensor) -> Tensor:
        """Return the residual branch of attention, (n, L, W), from attended values (n, heads, L, d)."""

    @abstractmethod
    def mlp(self, x: Tensor) -> Tensor:
        """Return the residual branch of the MLP, with its norm and layer scale: (n, L, W) → (n, L, W)."""

    @abstractmethod
    def __call__(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Run the whole block, by the module itself if possible: (n, L, W) → (n, L, W)."""


class VisionView(ABC):
    """The parts of a vision transformer. `place`, `norm`, all `blocks`, then `pool` give the tower's own output.

    `prefix` tokens (class token, registers) stand before the `grid` = (rows, columns) of patches; `width` is W.
    Gradient checkpointing is up to the caller: `set_grad_checkpointing` of the tower has no effect here.
    """

    blocks: list[OpenBlock]
    prefix: int
    grid: tuple[int, int]
    width: int

    @abstractmethod
    def place(self, pixels: Tensor) -> Tensor:
        """Return embedded tokens with their positions: (n, 3, S, S) → (n, L, W), L = prefix + rows · columns."""

    @abstractmethod
    def class_token(self) -> tuple[Tensor, Tensor] | None:
        """Return the class token and its position embedding, each (W); `place` adds them. None if a tower has none."""

    @abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """Return placed tokens normalised as the first block gets them; unchanged by towers without such a norm."""

    @abstractmethod
    def patch_positions(self) -> Tensor | None:
        """Return the learned positional embedding of the patches, (rows · columns, W), or None if there is none."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Return the image embeddings from the tokens that leave the last block: (n, L, W) → (n, D)."""


def vision_view(clip: nn.Module) -> VisionView:
    """Return the parts of an open_clip model's image tower. Raise UserError if it is not a vision transformer."""
    blocks = _vision_blocks(clip)
    visual: Any = clip.visual
    view: VisionView = _TimmView(visual, blocks) if isinstance(visual, TimmModel) else _OpenClipView(visual, blocks)
    drop = visual.trunk.patch_drop if isinstance(visual, TimmModel) else visual.patch_dropout
    if drop is not None and not isinstance(drop, nn.Identity):
        raise _refusal("image", visual, "it drops patches in training; build it with a patch dropout of 0")
    return view


def tower_blocks(clip: nn.Module, tower: TowerName) -> Sequence[Block]:
    """Return the blocks of a tower. Raise UserError for image towers that are no ViT, and unknown text towers.

    Of Hugging Face's text towers, those built like BERT are known, such as RoBERTa's.
    """
    if tower == "image":
        return _vision_blocks(clip)
    text = text_tower(clip)
    transformer = getattr(text, "transformer", None)
    if isinstance(transformer, oc.Transformer):
        return [_block("text", text, module) for module in transformer.resblocks]
    layers = getattr(getattr(transformer, "encoder", None), "layer", None)
    if layers is None or not all(hasattr(one, "intermediate") and hasattr(one.attention, "self") for one in layers):
        raise _refusal("text", text, "its blocks are neither open_clip's own nor those of a BERT")
    return [_BertBlock(module) for module in layers]


def compile_blocks(clip: nn.Module) -> None:
    """Have `torch.compile` compile each block when it first runs. Raise UserError as `tower_blocks`.

    Blocks of one structure share their code. Towers that compute blocks in pieces do not use it.
    """
    blocks = [block for tower in TOWER_NAMES for block in tower_blocks(clip, tower)]
    # All blocks have one `forward`, which is compiled for each class of block (with LoRA each has its own), with
    # gradients and without, for a fixed size and then for any.
    limit = 4 * len(blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for block in blocks:
        block.module.compile()


def tower_norms(clip: nn.Module, tower: TowerName) -> list[nn.LayerNorm]:
    """Return all layer norms of a tower that have a weight, inside its blocks and outside of them."""
    owner: nn.Module = clip.get_submodule("visual") if tower == "image" else text_tower(clip)
    return layer_norms(owner, without="visual.")


def tokens_before(clip: nn.Module, tower: TowerName) -> int:
    """Return how many tokens precede the patches of an image (class token, registers) or the words of a text."""
    if tower == "image":
        return vision_view(clip).prefix
    text = text_tower(clip)  # open_clip's own has a start token if it is causal
    return int(isinstance(text, HFTextEncoder) or isinstance(getattr(text, "attn_mask", None), Tensor))


def make_room(arguments: dict[str, Any], at: int, count: int) -> None:
    """Extend the attention mask and the rotary embedding among the arguments of a block for `count` tokens more.

    They stand at position `at`, behind all tokens of the prefix. Every token sees them; they see each other and what
    the token before them sees. They are not rotated.
    """
    name, rope = "attention_mask" if "attention_mask" in arguments else "attn_mask", arguments.get("rope")
    if (mask := arguments.get(name)) is not None:
        old = torch.arange(mask.shape[-1], device=mask.device)
        order = torch.cat([old[:at], torch.full_like(old[:1], max(at - 1, 0)).expand(count), old[at:]])
        rows = mask if mask.shape[-2] == 1 else mask[..., order, :]  # one row may stand for all
        arguments[name] = rows[..., order]
    if rope is not None:
        half = rope.shape[1] // 2  # sines, then cosines
        still = torch.cat([rope.new_zeros(count, half), rope.new_ones(count, half)], dim=1)
        arguments["rope"] = torch.cat([still, rope])


def layer_norms(module: nn.Module, without: str = "\0") -> list[nn.LayerNorm]:
    """Return the layer norms in a module that have a weight, but not those whose name starts with `without`."""
    return [
        part
        for name, part in module.named_modules()
        if isinstance(part, nn.LayerNorm) and part.weight is not None and not name.startswith(without)
    ]


def patch_embedding(clip: nn.Module) -> nn.Module:
    """Return the convolution of an image tower's patches, a module with `weight` and `bias` (which may be None)."""
    visual: Any = clip.visual
    return visual.trunk.patch_embed.proj if isinstance(visual, TimmModel) else visual.conv1


# Blocks


def _plus(network: nn.Module, parallel: bool, mlp: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    """Return the output of an MLP with that of the network: a forward hook of the MLP, or of its last layer."""
    return out + network(inputs[0] if parallel else out)


def _plus_residual(network: nn.Module, module: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the arguments of BERT's `output`, a hidden state and the MLP's input, which it adds: a hook before it."""
    hidden, x = inputs
    return hidden, x + network(x)


class _BertBlock(Block):
    """A layer of Hugging Face's BERT, or of a model built alike. It normalises the sums of input and branch."""

    def linears(self) -> dict[Role, list[Linear]]:
        attention = self.module.attention
        own = attention.self
        maps: dict[Role, Any] = {"q": own.query, "k": own.key, "v": own.value, "out": attention.output.dense}
        maps |= {"fc": self.module.intermediate.dense, "proj": self.module.output.dense}
        return {role: [_whole(linear)] for role, linear in maps.items()}

    def add_to_mlp(self, network: nn.Module, parallel: bool) -> None:
        output = self.module.output
        if parallel:
            output.register_forward_pre_hook(partial(_plus_residual, network))
        else:
            output.dense.register_forward_hook(partial(_plus, network, False))


class _OpenClipBlock(OpenBlock):
    """A block of open_clip's own transformers; its attention is PyTorch's, or open_clip's `Attention`."""

    def linears(self) -> dict[Role, list[Linear]]:
        attention = self.module.attn
        bias = None if attention.in_proj_bias is None else "in_proj_bias"
        q, k, v = _thirds(attention, "in_proj_weight", bias)
        return {"q": [q], "k": [k], "v": [v], "out": [_whole(attention.out_proj)], **_mlp_linears(self.module.mlp)}

    def qkv(self, x: Tensor, positions: Tensor | None = None) -> QKV:
        attention = self.module.attn
        fused = F.linear(self.module.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (_split_heads(part, self.heads) for part in fused.chunk(3, dim=-1))
        if isinstance(attention, oc.Attention):
            q, k = attention.ln_q(q), attention.ln_k(k)
        return q, k, v

    def attention_out(self, values: Tensor) -> Tensor:
        module, attention = self.module, self.module.attn
        if not isinstance(attention, oc.Attention):
            return module.ls_1(attention.out_proj(values.transpose(1, 2).flatten(2)))
        if attention.head_scale is not None:
            values = values * attention.head_scale
        out = attention.out_drop(attention.out_proj(attention.ln_inner(values.transpose(1, 2).flatten(2))))
        return module.ls_1(module.ln_attn(out))

    def mlp(self, x: Tensor) -> Tensor:
        return self.module.ls_2(self.module.mlp(self.module.ln_2(x)))

    def __call__(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, float("-inf"))
        if mask is not None and mask.dim() > 2:  # these modules take (L, L) or (n · heads, L, L)
            mask = mask.expand(len(x), self.heads, -1, -1).flatten(0, 1)
        return self.module(x, attn_mask=mask)


class _TimmBlock(OpenBlock):
    """A pre-norm block of timm."""

    def linears(self) -> dict[Role, list[Linear]]:
        attention = self.module.attn
        if attention.qkv is not None:
            q, k, v = _thirds(attention.qkv, "weight", "bias" if attention.qkv.bias is not None else None)
        else:
            q, k, v = (_whole(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        return {"q": [q], "k": [k], "v": [v], "out": [_whole(attention.proj)], **_mlp_linears(self.module.mlp)}

    def qkv(self, x: Tensor, positions: Tensor | None = None) -> QKV:
        attention, x = self.module.attn, self._before(1, x)
        parts: tuple[Tensor, ...]
        if attention.qkv is None:
            parts = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        elif getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            parts = F.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1)
        else:
            parts = attention.qkv(x).chunk(3, dim=-1)
        q, k, v = (_split_heads(part, self.heads) for part in parts)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if self._rotary_trunk is not None:
            from timm.layers.pos_embed_sincos import apply_rot_embed_cat

            angles = self._angles(positions)
            q, k = (apply_rot_embed_cat(part, angles, half=attention.rotate_half).type_as(v) for part in (q, k))
        return q, k, v

    def attention_out(self, values: Tensor) -> Tensor:
        attention = self.module.attn
        return self._after(1, attention.proj_drop(attention.proj(attention.norm(values.transpose(1, 2).flatten(2)))))

    def mlp(self, x: Tensor) -> Tensor:
        return self._after(2, self.module.mlp(self._before(2, x)))

    def __call__(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        if self._rotary_trunk is None:
            return self.module(x, attn_mask=mask)
        if positions is None:
            return self.module(x, rope=self._rotary_table(), attn_mask=mask)
        x = x + self.attention_out(F.scaled_dot_product_attention(*self.qkv(x, positions), attn_mask=mask))
        return x + self.mlp(x)

    def _before(self, branch: int, x: Tensor) -> Tensor:
        """Return the input of branch 1 (attention) or 2 (MLP)."""
        return getattr(self.module, f"norm{branch}")(x)

    def _after(self, branch: int, out: Tensor) -> Tensor:
        """Return what is added to the residual stream, from the output of the branch."""
        scale, drop = getattr(self.module, f"ls{branch}"), getattr(self.module, f"drop_path{branch}")
        return drop(scale(out))

    def _rotary_table(self) -> Tensor:
        """Return the rotary embedding of each patch, (rows · columns, 2d): sines, then cosines."""
        return self._rotary_trunk.rope.get_embed(shape=self._rotary_trunk.patch_embed.grid_size)

    def _angles(self, positions: Tensor | None) -> Tensor:
        """Return the rotary embedding of each token: (L, 2d), or (n, 1, L, 2d) for positions (n, L).

        A token at position −1 is not rotated (sine 0, cosine 1).
        """
        table = self._rotary_table()
        still = torch.zeros_like(table[:1])
        still[:, table.shape[1] // 2 :] = 1
        if positions is None:
            positions = torch.arange(-self._rotary_trunk.num_prefix_tokens, len(table), device=table.device).clamp(-1)
        angles = torch.cat([table, still])[positions]
        return angles if positions.dim() == 1 else angles.unsqueeze(1)


class _EvaBlock(_TimmBlock):
    """A pre-norm block of timm's `Eva`, whose layer scales are parameters of the block."""

    def _after(self, branch: int, out: Tensor) -> Tensor:
        scale, drop = getattr(self.module, f"gamma_{branch}"), getattr(self.module, f"drop_path{branch}")
        return drop(out if scale is None else scale * out)


class _PostNormBlock(_TimmBlock):
    """A block of timm that normalises the outputs of its branches instead of their inputs."""

    def _before(self, branch: int, x: Tensor) -> Tensor:
        return x

    def _after(self, branch: int, out: Tensor) -> Tensor:
        norm, drop = getattr(self.module, f"norm{branch}"), getattr(self.module, f"drop_path{branch}")
        return drop(norm(out))


class _Known(NamedTuple):
    """The classes of blocks that can be opened, and of the attention inside them."""

    blocks: Mapping[type[nn.Module], type[OpenBlock]]
    attentions: tuple[type[nn.Module], ...]


_OPEN_CLIP = _Known(
    {oc.ResidualAttentionBlock: _OpenClipBlock, oc.CustomResidualAttentionBlock: _OpenClipBlock},
    (nn.MultiheadAttention, oc.Attention),
)


def _of_timm() -> _Known:
    from timm.layers.attention import Attention, AttentionRope
    from timm.models import eva, vision_transformer

    blocks = {
        vision_transformer.Block: _TimmBlock,
        vision_transformer.ResPostBlock: _PostNormBlock,
        eva.EvaBlock: _EvaBlock,
        eva.EvaBlockPostNorm: _PostNormBlock,
    }
    return _Known(blocks, (Attention, AttentionRope, eva.EvaAttention))


# The names of the linear maps of MLPs: into it (two where one is a gate), and out of it.
_MLPS = ((("c_fc",), "c_proj"), (("fc1",), "fc2"), (("fc1_g", "fc1_x"), "fc2"), (("w0", "w1"), "w2"))


def _vision_blocks(clip: nn.Module) -> list[OpenBlock]:
    visual: Any = clip.visual
    if isinstance(visual, oc.VisionTransformer):
        return [_block("image", visual, module) for module in visual.transformer.resblocks]
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
    from timm.models import eva, vision_transformer

    trunk = visual.trunk if isinstance(visual, TimmModel) else None
    if not isinstance(trunk, vision_transformer.VisionTransformer | eva.Eva):
        raise _refusal("image", visual, "it is not a vision transformer of open_clip or timm")
    rope: Any = getattr(trunk, "rope", None)
    if rope is not None and not isinstance(rope, RotaryEmbeddingCat):
        raise _refusal("image", visual, f"its rotary embedding {type(rope).__name__} is not supported")
    return [_block("image", visual, module, None if rope is None else trunk) for module in trunk.blocks]


def _block(kind: str, tower: nn.Module, module: Any, rotary_trunk: Any = None) -> OpenBlock:
    """Return the module as an `OpenBlock`. Raise UserError for one that computes something else than its class says."""
    blocks, attentions = _of_timm() if isinstance(tower, TimmModel) else _OPEN_CLIP
    opened = next((opened for known, opened in blocks.items() if isinstance(module, known)), None)
    if opened is None:
        raise _refusal(kind, tower, f"its blocks, {type(module).__name__}, are not supported")
    attention = module.attn
    special = [name for name in ("gate", "logit_scale") if getattr(attention, name, None) is not None]
    if not isinstance(attention, attentions) or special or getattr(attention, "num_kv_groups", 1) > 1:
        named = " with ".join([type(attention).__name__, *special])
        raise _refusal(kind, tower, f"its attention, {named}, is not supported")
    return opened(module, rotary_trunk)


def _refusal(kind: str, tower: nn.Module, why: str) -> UserError:
    core = tower.trunk if isinstance(tower, TimmModel) else tower
    return UserError(
        f"The {kind} tower ({type(core).__name__}) cannot be opened: {why}. Choose another model, or a method or tower "
        f"that does not open the {kind} tower."
    )


def _thirds(module: Any, weight: str, bias: str | None) -> list[Linear]:
    third = getattr(module, weight).shape[0] // 3
    return [Linear(module, weight, bias, i * third, (i + 1) * third) for i in range(3)]


def _whole(linear: Any) -> Linear:
    return Linear(linear, "weight", None if linear.bias is None else "bias", 0, linear.out_features)


def _mlp_linears(mlp: Any) -> dict[Role, list[Linear]]:
    for inward, outward in _MLPS:
        if all(hasattr(mlp, name) for name in (*inward, outward)):
            return {"fc": [_whole(getattr(mlp, name)) for name in inward], "proj": [_whole(getattr(mlp, outward))]}
    raise UserError(f"The linear maps of MLPs of the class {type(mlp).__name__} are not known. Choose another model.")


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(n, L, heads · d) → (n, heads, L, d)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


# Whole image towers


class _OpenClipView(VisionView):
    """The view of open_clip's own `VisionTransformer`."""

    def __init__(self, visual: Any, blocks: list[OpenBlock]) -> None:
        self._visual = visual
        self.blocks, self.prefix, self.grid, self.width = blocks, 1, visual.grid_size, visual.transformer.width

    def place(self, pixels: Tensor) -> Tensor:
        visual = self._visual
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype)

    def class_token(self) -> tuple[Tensor, Tensor]:
        return self._visual.class_embedding, self._visual.positional_embedding[0]

    def norm(self, tokens: Tensor) -> Tensor:
        return self._visual.ln_pre(tokens)

    def patch_positions(self) -> Tensor:
        return self._visual.positional_embedding[1:]

    def pool(self, tokens: Tensor) -> Tensor:
        pooled = self._visual._pool(tokens)[0]
        return pooled if self._visual.proj is None else pooled @ self._visual.proj


class _TimmView(VisionView):
    """The view of open_clip's `TimmModel` around timm's `VisionTransformer` or `Eva`."""

    def __init__(self, visual: Any, blocks: list[OpenBlock]) -> None:
        self._visual, trunk = visual, visual.trunk
        self.blocks, self.prefix = blocks, trunk.num_prefix_tokens
        self.grid, self.width = tuple(trunk.patch_embed.grid_size), trunk.embed_dim

    def place(self, pixels: Tensor) -> Tensor:
        trunk = self._visual.trunk
        placed = trunk._pos_embed(trunk.patch_embed(pixels))
        return placed[0] if isinstance(placed, tuple) else placed

    def class_token(self) -> tuple[Tensor, Tensor] | None:
        trunk = self._visual.trunk
        if trunk.cls_token is None:
            return None
        token = trunk.cls_token[0, 0]
        has_position = trunk.pos_embed is not None and not trunk.no_embed_class
        return token, trunk.pos_embed[0, 0] if has_position else torch.zeros_like(token)

    def norm(self, tokens: Tensor) -> Tensor:
        return self._visual.trunk.norm_pre(tokens)

    def patch_positions(self) -> Tensor | None:
        positions = self._visual.trunk.pos_embed
        return None if positions is None else positions[0, -self.grid[0] * self.grid[1] :]

    def pool(self, tokens: Tensor) -> Tensor:
        trunk = self._visual.trunk
        return self._visual.head(trunk.forward_head(trunk.norm(tokens)))
