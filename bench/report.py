"""What was measured, where, and how it is shown: a record on disk and a table, wins and losses alike."""

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from mmfast.bench.measure import Result, Spread
from mmfast.doctor import cpuinfo, processor

RESULTS = Path(__file__).resolve().parent / "results"
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
_LIMITS = ("MMFAST_ISA", "ONEDNN_MAX_CPU_ISA")  # forbid instruction sets: ours, PyTorch's


@dataclass(frozen=True)
class Machine:
    """Where a figure was taken."""

    cpu: str
    instruction_sets: list[str]
    cores: int
    threads: int
    gpu: str | None
    versions: dict[str, str]
    limits: dict[str, str] = field(default_factory=dict)  # environment that kept the run from some of them

    @classmethod
    def here(cls, device: str = "cuda") -> "Machine":
        """This machine and this process; without its GPU where ``device``, which did the work, is "cpu"."""
        text = cpuinfo()
        flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*: (.+)", text, re.MULTILINE)).split())
        return cls(
            cpu=processor(text),
            instruction_sets=[flag for flag in _FLAGS if flag in flags],
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None,
            versions={"python": platform.python_version()}
            | {p: _version(p) for p in ("torch", "triton", "mmfast")},
            limits={name: os.environ[name] for name in _LIMITS if name in os.environ},
        )

    @property
    def slug(self) -> str:
        """A short name for file names: the GPU's, else the processor's, its limits and threads."""
        cpu = " ".join([self.cpu, *self.limits.values(), f"{self.threads} threads"])
        return re.sub(r"[^a-z0-9]+", "-", (self.gpu or cpu).lower()).strip("-")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "not installed"


def commit() -> str:
    """The checkout's commit, with ``+`` where tracked files differ from it.

    Outside a checkout, as on a machine that a copy was sent to, it is what ``MMFAST_COMMIT`` says, or empty.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/results"
        )
        found = git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except FileNotFoundError:
        found = ""
    return found or os.environ.get("MMFAST_COMMIT", "")


@dataclass(frozen=True)
class Record:
    """One run's results, with all that is needed to read them later."""

    name: str
    results: list[Result]
    ceilings: dict[str, float]  # of this run; see ``measure.ceilings``
    machine: Machine = field(default_factory=Machine.here)
    commit: str = field(default_factory=commit)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def save(self, folder: Path = RESULTS) -> Path:
        """Writes ``folder/<name>-<machine>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{self.machine.slug}.json"
        # One list of numbers is one line: the file is read by people too.
        text = re.sub(
            r"\[[^][{}\"]*\]", lambda m: re.sub(r"\s+", " ", m[0]), json.dumps(asdict(self), indent=1)
        )
        path.write_text(text + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Reads what ``save`` wrote."""
        raw = json.loads(path.read_text())
        results = [Result(**result) for result in raw.pop("results")]
        return cls(machine=Machine(**raw.pop("machine")), results=results, **raw)

    def share(self, result: Result) -> float | None:
        """Our part of the GEMM rate measured in this run, or None where there is no such rate."""
        ceiling = self.ceilings.get(f"gemm_{result.dtype}")
        return result.flops / result.time(result.ours).median / ceiling if ceiling and result.flops else None

    def table(self) -> Table:
        """A row for each piece of work: our time, our share of the GEMM rate, each peer's time over ours."""
        m = self.machine
        rates = ", ".join(
            f"{name.removeprefix('gemm_')} {rate / 1e9:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
            for name, rate in self.ceilings.items()
        )
        where = ", ".join([m.gpu or m.cpu, *(f"{name}={value}" for name, value in m.limits.items())])
        caption = (
            f"{where}, {m.threads} threads, torch {m.versions['torch']}, {self.commit} {self.date}\n"
            f"measured in this run: {rates}\n"
            "x is a peer's time over ours within a round: median (quartiles); above 1 we are faster"
        )
        peers = dict.fromkeys(peer for r in self.results for peer in [*list(r.seconds)[1:], *r.failed])
        table = Table(title=self.name, caption=caption, caption_justify="left", title_justify="left")
        table.add_column("work")
        for head in (f"{self.results[0].ours}, ms", "of GEMM rate", *peers):
            table.add_column(head, justify="right")
        for r in self.results:
            share = self.share(r)
            cells: list[str | Text] = [_milliseconds(r.time(r.ours)), f"{share:.0%}" if share else ""]
            cells += [
                _ratio(r.ratio(p), r.required.get(p)) if p in r.seconds else "failed" if p in r.failed else ""
                for p in peers
            ]
            table.add_row(f"{r.work} {r.dtype}", *cells)
            if r.samples:
                speeds = [
                    f"{r.samples / r.time(v).median:.2f}" if v in r.seconds else "" for v in (r.ours, *peers)
                ]
                table.add_row(Text("  samples/s", style="dim"), speeds[0], "", *speeds[1:])
            if r.peak_bytes:
                held = [
                    f"{r.peak_bytes[p] / 2**20:,.1f}" if p in r.peak_bytes else "" for p in (r.ours, *peers)
                ]
                table.add_row(Text("  peak memory, MiB", style="dim"), held[0], "", *held[1:])
        return table


def _milliseconds(t: Spread) -> str:
    return f"{t.median * 1e3:.3g} ({t.low * 1e3:.3g}-{t.high * 1e3:.3g})"


def _ratio(r: Spread, required: float | None) -> Text:
    """Green where even the lower quartile wins, red where even the upper one loses, else plain."""
    style = "green" if r.low > 1 else "red" if r.high < 1 else ""
    text = Text(f"{r.median:.2f}x ({r.low:.2f}-{r.high:.2f})", style=style)
    if required is not None:
        text.append(f" ≥ {required:g} {'✓' if r.median >= required else '✗'}", style="dim")
    return text
