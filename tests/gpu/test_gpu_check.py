"""`make gpu-check` as far as a machine without a GPU can tell: what it runs, reads and reports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gpu_check
import gpu_sanitizer_cases
import pytest
import test_gpu
import torch
from support.problems import make_problem

from dgl_ext._arguments import validate as _validate
from dgl_ext._arguments.heads import HEADS

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parents[1]
LEAST_GPU_TESTS = 1700


def options(tmp_path: Path, *flags: str):
    return gpu_check.parse(["--out", str(tmp_path), *flags])


def without_gpu(monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 0)


# --- without a GPU ---


def test_without_a_gpu_it_says_so_in_one_line_and_builds_nothing(monkeypatch, tmp_path, capsys):
    without_gpu(monkeypatch)
    folder = tmp_path / "out"
    assert gpu_check.main(["--out", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.err == "gpu-check: no GPU here, nothing was checked\n"
    assert printed.out == ""
    assert not folder.exists()


# --- what it reads ---


@pytest.mark.parametrize(
    ("output", "findings"),
    [
        ("========= COMPUTE-SANITIZER\n72 cases\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 3 errors\n", 3),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        ("========= ERROR SUMMARY: 0 errors\n========= ERROR SUMMARY: 2 errors\n", 2),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 4 hazards displayed (1 error, 3 warnings)\n", 4),
        ("========= Internal Sanitizer Error: out of memory\n========= ERROR SUMMARY: 0 errors", 1),
        ("========= Error: Target application terminated before first API call\n", None),
        ("the words ERROR SUMMARY: 5 errors in a program's own line\n", None),
        ("", None),
    ],
)
def test_summaries_of_the_sanitizer(output, findings):
    assert gpu_check.read_sanitizer(output)["findings"] == findings


JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="test_gpu" name="a"/>
<testcase classname="test_gpu" name="b"><failure message="wrong"/></testcase>
<testcase classname="test_gpu" name="c"><error message="broken"/></testcase>
<testcase classname="test_gpu" name="d"><skipped message="needs a second CUDA device"/></testcase>
<testcase classname="test_gpu" name="e"><system-out>text</system-out></testcase>
</testsuite></testsuites>"""


