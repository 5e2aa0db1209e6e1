"""Runs the PTX that Triton compiles from this package's kernels, on a CPU, and compares it with the reference.

Triton's interpreter runs the kernels' Python source; here the compiled code runs. It is a call of its own, since the
kernels must be decorated without TRITON_INTERPRET: ``OTKERN_TEST_PTX=1 python -m pytest tests/ptx``.

    parse.py         the text of one entry as instructions, labels and register widths
    instructions.py  one function over numpy arrays for each instruction form; an unknown form is an error
    arithmetic.py    fused multiply-add with one rounding, minima and maxima with NaN and signed zeros
    memory.py        global and shared memory with bounds and alignment
    machine.py       lanes in lockstep, divergence, barriers
    driver.py        the driver object through which Triton launches
"""
