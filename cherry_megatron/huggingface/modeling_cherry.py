"""CHERRY language models (arXiv 2606.31796): some of a few stored layers, the core, are walked several times.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Plain PyTorch in the frame of transformers 5; sizes and the walk over the layers are in configuration_cherry.py. A
*layer* is an attention (`*`) with the feed-forward sublayers behind it: an MLP (`-`) or a mixture of experts (`E`).
`forward` and `generate` take `loops`, how often the core is walked.
Shapes: b texts, s tokens, h hidden, v vocabulary, d channels of a head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_cherry import CherryConfig

# What transformers calls kept keys and values in its outputs; it has renamed them within release 5.
CACHE = "cache" if any(f.name == "cache" for f in dataclasses.fields(CausalLMOutputWithPast)) else "past_key_values"


def kept(cache: Cache | None) -> dict[str, Any]:
    """A cache among the outputs, by its name there."""
    return {CACHE: cache}


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": gelu, "relu2": squared_relu}


class CherryNorm(nn.Module):
    """Root mean square norm, its weight scaled by a vector of each loop if there are some."""

    def __init__(self, config: CherryConfig, loops: int = 0) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.loop_scale = nn.Parameter(torch.ones(loops, config.hidden_size)) if loops else None

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:
        weight = self.weight if self.loop_scale is None else self.weight * self.loop_scale[loop]
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Correction(nn.Module):
    """What loop l adds to a linear layer's output: B_l A_l x."""

    def __init__(self, config: CherryConfig, loops: int, inputs: int, outputs: int, parts: int = 1) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(loops, config.loop_rank, inputs))
        self.b = nn.Parameter(torch.zeros(loops, parts, outputs // parts, config.loop_rank))

    def forward(self, x: Tensor, loop: int) -> Tensor:
        return F.linear(F.linear(x, self.a[loop]), self.b[loop].flatten(0, 1))


class Sublayer(nn.Module):
    """A norm, what follows it, and the residual connection; `loops` of the core, 0 outside it."""

    def __init__(self, config: CherryConfig, loops: int) -> None:
        super().__init__()
        self.config, self.rank = config, config.loop_rank if loops else 0
        self.norm = CherryNorm(config, loops if config.loop_scales else 0)
        scaled = loops and config.loop_scales
        self.output_scale = nn.Parameter(torch.ones(loops, config.hidden_size)) if scaled else None

    def forward(self, x: Tensor, loop: int, slot: int, **context: Any) -> Tensor:
        output = self.mix(self.norm(x, loop), loop, slot, **context)
        return x + (output if self.output_scale is None else output * self.output_scale[loop])

    def mix(self, x: Tensor, loop: int, slot: int, **context: Any) -> Tensor:
        raise NotImplementedError


class Attention(Sublayer):
    """Causal attention with rotary positions. Rows of `qkv_proj`: of each group its queries, key and value."""

    def __init__(self, config: CherryConfig, loops: int) -> None:
        super().__init__(config, loops)
        self.groups, self.d = config.num_key_value_heads, config.head_dim
        self.heads, h = config.num_attention_heads, config.hidden_size
        rows = (self.heads + 2 * self.groups) * self.d
        self.qkv_proj = nn.Linear(h, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * self.d, h, bias=False)
        if self.rank:
            self.qkv_loops = Correction(config, loops, h, rows)
            self.o_loops = Correction(config, loops, self.heads * self.d, h)

    def mix(self, x: Tensor, loop: int, slot: int, **context: Any) -> Tensor:
        qkv = self.qkv_proj(x)
        if self.rank:
            qkv = qkv + self.qkv_loops(x, loop)
        qkv = qkv.view(*x.shape[:2], self.groups, -1, self.d)  # [b, s, groups, queries + 2, d]
        query = rotate(qkv[:, :, :, :-2].flatten(2, 3).transpose(1, 2), context["angles"])  # [b, heads, s, d]
        key, value = rotate(qkv[:, :, :, -2].transpose(1, 2), context["angles"]), qkv[:, :, :, -1].transpose(1, 2)
        if context["cache"] is not None:
            key, value = context["cache"].update(key, value, slot)
        mask = context["mask"]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1, enable_gqa=True
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        output = self.o_proj(mixed)
        return output + self.o_loops(mixed, loop) if self.rank else output


class MLP(Sublayer):
    """Rows of `up_proj`: the gate's, if there is one, then the others."""

    def __init__(self, config: CherryConfig, loops: int) -> None:
        super().__init__(config, loops)
        h, width, parts = config.hidden_size, config.intermediate_size, 2 if config.gated else 1
        self.up_proj = nn.Linear(h, parts * width, bias=False)
        self.down_proj = nn.Linear(width, h, bias=False)
        if self.rank:
            self.up_loops = Correction(config, loops, h, parts * width, parts)
            self.down_loops = Correction(config, loops, width, h)

    def mix(self, x: Tensor, loop: int, slot: int, **context: Any) -> Tensor:
        inner = self.up_proj(x)
        if self.rank:
            inner = inner + self.up_loops(x, loop)
        inner = activate(inner, self.config)
        output = self.down_proj(inner)
        return output + self.down_loops(inner, loop) if self.rank else output


class Experts(Sublayer):
    """Each token goes to its top k of the experts."""

    def __init__(self, config: CherryConfig, loops: int) -> None:
        super().__init__(config, loops)
        self.rank = 0
        count, h, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        of_loops = (loops,) if loops > 1 and config.loop_routers else ()
        self.router = nn.Parameter(torch.zeros(*of_loops, count, h))
        self.up_proj = nn.Parameter(torch.zeros(count, (2 if config.gated else 1) * width, h))
        self.down_proj = nn.Parameter(torch.zeros(count, h, width))

    def mix(self, x: Tensor, loop: int, slot: int, **context: Any) -> Tensor:
        tokens = x.flatten(0, 1)
        router = self.router[loop] if self.router.dim() == 3 else self.router
        dtype = getattr(torch, self.config.router_dtype) if self.config.router_dtype else x.dtype
        logits = F.linear(tokens.to(dtype), router.to(dtype))
        if self.config.router_pre_softmax:
            gates, chosen = logits.softmax(-1, torch.float32).topk(self.config.num_experts_per_tok)
        else:
            gates, chosen = logits.topk(self.config.num_experts_per_tok)
            gates = gates.softmax(-1, torch.float32)
        output = torch.zeros_like(tokens)
        for expert in range(len(self.up_proj)):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            inner = activate(F.linear(tokens[rows], self.up_proj[expert]), self.config)
            found = F.linear(inner, self.down_proj[expert]) * gates[rows, place, None]
            output.index_add_(0, rows, found.to(output.dtype))
        return output.view_as(x)


def activate(x: Tensor, config: CherryConfig) -> Tensor:
    if not config.gated:
        return ACTIVATIONS[config.hidden_act](x)
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[config.hidden_act](gate) * up


def angles_of(positions: Tensor, config: CherryConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, [b, 1, s, d] each; positions: [b, s]."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None, :, None].float() * (1.0 / config.rope_theta**half)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x: [b, heads, s, d]."""
    first, second = x.chunk(2, -1)
    return x * angles[0] + torch.cat((-second, first), -1) * angles[1]


SUBLAYERS: dict[str, type[Sublayer]] = {"*": Attention, "-": MLP, "E": Experts}


class CherryLayer(GradientCheckpointingLayer):
    """A stored layer."""

    def __init__(self, config: CherryConfig, symbols: str, loops: int) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList([SUBLAYERS[symbol](config, loops) for symbol in symbols])

    def forward(self, x: Tensor, loop: int, slot: int, **context: Any) -> Tensor:
        for sublayer in self.sublayers:
            x = sublayer(x, loop, slot, **context)
        return x


class Depth(nn.Module):
    """Predicts one token further on than what is before it, from its state and the token that lies between."""

    def __init__(self, config: CherryConfig) -> None:
        super().__init__()
        self.token_norm, self.state_norm, self.norm = (CherryNorm(config) for _ in range(3))
        self.join = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = CherryLayer(config, "*-", 0)

    def forward(self, states: Tensor, embedded: Tensor, **context: Any) -> Tensor:
        joined = torch.cat((self.token_norm(embedded), self.state_norm(states)), -1)
        return self.norm(self.layer(self.join(joined), 0, 0, **context))


class CherryPreTrainedModel(PreTrainedModel):
    config: CherryConfig
    config_class = CherryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CherryLayer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for weight in (module.router, module.up_proj, module.down_proj):
                nn.init.normal_(weight, std=self.config.initializer_range)
        if isinstance(module, Correction):
            nn.init.normal_(module.a, std=module.a.shape[-1] ** -0.5)


class CherryModel(CherryPreTrainedModel):
    def __init__(self, config: CherryConfig) -> None:
        super().__init__(config)
        core = range(len(config.prelude), len(config.prelude) + len(config.core))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [
                CherryLayer(config, symbols, config.stored_loops if number in core else 0)
                for number, symbols in enumerate(config.layers)
            ]
        )
        self.norm = CherryNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        loops: int | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """As Llama's, but for `loops`. attention_mask: [b, tokens so far], 0 on padding, or None."""
        cache = past_key_values if cache is None else cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache, cache = False, None  # walking a layer again would keep its keys twice
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        if loops is not None and loops < 1:
            raise ValueError(f"loops is {loops}; the core is walked once or more")
        walk = self.config.walk(self.config.loops if loops is None else loops)
        _make_room(cache, sum("*" in self.config.layers[layer] for layer, _ in walk))
        past = 0 if cache is None else cache.get_seq_length()
        positions = positions_of(x, attention_mask, past) if position_ids is None else position_ids
        context: dict[str, Any] = {
            "angles": angles_of(positions, self.config, x.dtype),
            "mask": mask_of(x, attention_mask, past),
            "cache": cache,
        }
        states, slot, injected = [x], 0, x
        for layer, loop in walk:
            if loop is not None and layer == len(self.config.prelude):
                if loop == 0:
                    injected = x
                elif self.config.injection == "add":
                    x = x + injected
            x = self.layers[layer](x, min(loop or 0, self.config.stored_loops - 1), slot, **context)
            slot += "*" in self.config.layers[layer]
            states.append(x)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), hidden_states=tuple(states) if wanted else None, **kept(cache)
        )


