"""Measures this device and writes its entries of ``mmfast/ops/table.json``.

``python -m mmfast.bench.tune [op ...]``: for each op with a suite here (``bench_<op>.py``) every backend that
is ready does the suite's works, its outputs checked; the fastest over all becomes the automatic choice. On a
GPU the blocks of the op's Triton kernels are tuned first: what ``UNTUNED`` names in ``mmfast.kernels.<op>*``.
"""

import argparse
import contextlib
import functools
import json
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import print
from tqdm import tqdm

from mmfast import bench, kernels, ops
from mmfast.bench.measure import Call, Result, Work, WrongOutputError, ceilings, measure
from mmfast.bench.report import Machine, Record
from mmfast.kernels._launch import capability
from mmfast.ops._backend import READY, TABLE, choose

Blocks = dict[str, int]
TABLE_FILE = Path(ops.__file__).with_name("table.json")
LIMITS = {
    "BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 128, "BLOCK_E": 256, "num_warps": 8, "num_stages": 6,
    "DESCRIPTORS": 1,
}  # fmt: skip
LEAST = {
    "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_E": 16, "num_warps": 1, "num_stages": 1,
    "DESCRIPTORS": 0,
}  # fmt: skip


def tune(op: str, seconds: float) -> None:
    """Measures ``op`` on this device and puts what was found into ``TABLE``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    works = import_module(f"mmfast.bench.bench_{op}").works(device)
    entry = TABLE.setdefault(op, {}).setdefault(
        torch.cuda.get_device_name() if device == "cuda" else "cpu", {}
    )
    ready = [name for name, state in ops.available(op, device).items() if state == READY]
    if device == "cuda" and "triton" in ready:
        entry["capability"] = capability(torch.device(device))
        entry["triton"] = Found(entry.get("triton", {}))
        tune_triton(op, works, entry["triton"])
    # backends differ by far more than inputs and rounds do, and a plain form may take seconds
    works = [replace(work, sets=1, rounds=(5, work.rounds[1])) for work in works]
    results = list(tqdm(compare(works, ready, seconds), op, len(works), disable=None))
    record = Record(op, results, ceilings(device), Machine.here(device))
    print(record.table())
    entry["backend"] = fastest(record.results, ready)
    print(f"{op}: {entry['backend']}")


def compare(works: Sequence[Work], backends: Sequence[str], seconds: float) -> Iterator[Result]:
    """Our variant of every work under each backend; a work that one of them does wrongly is an error."""
    for work in works:
        ours = next(iter(work.variants.values()))
        variants = {name: under(name, ours) for name in backends}
        yield measure(replace(work, variants=variants, required={}, weigh=None), seconds=seconds)


def fastest(results: Sequence[Result], backends: Sequence[str]) -> str:
    """The backend with the least geometric mean of its times over the first one's."""
    return min(backends, key=lambda name: sum(math.log(r.ratio(name).median) for r in results))


def under(backend: str, call: Call) -> Call:
    """``call`` with ``backend`` forced."""

    def run(*args: Any) -> Any:
        with ops.backend(backend):
            return call(*args)

    return run


def with_backends(op: str, device: str, call: Call) -> dict[str, Call]:
    """Our variants: the automatic choice, whose name says what that is; beside it a GPU's other backends."""
    chosen, states = choose(op, torch.device(device)), ops.available(op, device)
    others = [name for name in ("triton", "cuda") if device == "cuda" and states[name] == READY]
    return {
        f"mmfast {chosen}": call,
        **{f"mmfast {name}": under(name, call) for name in others if name != chosen},
    }


class Found(dict[str, Blocks]):
    """The blocks of a device by kernel and precision; it remembers which of them were asked for."""

    def __init__(self, blocks: Mapping[str, Blocks]) -> None:
        """Begins with ``blocks``."""
        super().__init__(blocks)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """What a launcher calls."""
        self.asked.add(key)
        return super().get(key, default)


