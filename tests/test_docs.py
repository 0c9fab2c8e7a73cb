"""What the pages show in Python runs as it stands, block after block."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def needs(block):
    """What a block asks for and is not here."""
    config = re.search(r"configs/\w+\.yaml", block)
    if config:
        return f"the data set of {config[0]}"
    return "a C++ compiler" if "mmfast.explain" in block and not shutil.which("g++") else None


def cases():
    """Each page's blocks in their order as one program, but for those that are left out by name."""
    for path in sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))):
        page, blocks = str(path.relative_to(ROOT)), BLOCK.findall(path.read_text())
        program = "\n".join(block for block in blocks if not needs(block))
        if program:
            yield pytest.param(program, id=page)
        for block in filter(needs, blocks):
            yield pytest.param(block, id=page, marks=pytest.mark.skip(f"it needs {needs(block)}"))


@pytest.mark.parametrize("program", list(cases()))
def test_a_pages_python_runs(program, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
