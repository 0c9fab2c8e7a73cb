"""Every configuration of the Triton kernels becomes machine code for GPUs that are not here, without a spill."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from ahead import SHARED_MEMORY, Compiled, compile_for

KINDS = ("half", "tf32", "ieee")
MATMULS = {"forward_kernel", "grad_input_kernel", "grad_weight_kernel"}
TENSOR_CORE = {80: "mma", 90: "wgmma", 100: "tcgen05"}

# (kernel, case, capability, kind): why its spill is accepted
ACCEPTED: dict[tuple[str, str, int, str], str] = {}


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    jobs = [(capability, kind) for kind in KINDS for capability in SHARED_MEMORY]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return [kernel for found in pool.map(compile_for, *zip(*jobs, strict=True)) for kernel in found]


def test_every_kernel_is_compiled_for_every_generation_and_precision(compiled):
    kernels = {"grad_preact_kernel", "statistics_kernel", "norm_backward_kernel", *MATMULS}
    for capability in SHARED_MEMORY:
        for kind in KINDS:
            assert {c.kernel for c in compiled if (c.capability, c.kind) == (capability, kind)} == kernels


def test_no_kernel_spills_registers(compiled):
    spilled = {(c.kernel, c.case, c.capability, c.kind): c for c in compiled if c.spilled}
    assert not [c for key, c in spilled.items() if key not in ACCEPTED]
    assert not ACCEPTED.keys() - spilled.keys(), "no longer needed"


def test_every_kernel_fits_into_shared_memory(compiled):
    assert not [c for c in compiled if c.shared > SHARED_MEMORY[c.capability]]


def test_matrix_products_run_on_tensor_cores_and_exact_float32_does_not(compiled):
    for c in compiled:
        if c.kernel in MATMULS:
            assert c.instructions == (set() if c.kind == "ieee" else {TENSOR_CORE[c.capability]}), c
