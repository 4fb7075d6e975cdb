"""The recurrent CHERRY model as a Megatron-core spec. Knows dataclasses, not training arguments."""
