"""The suite; what is done here is done in the processes that it starts, too."""

from core_kernels.engine import interpreting

if interpreting():
    from tests import interpreter

    interpreter.save_time()
