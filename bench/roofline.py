"""Draws a record of ``bench_cross_attention`` under the roof of its machine.

``python -m mmfast.bench.roofline bench/results/cross_attention-<machine>.json docs/ops/<picture>.png``
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mmfast.bench.bench_cross_attention import MIXES, Mix

BYTES = {"float32": 4, "bfloat16": 2}


def moved(mix: Mix, backward: bool, itemsize: int) -> float:
    """Bytes that must move once: what is seen of the inputs, the outputs, and of each gradient all of it."""
    head = itemsize * mix.batch * mix.heads * mix.depth
    seen = sum(mix.keys) * (0.5 if mix.absent else 1.0)
    forward = head * (2 * mix.queries + 2 * seen)  # query, out, keys, values
    # again, with the output's gradient in place of the output; dQ, dK and dV
    return forward + (head * (3 * mix.queries + 2 * seen + 2 * sum(mix.keys)) if backward else 0)


def draw(record: dict[str, Any], path: Path) -> None:
    """A panel for each dtype: FLOP/s of what is seen over FLOP per byte."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), constrained_layout=True)
    for axes, (dtype, itemsize) in zip(panels, BYTES.items(), strict=True):
        gemm, copy = record["ceilings"][f"gemm_{dtype}"], record["ceilings"]["copy"]
        intensity = np.geomspace(4, 2000, 200)
        axes.plot(intensity, np.minimum(gemm, intensity * copy) / 1e9, color="0.3")
        axes.annotate("torch.matmul", (1900, gemm / 1e9), ha="right", va="bottom", color="0.3")
        axes.annotate("copy", (5, 2.5 * copy / 1e9), ha="left", va="bottom", color="0.3")
        for backward, marker in ((False, "o"), (True, "s")):
            for number, (name, mix) in enumerate(MIXES.items()):
                work = f"{name}: forward{' + backward' if backward else ''}"
                found = next(r for r in record["results"] if (r["work"], r["dtype"]) == (work, dtype))
                seconds = statistics.median(next(iter(found["seconds"].values())))
                axes.plot(
                    found["flops"] / moved(mix, backward, itemsize),
                    found["flops"] / seconds / 1e9,
                    marker,
                    color=f"C{number}",
                    label=work,
                )
        axes.set(
            xscale="log",
            ylim=(0, 1.1 * gemm / 1e9),
            title=dtype,
            xlabel="FLOP per byte moved",
            ylabel="GFLOP/s of what is seen",
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
