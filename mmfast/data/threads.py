"""Threads that decode beside a training step."""

import ctypes

import torch


def work_alone() -> None:
    """Make PyTorch's operations in the calling thread use this thread only.

    Otherwise each thread that decodes gets OpenMP workers of its own. As soon as a process has more of those
    than the machine has cores, GNU's OpenMP puts all of them to sleep between operations, also while the
    decoding threads are idle: 1600 waits a step instead of 50, and steps a quarter slower on two cores.
    """
    torch.get_num_threads()  # a thread takes over torch.set_num_threads when it first asks: before, not after
    openmp = ctypes.CDLL(torch._C.__file__)  # what torch itself is linked with
    if hasattr(openmp, "omp_set_num_threads"):
        openmp.omp_set_num_threads(1)  # of this thread; torch.set_num_threads would be for later threads too