@contextlib.contextmanager
def matmul_precision_kept() -> Iterator[None]:
    """PyTorch's precision of float32 products is afterwards what it was, whatever happens."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@matmul_precision_kept()
def tune_triton(op: str, works: Sequence[Work], found: Found) -> None:
    """Fills ``found``, this device's entry, with the best blocks of each kernel and precision.

    A kernel is timed by the works that ask for its blocks; where none of them does, it stays untuned.
    """
    from triton.errors import TritonError  # only where there is Triton

    works = [replace(work, inputs=functools.cache(work.inputs)) for work in works]  # the same for all blocks

    def asks(work: Work, key: str) -> bool:
        found.asked.clear()
        with contextlib.suppress(RuntimeError, TritonError):  # blocks that do not fit were asked for too
            under("triton", next(iter(work.variants.values())))(*work.inputs(0))
        return key in found.asked

    for key, start in untuned(op, capability(torch.device("cuda"))).items():
        dtype = torch.bfloat16 if key.endswith(".half") else torch.float32
        torch.backends.cuda.matmul.fp32_precision = "tf32" if key.endswith(".tf32") else "ieee"
        mine = [work for work in works if work.dtype == dtype and asks(work, key)]
        if not mine:
            continue

        def cost(blocks: Blocks, key: str = key, mine: Sequence[Work] = mine) -> float:
            found[key] = blocks
            try:
                results = list(compare(mine, ["triton"], seconds=0.05))
            except (
                WrongOutputError,
                RuntimeError,
                TritonError,
            ) as error:  # more shared memory than there is, for one
                print(f"  {blocks}: {str(error).splitlines()[0]}")
                return math.inf
            return sum(math.log(r.time("triton").median) for r in results)

        kept = dict(found)
        try:
            found[key] = climb(found.get(key, start), cost)
        except BaseException:
            found.clear()  # of the blocks that were tried last, which may not even run
            found.update(kept)
            raise
        print(f"{op} {key}: {found[key]}")


def untuned(op: str, generation: int) -> dict[str, Blocks]:
    """Where tuning starts: the op's kernels with the blocks of the nearest older generation."""
    merged: dict[str, Blocks] = {}
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if module.name.rpartition(".")[2].startswith(op):
            table: Mapping[int, Mapping[str, Blocks]] = getattr(import_module(module.name), "UNTUNED", {})
            if older := [cc for cc in table if cc <= generation]:
                merged |= table[max(older)]
    return merged


def climb(start: Blocks, cost: Callable[[Blocks], float], margin: float = 0.01) -> Blocks:
    """Goes from ``start`` to the first neighbour that is better by ``margin``, until there is none.

    A neighbour has one number doubled or halved (stages: one more or less; descriptors: with or without);
    ``cost`` is the log of a time.
    """
    best, least = start, cost(start)
    seen = [start]
    while True:
        for blocks in neighbours(best):
            if blocks not in seen:
                seen.append(blocks)
                now = cost(blocks)
                if now < least - margin:
                    best, least = blocks, now
                    break
        else:
            return best


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """One step away from ``blocks``, within the limits."""
    for name, value in blocks.items():
        one_by_one = name in ("num_stages", "DESCRIPTORS")
        for other in (value - 1, value + 1) if one_by_one else (value // 2, value * 2):
            if LEAST[name] <= other <= LIMITS[name]:
                yield {**blocks, name: other}


def main(args: Sequence[str] | None = None) -> None:
    """Tunes the named ops, all that have a suite when none is named."""
    suites = sorted(path.stem.removeprefix("bench_") for path in Path(bench.__path__[0]).glob("bench_*.py"))
    suites = [op for op in suites if op in ops.__all__]
    parser = argparse.ArgumentParser(description="Measures this device and writes its entries of the table.")
    parser.add_argument("ops", nargs="*", metavar="op", default=suites, help=f"of {', '.join(suites)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each piece of work (default: 2)")
    options = parser.parse_args(args)
    for op in options.ops:
        if op not in suites:
            parser.error(f"{op} has no suite, wanted one of {', '.join(suites)}")
    for op in options.ops:
        try:
            tune(op, options.seconds)
        finally:
            write(TABLE_FILE)  # what is found is kept, whatever becomes of the rest


def write(path: Path) -> None:
    """Writes ``TABLE`` in the form in which it is committed: a difference is a finding."""
    path.write_text(json.dumps(TABLE, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