def test_counts_of_a_junit_report(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    assert gpu_check.read_junit(path) == {
        "passed": 2,
        "failed": 1,
        "errors": 1,
        "skipped": 1,
        "broken": ["test_gpu::b", "test_gpu::c"],
        "skip_reasons": {"needs a second CUDA device": 1},
    }


# --- what it runs ---


@pytest.mark.parametrize(
    ("code", "problem", "status", "message"),
    [
        (0, "", "passed", ""),
        (0, "2 findings", "failed", "2 findings"),
        (5, "", "failed", "exit code 5"),
        (None, "no summary", "timed out", "killed after 7 s"),
    ],
)
def test_a_part_passes_only_by_exit_code_and_content(code, problem, status, message):
    outcome = gpu_check.Outcome(code, 7.0, "x" * 9999 + "end")
    part = gpu_check.judge("tests", outcome, problem, {"passed": 1})
    assert (part.status, part.message, part.seconds) == (status, message, 7.0)
    assert part.output_tail.endswith("end")
    assert len(part.output_tail) == gpu_check.TAIL_CHARACTERS


BENCHES = {
    "bench_step_bfloat16": (
        lambda chosen: gpu_check.check_bench("step", "bfloat16", chosen),
        "bench_fusion.py",
        "bench_fusion_step_cuda_bfloat16",
        ["--mode", "step", "--dtype", "bfloat16", "--smoke", "--fusion", "sum"],
    ),
    "bench_memory": (
        gpu_check.check_memory,
        "bench_memory.py",
        "bench_memory_cuda_float32",
        ["--rows", "64"],
    ),
}


def test_the_benches_accept_the_arguments_they_are_given(monkeypatch, tmp_path):
    """And they name their results as is looked for."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_fusion
    import bench_memory
    import report

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    shared = ["--device", "cuda", "--out", str(tmp_path)]
    for mode, dtype in gpu_check.BENCHES:
        flags = ["--mode", mode, "--dtype", dtype, *gpu_check.BENCH_ARGUMENTS.split()]
        found = bench_fusion._parse([*shared, *flags])
        assert (found.modes, len(found.sizes), found.passes) == ([mode], 2, 1)
        assert "dgl_ext" in found.providers
        document = {"device": "cuda:0", "dtype": dtype}
        path = report.result_paths(tmp_path, f"fusion_{mode}", document, smoke=False)[0]
        assert path.match(f"bench_fusion_{mode}_cuda_{dtype}*")
    found = bench_memory._parse([*shared, *gpu_check.MEMORY_ARGUMENTS.split()])
    assert (found.rows, found.classes) == ([1024, 16384], [32000])
    document = {"device": "cuda", "dtype": "float32"}
    assert report.result_paths(tmp_path, "memory", document, smoke=False)[0].match(
        "bench_memory_cuda_*"
    )


# --- what it reports ---


# --- the cases and the tests ---


def test_the_sanitizer_cases_have_every_head_and_dtype():
    cases = list(gpu_sanitizer_cases.cases())
    assert len(cases) == len(set(map(str, cases))) == len(HEADS) * 9 * (4 + 2)
    combinations = {(case.fusion, case.dtype, case.kind) for case in cases}
    kinds = {case.kind for case in cases}
    assert len(kinds) == 3
    assert combinations == {
        (fusion, dtype, kind) for fusion in HEADS for dtype in _validate.DTYPES for kind in kinds
    }
    assert {case.size for case in cases} == set(gpu_sanitizer_cases.SIZES)


def test_racecheck_gets_a_case_of_every_launch_and_of_every_tile():
    few, every = list(gpu_sanitizer_cases.few_cases()), list(gpu_sanitizer_cases.cases())
    assert len(few) <= 24

    def launches(cases):
        return {(c.fusion, c.kind, c.backend) for c in cases if any(c.leaks)}

    def tiles(cases):
        return {(c.fusion, c.dtype, c.tf32) for c in cases}

    assert launches(few) == launches(every)
    assert tiles(few) == tiles(every)


def test_the_sanitizer_cases_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu_sanitizer_cases, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_sanitizer_cases, "BACKENDS", ("fused",))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        assert gpu_sanitizer_cases.main() == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert gpu_check.CASES_DONE in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("kind", [gpu_sanitizer_cases.LOGITS, gpu_sanitizer_cases.CHUNKED])
def test_a_sanitizer_case_that_gives_nan_fails(monkeypatch, kind):
    monkeypatch.setattr(gpu_sanitizer_cases, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_sanitizer_cases, "BACKENDS", ("fused",))
    real = gpu_sanitizer_cases.make_problem

    def spoiled(*args, **options):
        problem = real(*args, **options)
        problem.biases[0].detach()[0] = float("nan")
        return problem

    monkeypatch.setattr(gpu_sanitizer_cases, "make_problem", spoiled)
    with pytest.raises(AssertionError, match="not finite"):
        gpu_sanitizer_cases.run(
            next(case for case in gpu_sanitizer_cases.cases() if case.kind == kind)
        )


@pytest.mark.parametrize(
    ("size", "wrong"),
    [(test_gpu.ALIGNED, 1e-3), (test_gpu.LARGEST, 2e-3)],
    ids=["aligned", "largest"],
)
@pytest.mark.parametrize("head", HEADS)
def test_the_float32_bound_lets_plain_pytorch_pass_and_no_wrong_gradient(
    monkeypatch, head, size, wrong
):
    """What the GPU's float32 results are held to, tried on the CPU's."""
    monkeypatch.setattr(test_gpu, "on_device", lambda tensor, device="cpu": tensor)
    problem = make_problem(head, dtype=torch.float32, **size)
    evaluate, spoiled = test_gpu.evaluate, ""

    def spoil(problem, *arguments, **leaks):
        found = evaluate(problem, *arguments, **leaks)
        if spoiled and problem.features[0].dtype == torch.float32:
            found[spoiled] = found[spoiled] * (1 + wrong)
        return found

    monkeypatch.setattr(test_gpu, "evaluate", spoil)
    leaks = {"encoder_leak": 0.5, "head_leak": 0.25}
    test_gpu.check_other_dtype("reference", problem)
    test_gpu.check_other_dtype("reference", problem, **leaks)
    for spoiled, _ in problem.named():
        with pytest.raises(AssertionError, match=re.escape(spoiled)):
            test_gpu.check_other_dtype("reference", problem, **leaks)


def test_every_gpu_test_carries_the_marker():
    """Without conftest.py, as on a machine that has torch and pytest only, and from anywhere."""
    names = ("gpu", "gpu_streams", "gpu_step", "gpu_step_autograd", "gpu_step_streams")
    files = [TESTS / f"test_{name}.py" for name in names]
    assert set(map(str, files)) <= set(gpu_check.gpu_test_files())
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--noconftest", "-m", "gpu"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "deselected" not in done.stdout.splitlines()[-1]
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(names) >= LEAST_GPU_TESTS
    assert all(any(f"[{head}-" in name for name in names) for head in HEADS)
