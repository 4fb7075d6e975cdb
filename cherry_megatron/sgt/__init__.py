"""SGT, selective ground-truth token training.

selection/  which tokens are supervised, chosen before training     options.py  the configuration's section
loss.py     the weighted loss of a micro-batch                      online.py   the highest losses of a batch
probe.py    the coupling of the gradients
"""
