"""Ties the measuring core to pytest-benchmark: ``pytest bench --benchmark-only``."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from mmfast.bench.measure import Result, Work, ceilings, measure, multiplies
from mmfast.bench.report import RESULTS, Machine, Record

_DONE = pytest.StashKey[dict[str, list[Result]]]()  # by the module that asked
_CEILINGS = pytest.StashKey[dict[str, dict[str, float]]]()  # by device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, help="folder for the records; given, partial runs are recorded too"
    )
    parser.addoption("--seconds", type=float, default=8.0, help="for each piece of work (default: 8)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[_DONE], config.stash[_CEILINGS] = {}, {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark takes ``measured`` and ``variant``; its module's ``works()`` says what they are."""
    if "measured" in metafunc.fixturenames:
        works = metafunc.module.works()
        variants = dict.fromkeys(variant for work in works for variant in work.variants)
        metafunc.parametrize("variant", variants)
        metafunc.parametrize("measured", works, ids=str, indirect=True, scope="module")


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Result:
    """All variants of one piece of work, measured together when the first of them is asked for."""
    work: Work = request.param
    dtype = work.computed_in.get(next(iter(work.variants)), work.dtype)
    if not multiplies(dtype, work.device):
        pytest.skip(f"PyTorch has no instructions for products of {dtype} on this {work.device}")
    torch.compiler.reset()
    rates = request.config.stash[_CEILINGS].setdefault(work.device, {})
    # Before the work, since a GPU that it breaks answers nothing any more. A CPU that others use too has slow
    # moments: its best is what counts.
    if not rates or work.device == "cpu":
        rates |= {name: max(rate, rates.get(name, 0.0)) for name, rate in ceilings(work.device).items()}
    result = measure(work, seconds=request.config.getoption("--seconds"), strict=False)
    request.config.stash[_DONE].setdefault(request.module.__name__, []).append(result)
    return result


@pytest.fixture
def rounds(
    request: pytest.FixtureRequest, measured: Result, variant: str
) -> Callable[[BenchmarkFixture], None]:
    """Hands a variant's rounds to pytest-benchmark.

    It times one function after the other, and fair rounds hold all variants: so the timer that it reads here
    is one that replays what ``measure`` has timed.
    """
    if variant in measured.failed and variant not in measured.seconds:
        pytest.fail(measured.failed[variant], pytrace=False)
    if variant not in measured.seconds:
        pytest.skip(f"{variant} does not do this work")
    seconds = measured.seconds[variant]
    ticks = itertools.accumulate(itertools.chain.from_iterable((0.0, s) for s in seconds))
    request.node.add_marker(
        pytest.mark.benchmark(timer=lambda: next(ticks), group=f"{measured.work} {measured.dtype}")
    )

    def replay(benchmark: BenchmarkFixture) -> None:
        low, median, high = measured.ratio(variant)
        benchmark.extra_info["over_ours"] = {"low": low, "median": median, "high": high}
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return replay


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Shows the tables, and records a run that was whole and without a failure."""
    folder = config.getoption("--results")
    partial = exitstatus or terminalreporter.stats.get("deselected")
    for module, results in config.stash[_DONE].items():
        device = results[0].device
        name, rates = module.rpartition(".bench_")[2], config.stash[_CEILINGS][device]
        record = Record(name, results, rates, Machine.here(device))
        tty = terminalreporter.hasmarkup
        console = Console(width=None if tty else 160, force_terminal=tty)
        with console.capture() as text:
            console.print(record.table())
        terminalreporter.write("\n" + text.get())
        if partial and not folder:
            terminalreporter.write_line("not recorded: a part was left out, or failed")
        else:
            terminalreporter.write_line(f"recorded in {record.save(folder or RESULTS)}")
