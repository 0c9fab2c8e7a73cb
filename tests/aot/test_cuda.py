"""The CUDA library holds code for each GPU generation, with PTX for later ones, and none of it spills."""

import re
import subprocess
from pathlib import Path

import pytest

import mmfast

LIBRARY = Path(mmfast.__file__).parent / "libmmfast_cuda.so"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="libmmfast_cuda was not built here")


def cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments, LIBRARY], capture_output=True, text=True, check=True).stdout


def test_each_generation_has_machine_code_and_later_ones_have_ptx():
    assert set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("-lelf"))) == {"sm_80", "sm_90a", "sm_100a"}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("-lptx"))) == {"sm_80"}


def test_no_kernel_spills_registers():
    usage = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", cuobjdump("-res-usage"))
    epilogue, attention = 2 * 3, 3 * 3 + 3  # forward and backward; depths of 64, 128 and 256, and the merge
    assert len(usage) == 3 * (epilogue + attention), "in three dtypes for three generations"
    assert not [name for name, stack, local in usage if int(stack) + int(local)]


def test_attention_multiplies_on_tensor_cores_but_for_float32():
    code = cuobjdump("-sass", "-arch", "sm_80").split("Function : ")[1:]
    found = {
        name: "HMMA.16816" in body for name, body in (one.split("\n", 1) for one in code) if "attend" in name
    }
    assert len(found) == 9
    assert all(on_tensor_cores == ("kernelIf" not in name) for name, on_tensor_cores in found.items())
