"""Benchmarks of otkern beside its peers and the hardware's floor: ``python -m benchmarks --help``.

``cases`` says what is measured, ``methods`` who is, ``worker`` measures one case in a process of its own, ``sweep``
goes through a suite, and ``report``, ``plots`` and ``compare`` read what it wrote (``record``). Only otkern's public
functions are used.
"""
