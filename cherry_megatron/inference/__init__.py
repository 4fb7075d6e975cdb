"""Text from a model: prompts as tokens, and their continuations."""
