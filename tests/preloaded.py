"""Imported by the process that all test ranks are forked from: what each would do anew is done once."""

import gc
from typing import Any

import transformers.models.auto.tokenization_auto  # noqa: F401
from megatron.training.argument_utils import ArgumentGroupFactory

from cherry_megatron import flags

_read = ArgumentGroupFactory._get_field_docstrings
_known: dict[type, dict[str, str]] = {}


def _read_once(factory: Any, options: type) -> dict[str, str]:
    if options not in _known:
        _known[options] = _read(factory, options)
    return _known[options]


# The help of Megatron's flags, parsed from its source whenever it makes a parser: a seventh of a tiny training.
ArgumentGroupFactory._get_field_docstrings = _read_once
flags.parse_flags([])
# Megatron collects garbage before a training: not all modules again.
gc.collect()
gc.freeze()
