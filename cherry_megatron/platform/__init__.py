"""What differs between machines is decided here: GPU or CPU, Transformer Engine or local layers.

This package is the only place in the project that changes another library's objects.
"""
