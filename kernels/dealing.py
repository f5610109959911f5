"""Dealing units of work out evenly to a kernel's programs (stream-K, arXiv:2301.03598): program p has the units from
p * total // programs up to the next one's.
"""

from __future__ import annotations

from headrace.kernels.optional_triton import tl, triton


@triton.jit
def share_of(program, programs, total):
    """The first unit of a program, the end of its units, and how many programs have any."""
    programs = tl.minimum(programs, total)
    dealt = tl.maximum(programs, 1)
    return tl.minimum(program * total // dealt, total), tl.minimum((program + 1) * total // dealt, total), programs


@triton.jit
def owner(unit, programs, total):
    """The program that has a unit."""
    return ((unit + 1) * programs - 1) // total
