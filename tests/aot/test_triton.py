"""Every configuration of the Triton kernels becomes machine code for GPUs that are not here, without a spill."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from ahead import SHARED_MEMORY, Compiled, compile_for

KINDS = ("half", "tf32", "ieee")
LINEAR = {"forward_kernel", "grad_input_kernel", "grad_weight_kernel"}
ATTENTION = {"forward_kernel", "grad_query_kernel", "grad_source_kernel"}
CONTRASTIVE = {"loss_kernel", "gradient_kernel"}
LOWRANK = {"product_kernel"}
TENSOR_CORE = {80: "mma", 90: "wgmma", 100: "tcgen05"}

# TF32's weight gradient would read a matrix the wrong way round, and on sm_100 its gradient of the sources spills then
DESCRIBED = {
    (90, "half"): LINEAR,
    (100, "half"): LINEAR,
    (90, "tf32"): LINEAR - {"grad_weight_kernel"},
    (100, "tf32"): {"forward_kernel"},
}

# (kernel, case, capability, kind) of each spill that is accepted. Exact float32 has no tensor core, and for it each
# thread holds whole rows of what it multiplies in registers: these are the smallest tiles that Triton has.
ACCEPTED = {
    ("grad_source_kernel", "depth 128, everything", 80, "ieee"),
    ("grad_source_kernel", "depth 256, everything", 80, "ieee"),
    *(("grad_query_kernel", "depth 256, one source", capability, "ieee") for capability in (80, 90)),
    ("grad_query_kernel", "depth 256, everything", 90, "ieee"),
    *(
        ("forward_kernel", f"depth 128, {what}", 100, "ieee")
        for what in ("everything", "lengths and presence")
    ),
    # Where everything is asked for at once: what a source's walk over its keys does not use, stored before it and loaded
    # behind it. Half of the tile would cost all others.
    ("forward_kernel", "depth 128, everything, split", 80, "half"),
    *(("forward_kernel", "depth 128, lengths and presence", 80, kind) for kind in ("tf32", "ieee")),
    ("forward_kernel", "depth 256, everything", 90, "half"),
    *(("forward_kernel", f"depth 128, everything{more}", 90, "tf32") for more in ("", ", split")),
    ("forward_kernel", "depth 64, everything", 100, "tf32"),
    ("forward_kernel", "depth 256, everything", 80, "tf32"),
    ("grad_query_kernel", "depth 128, everything, split", 80, "tf32"),
    *(("grad_query_kernel", "depth 256, everything", capability, "tf32") for capability in SHARED_MEMORY),
    *(("grad_query_kernel", "depth 128, everything", capability, "half") for capability in (80, 90)),
    *(("grad_query_kernel", "depth 128, everything, split", capability, "half") for capability in (80, 90)),
    ("grad_source_kernel", "depth 128, everything", 90, "half"),
    ("delta_kernel", "depth 128, everything", 100, "half"),
}


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    jobs = [(capability, kind) for kind in KINDS for capability in SHARED_MEMORY]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return [kernel for found in pool.map(compile_for, *zip(*jobs, strict=True)) for kernel in found]


def test_every_kernel_is_compiled_for_every_generation_and_precision(compiled):
    kernels = {
        "grad_preact_kernel",
        "statistics_kernel",
        "norm_backward_kernel",
        *LINEAR,
        "delta_kernel",
        *ATTENTION,
        "combine_kernel",
        *CONTRASTIVE,
        *LOWRANK,
        "grad_factors_kernel",
        "mix_kernel",
        "grad_mix_kernel",
    }
    for capability in SHARED_MEMORY:
        for kind in KINDS:
            assert {c.kernel for c in compiled if (c.capability, c.kind) == (capability, kind)} == kernels


def test_three_sources_run_the_kernels_of_four(compiled):
    assert not [c for c in compiled if "three sources" in c.case]


def test_sixteen_sources_are_hardly_more_code_than_four(compiled):
    """Unrolled, a kernel of sixteen would compile for minutes."""
    four, sixteen = (
        {
            (c.kernel, c.capability, c.kind): c.lines
            for c in compiled
            if c.case == f"depth 64, everything{more}"
        }
        for more in ("", ", sixteen sources")
    )
    assert len(sixteen) == 4 * len(SHARED_MEMORY) * len(KINDS)
    assert not [kernel for kernel in sixteen if sixteen[kernel] > 1.5 * four[kernel]]


def test_no_kernel_spills_registers(compiled):
    assert {(c.kernel, c.case, c.capability, c.kind) for c in compiled if c.spilled} == ACCEPTED


def test_every_kernel_fits_into_shared_memory(compiled):
    assert not [c for c in compiled if c.shared > SHARED_MEMORY[c.capability]]


def test_matrix_products_run_on_tensor_cores_and_exact_float32_does_not(compiled):
    for c in compiled:
        if c.kernel in LINEAR | ATTENTION | CONTRASTIVE | LOWRANK:
            assert bool(c.instructions) == (c.kind != "ieee"), c


def test_what_is_multiplied_in_tf32_is_rounded_to_it_first(compiled):
    assert not [c for c in compiled if c.kind == "tf32" and c.instructions and not c.rounded]


def test_large_tiles_take_the_newest_instructions(compiled):
    """Attention's small tiles take the older ones, and so does its TF32 where an operand lies the wrong way round."""
    for c in compiled:
        linear = c.kernel in LINEAR and not c.case.startswith("depth")
        attention = c.kernel == "forward_kernel" and c.case.startswith(("depth 64", "depth 128"))
        if (c.kind != "ieee" and linear) or (c.kind == "half" and attention):
            assert c.instructions == {TENSOR_CORE[c.capability]}, c


def test_dense_tiles_come_by_descriptors_from_hopper_on(compiled):
    for capability in SHARED_MEMORY:
        for kind in KINDS:
            dense = [c for c in compiled if (c.case, c.capability, c.kind) == ("dense", capability, kind)]
            assert {c.kernel for c in dense if c.described} == DESCRIBED.get((capability, kind), set())
