"""The configuration of CHERRY language models, see modeling_cherry.py."""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class CherryConfig(PretrainedConfig):
    """Sizes, and how layers are walked; keys with their defaults."""

    model_type = "cherry"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    KEYS: ClassVar[dict[str, Any]] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        # The stored layers, each as its sublayers.
        "prelude": (),
        "core": ("*-",),
        "coda": (),
        "loops": 1,  # how often the core is walked unless `forward` is told otherwise
        "stored_loops": 1,  # of how many loops there are weights; further loops use the last one's
        "order": "cycle",  # the core from front to back each time; `sequence`: each layer all its times
        "injection": "none",  # `add`: the prelude's output, to the state before every loop but the first
        "loop_scales": False,  # vectors of each loop on the core's norms and outputs
        "loop_rank": 0,  # of what each loop adds to the core's linear layers
        "loop_routers": False,  # routers of each loop
        "gated": True,  # MLPs and experts have a gate (SwiGLU)
        "hidden_act": "silu",
        # Of the sublayers `E`.
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "moe_intermediate_size": 0,
        "router_pre_softmax": False,  # gates are a softmax over all experts, not over the chosen ones
        "router_dtype": "float32",  # in which logits of routers are computed; None: as the weights
        "mtp_depths": 0,  # layers that predict the tokens behind the next one
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }

    def __init__(self, **kwargs: Any) -> None:
        for key, default in self.KEYS.items():
            value = kwargs.pop(key, default)
            setattr(self, key, list(value) if isinstance(value, tuple) else value)
        # As many as generation keeps keys and values of.
        kwargs["num_hidden_layers"] = sum("*" in self.layers[layer] for layer, _ in self.walk(self.loops))
        kwargs["tie_word_embeddings"] = self.tie_word_embeddings  # the default differs between releases
        super().__init__(**kwargs)

    @property
    def layers(self) -> list[str]:
        """The stored layers."""
        return [*self.prelude, *self.core, *self.coda]

    def walk(self, loops: int) -> list[tuple[int, int | None]]:
        """The stored layer and the loop of each effective layer, in order; the loop is None outside the core."""
        first, last = len(self.prelude), len(self.prelude) + len(self.core)
        if self.order == "cycle":
            core = [(layer, loop) for loop in range(loops) for layer in range(first, last)]
        else:
            core = [(layer, loop) for layer in range(first, last) for loop in range(loops)]
        before, after = range(first), range(last, len(self.layers))
        return [*((layer, None) for layer in before), *core, *((layer, None) for layer in after)]