def _make_room(cache: Cache | None, slots: int) -> None:
    """`generate` makes a cache for the configuration's loops; more may be walked."""
    if cache is not None and cache.layers:
        cache.layers.extend(DynamicLayer() for _ in range(slots - len(cache.layers)))


def positions_of(x: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """Places of the new tokens in their texts, [b, s]; padding is none."""
    if attention_mask is None:
        return torch.arange(past, past + x.shape[1], device=x.device).expand(len(x), -1)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]


def mask_of(x: Tensor, attention_mask: Tensor | None, past: int) -> Tensor | None:
    """What each new token sees, [b, 1, s, past + s]; None: all before it and itself, where that is all there is."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    new = x.shape[1]
    if not padded and (past == 0 or new == 1):
        return None
    places = torch.arange(past + new, device=x.device)
    seen = places <= places[past:, None]
    if attention_mask is None or not padded:
        return seen.expand(len(x), 1, -1, -1)
    # A padding token sees itself, or it would be no number.
    return (seen & attention_mask.bool()[:, None, None, :]) | (places == places[past:, None])


class CherryForCausalLM(CherryPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CherryConfig) -> None:
        super().__init__(config)
        self.model = CherryModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList([Depth(config) for _ in range(config.mtp_depths)])
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loops: int | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, v], and with `labels` [b, s] the mean cross-entropy of the tokens that they name."""
        found = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, use_cache, loops, output_hidden_states,
            cache, past_key_values,
        )  # fmt: skip
        asked = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, asked])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=found.hidden_states, **kept(getattr(found, CACHE))
        )

    def predict_ahead(self, input_ids: Tensor, loops: int | None = None) -> list[Tensor]:
        """Logits of each depth of multi-token prediction; depth n's [b, s - n, v] at t are of token t + n + 1."""
        states, found = self.model(input_ids, use_cache=False, loops=loops).last_hidden_state, []
        for number, depth in enumerate(self.mtp, start=1):
            embedded = self.model.embed_tokens(input_ids[:, number:])
            positions = positions_of(embedded, None, 0)
            angles = angles_of(positions, self.config, embedded.dtype)
            states = depth(states[:, :-1], embedded, angles=angles, mask=None, cache=None)
            found.append(self.lm_head(states))
        return found
