"""`cherry plan`: which layout trains a configuration fastest on so many GPUs, what it needs and how long it takes.

hardware.py  what a GPU and its links could do       coefficients.py  what was measured of it
job.py       what a configuration asks for           candidates.py    the layouts that its rules allow
rates.py     seconds of one operation                walk.py          of a sublayer, forward and backward
step.py      of a training step                      memory.py        bytes of a rank
choice.py    the best layout, and why not others     tables.py        what is printed; scale.py over many GPUs
"""
