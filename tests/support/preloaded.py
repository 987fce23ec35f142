"""What every test process needs, imported once: ranks are forked from a server that has it.

Compiling makes millions of short-lived objects, and a collection looks through all that is alive. What was imported
stays, so it need not be looked through; and of young objects there may be more before a collection pays.
"""

import gc

import graphopt  # noqa: F401
import tests.support.zoo  # noqa: F401

gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 20)
