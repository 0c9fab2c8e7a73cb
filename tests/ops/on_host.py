"""A binding of the CUDA kernels, compiled for the host with what stands in for the device."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
# The binding is included behind binding.h, with CUDA, the key that it registers for, defined as CPU.
DEVICE = """
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
}
"""


def build(folder, source, options=(), include=()):
    """The library of ``source`` with its ops registered; skips where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    (folder / "host.cpp").write_text(source + DEVICE)
    library = folder / "host.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic", *options]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DUSE_CUDA"]
    command += [f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'tests' / 'ops'}", f"-isystem{TORCH / 'include'}"]
    command += [f"-I{place}" for place in include]
    files = [folder / "host.cpp", ROOT / "csrc" / "cpu" / "calls.cpp", TORCH / "lib" / "libtorch_cpu.so"]
    subprocess.run([*command, *files, "-o", library], check=True)
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))
