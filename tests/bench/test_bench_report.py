"""A record comes back as it was written, and the table hides neither losses nor what was asked for."""

import io
import platform
from dataclasses import replace
from types import SimpleNamespace

from rich.console import Console

from mmfast.bench.measure import Result
from mmfast.bench.report import Machine, Record, commit
from mmfast.doctor import processor

MACHINE = Machine("A CPU (R) 9000", ["avx2"], 2, 2, None, {"python": "3.12", "torch": "2.14.1"})
RESULTS = [
    Result(
        "won",
        "float32",
        "cpu",
        {"ours": [1e-3, 1e-3], "eager": [2e-3, 2.2e-3]},
        2e9,
        {"eager": 1.9},
        {"ours": 2**20},
        samples=8,
    ),
    Result("lost", "bfloat16", "cpu", {"ours": [1e-3, 1e-3], "eager": [5e-4, 7e-4], "other": [1e-3, 1e-3]}),
]
RECORD = Record("op", RESULTS, {"gemm_float32": 4e12, "copy": 1e10}, MACHINE, "abc123", "2030-01-01")


def shown(record):
    console = Console(file=io.StringIO(), width=200)
    console.print(record.table())
    return console.file.getvalue()


def test_a_record_survives_the_round_trip(tmp_path):
    path = RECORD.save(tmp_path)
    assert path.name == "op-a-cpu-r-9000-2-threads.json"
    assert Record.load(path) == RECORD


def test_a_record_says_where_and_when_it_was_taken():
    record = Record("op", [], {})
    assert (
        record.machine.cpu
        and record.machine.threads >= 1
        and record.machine.versions["torch"] != "not installed"
    )
    assert record.date[:2] == "20" and record.date.endswith("+00:00")


def test_processors_of_one_name_are_told_apart():
    said = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {}\nstepping\t: 1\n"
    assert processor(said.format("AMD EPYC")) == "AMD EPYC (family 26, model 2)"
    assert processor(said.format("AMD EPYC 9654")) == "AMD EPYC 9654"
    assert processor("") == (platform.processor() or platform.machine())


def test_a_run_that_was_kept_from_an_instruction_set_says_so(monkeypatch):
    monkeypatch.setenv("MMFAST_ISA", "avx2")
    limited = Record("op", [], {}, Machine.here())
    assert limited.machine.limits["MMFAST_ISA"] == "avx2"
    monkeypatch.delenv("MMFAST_ISA")
    assert limited.machine.slug != Machine.here().slug
    one = replace(RECORD, machine=replace(MACHINE, limits={"MMFAST_ISA": "avx2"}))
    assert one.machine.slug == "a-cpu-r-9000-avx2-2-threads"
    assert "A CPU (R) 9000, MMFAST_ISA=avx2, 2 threads" in shown(one)


def test_wins_and_losses_are_both_shown_with_their_spread():
    text = shown(RECORD)
    assert "2.10x (2.05-2.15) ≥ 1.9 ✓" in text
    assert "0.60x (0.55-0.65)" in text
    assert "50%" in text  # 2 GFLOP in 1 ms of 4 TFLOP/s


def test_samples_a_second_stand_beside_the_times():
    row = next(line for line in shown(RECORD).splitlines() if "samples/s" in line)
    assert "8000.00" in row and "3809.52" in row  # 8 in 1 ms and in 2.1


def test_a_peer_that_failed_is_not_left_out_of_the_table():
    failed = replace(RESULTS[0], failed={"broken": "RuntimeError: no room"})
    text = shown(replace(RECORD, results=[failed]))
    assert "broken" in text
    assert next(line for line in text.splitlines() if "won" in line).split("│")[-2].strip() == "failed"


def test_what_a_processor_did_is_not_recorded_under_the_gpus_name(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert Machine.here().slug == "nvidia-h200" and Machine.here("cpu").gpu is None


def test_a_copy_of_a_checkout_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("MMFAST_COMMIT", "0123456789ab")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(stdout=""))
    assert commit() == "0123456789ab"


def test_a_peer_that_did_not_take_part_has_no_figure():
    row = next(line for line in shown(RECORD).splitlines() if "won" in line)
    assert row.split("│")[-2].strip() == ""
