"""Selective supervision (SGT): which tokens of a data set carry meaning, chosen before training.

tokens.py    an indexed data set in pieces of whole documents, and the text of its tokens
selectors.py the interface, and the selector `random`
segments.py  text -> words with category and character span     triggers.py  the editable lists
semantic.py  `semantic`: words ranked by category and frequency
models.py    `top-loss`, `excess-loss`, `entropy`: scores of a checkpoint
scratch.py   PREFIX.NAME.parts/, from which a killed run goes on
cut.py       scores -> exactly so many tokens                   select.py    one run of `cherry select`
"""
