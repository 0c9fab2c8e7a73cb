"""Are two runs the same? ``python -m mmfast.train.compare runs/one runs/two --tolerance 1e-9``."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from mmfast.errors import UserError
from mmfast.train import checkpoint


def losses(run: Path) -> dict[int, float]:
    """Loss of each step of a run, as ``metrics.jsonl`` has it."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run} is not a run: it has no metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def first_gradients(run: Path) -> dict[str, Tensor]:
    """The first step's clipped gradients times 1 - beta1: AdamW's first moment after one step."""
    found = checkpoint.steps(run)
    if 1 not in found:
        raise UserError(f"{run} has no checkpoint of step 1; train it with --trainer.max_steps 1")
    with warnings.catch_warnings():  # one process is what is meant
        warnings.filterwarnings("ignore", "torch.distributed is unavailable", UserWarning)
        state: dict[str, Any] = _load_state_dict_from_keys("optimizer", checkpoint_id=found[1])
    return {name: moments["exp_avg"] for name, moments in state["optimizer"].items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the largest difference; exit status 1 if it is above the tolerance."""
    parser = argparse.ArgumentParser(prog="python -m mmfast.train.compare", description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest difference allowed (default 0)")
    parser.add_argument("--gradients", action="store_true", help="the first step's, relative to the largest")
    options = parser.parse_args(arguments)
    one, two = options.runs
    if options.gradients:
        a, b = first_gradients(one), first_gradients(two)
        largest = max(float(grad.abs().max()) for grad in a.values())
        apart = {name: float((grad - b[name]).abs().max()) / largest for name, grad in a.items()}
        what = f"{len(a)} gradients of step 1, relative to the largest"
    else:
        c, d = losses(one), losses(two)
        common = sorted(c.keys() & d.keys())
        apart = {f"step {step}": abs(c[step] - d[step]) for step in common}
        what = f"{len(common)} losses, steps {common[0]} to {common[-1]}" if common else "no step in common"
    where, worst = max(apart.items(), key=lambda item: item[1], default=("nothing", float("inf")))
    print(f"{what}: largest difference {worst:.3g} ({where}), allowed {options.tolerance:g}")
    return int(not worst <= options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
