"""Everything that needs a GPU, in one run and one JSON report: tests, sanitizers, benchmarks.

    make gpu-check                                     # from a bare clone
    python tests/gpu/gpu_check.py --out DIR                # with the package already installed
    python tests/gpu/gpu_check.py --only tests,memcheck    # some of the parts

Parts, each run even if an earlier one failed, each within its own time limit; all limits together
are 8 minutes, meant for one GPU and 16 cores:

    environment          GPU, driver, torch, CUDA, commit; fails if the CUDA kernels do not load;
                         always run, since the report is nothing without it
    tests                pytest -m gpu
    memcheck, racecheck, initcheck, synccheck
                         compute-sanitizer over gpu_sanitizer_cases.py, the tools side by side
    bench_step_float32, bench_step_bfloat16, bench_logits_float32
                         benchmarks/bench_fusion.py --device cuda; results under DIR/bench
    bench_memory         benchmarks/bench_memory.py --device cuda; likewise

The report is written anew as parts end, so that what a cut-off run has found is kept; the whole
output of a part is in DIR/<part>.log. A table of all parts is printed last. Exit code: 0 if every
part passed, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHES = (("step", "float32"), ("step", "bfloat16"), ("logits", "float32"))  # mode, dtype
PARTS = (
    *("environment", "tests", *TOOLS),
    *(f"bench_{mode}_{dtype}" for mode, dtype in BENCHES),
    "bench_memory",
)
CASES_DONE = "sanitizer cases done"
TAIL_CHARACTERS = 4000
# Enough to see that all is right and how fast it is, at one size for each executor, so that all
# parts fit their minutes; benchmarks/gpu_tables.py measures the tables. For memory the smaller size
# is there to be checked.
BENCH_ARGUMENTS = (
    "--sizes 64x512x309,1024x2048x1000 --seconds 0.3 --passes 1 --graphs graphs "
    "--providers joint,fused,library,dgl_ext"
)
MEMORY_ARGUMENTS = "--rows 1024,16384 --classes 32000 --seconds 0.3 --providers joint,dgl_ext"
# A host of one GPU has cores for more processes than eight; each takes half a GiB of the GPU.
MOST_PROCESSES = 14


@dataclass
class Part:
    """What one part found. Status: passed, failed, timed out, or not found (its tool)."""

    name: str
    status: str
    seconds: float = 0.0
    message: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    output_tail: str = ""


@dataclass
class Outcome:
    """How a command ended; `code` is None where it ran past its limit and was killed."""

    code: int | None
    seconds: float
    output: str


def run_command(
    command: list[str], log: Path, timeout: float, environment: dict[str, str] | None = None
) -> Outcome:
    """Run a command with its output into `log`; its children are killed with it."""
    start = time.perf_counter()
    # Not from the checkout: its dgl_ext folder would hide the package that is installed.
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout)
        except BaseException as stopped:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            code = None
    text = log.read_text(errors="replace")
    return Outcome(code, time.perf_counter() - start, text)


def judge(name: str, outcome: Outcome, problem: str, details: dict[str, Any]) -> Part:
    """Make a part of a command's end and of what was found wrong in its output, if anything."""
    status, message = "passed", ""
    if outcome.code is None:
        status, message = "timed out", f"killed after {outcome.seconds:.0f} s"
    elif problem or outcome.code != 0:
        status, message = "failed", problem or f"exit code {outcome.code}"
    tail = outcome.output[-TAIL_CHARACTERS:]
    return Part(name, status, round(outcome.seconds, 2), message, details, tail)


# --- the parts ---


def check_environment(options: argparse.Namespace) -> Part:
    """What a reader needs to judge the report, as the benchmark describes it, and the GPU's own."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import harness
    import torch

    from dgl_ext._ops import extension as _extension

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    details: dict[str, Any] = dict(harness.environment(device))
    details["driver"] = driver_version()
    details["capability"] = f"{properties.major}.{properties.minor}"
    details["multiprocessors"] = properties.multi_processor_count
    details["devices"] = torch.cuda.device_count()
    if _extension.available("cuda"):
        return Part("environment", "passed", details=details)
    message = f"the CUDA kernels are not loaded: {_extension.error('cuda')}"
    return Part("environment", "failed", message=message, details=details)


def driver_version() -> str | None:
    """The driver's version as nvidia-smi gives it; None where it cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def check_tests(options: argparse.Namespace) -> Part:
    """The tests marked gpu; without hypothesis, which conftest.py needs, without conftest.py."""
    junit = options.out / "tests.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junit-xml={junit}"]
    command += ["-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    if importlib.util.find_spec("hypothesis") is None:
        command.append("--noconftest")
    if importlib.util.find_spec("xdist") is not None:  # the tests keep the host busy, not the GPU
        command += ["-n", str(min(MOST_PROCESSES, os.cpu_count() or 1))]
    command += gpu_test_files()
    outcome = run_command(command, options.out / "tests.log", options.timeout_tests)
    details: dict[str, Any] = {"command": command}
    try:
        details |= read_junit(junit)
    except (OSError, ElementTree.ParseError) as error:
        return judge("tests", outcome, f"no junit report: {error}", details)
    # Skipped tests prove nothing, though pytest calls it a success.
    return judge("tests", outcome, "" if details["passed"] else "no test passed", details)


def gpu_test_files() -> list[str]:
    """The files with tests marked gpu; to collect the others takes longer, and more packages."""
    files = sorted(TESTS.glob("*/test_*.py"))
    return [str(path) for path in files if "pytest.mark.gpu" in path.read_text()]


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a junit report, the names of what failed, and why tests were skipped."""
    counts = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0)
    broken: list[str] = []
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        if "failure" in kinds or "error" in kinds:
            counts["failed" if "failure" in kinds else "errors"] += 1
            broken.append(name)
        elif "skipped" in kinds:
            counts["skipped"] += 1
            reasons[kinds["skipped"].get("message", "")] += 1
        else:
            counts["passed"] += 1
    return {**counts, "broken": broken, "skip_reasons": dict(reasons)}


def check_sanitizer(tool: str, options: argparse.Namespace) -> Part:
    """One tool of compute-sanitizer over the sanitizer cases."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return Part(tool, "not found", message="compute-sanitizer: not found")
    command = [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    command += [sys.executable, str(TESTS / "gpu" / "gpu_sanitizer_cases.py")]
    if tool == "racecheck":  # all cases took it longer than all other parts together
        command.append("--few")
    # Bounds and first writes are seen per allocation, so torch must not cut up larger ones.
    per_allocation = tool in ("memcheck", "initcheck")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if per_allocation else {}
    outcome = run_command(
        command, options.out / f"{tool}.log", options.timeout_sanitizer, environment
    )
    details = {"command": command, **read_sanitizer(outcome.output)}
    problem = ""
    if details["findings"] is None:
        problem = "no summary in the sanitizer's output"
    elif details["findings"]:
        problem = f"{details['findings']} findings"
    elif CASES_DONE not in outcome.output:
        problem = "the cases did not run to their end"
    return judge(tool, outcome, problem, details)


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, under CUDA_HOME, or beside nvcc; None where there is none."""
    name = "compute-sanitizer"
    homes = [Path(os.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]]
    homes.append(Path("/usr/local/cuda"))
    folders = [folder for home in homes for folder in (home / "bin", home / name)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def read_sanitizer(output: str) -> dict[str, Any]:
    """What the sanitizer's summaries add up to: errors, or races of any weight.

    "findings" is None where there is no summary, as when the sanitizer itself broke down.
    """
    words = {"ERROR SUMMARY:": 0, "RACECHECK SUMMARY:": 0}
    findings = None
    lines = []
    for line in output.splitlines():
        for title in words:
            before, there, after = line.partition(title)
            if there and before.strip("= ") == "":
                lines.append(line.strip("= "))
                findings = (findings or 0) + int(after.split()[0])
        if "Internal Sanitizer Error" in line:
            lines.append(line.strip("= "))
            findings = (findings or 0) + 1
    return {"findings": findings, "summaries": lines}


def check_bench(mode: str, dtype: str, options: argparse.Namespace) -> Part:
    """The main benchmark on the GPU; it compares values before it times anything."""
    arguments = ["--mode", mode, "--dtype", dtype, *shlex.split(options.bench_arguments)]
    return run_benchmark(
        f"bench_{mode}_{dtype}",
        "bench_fusion.py",
        arguments,
        f"bench_fusion_{mode}_cuda_{dtype}*",
        options,
        options.timeout_bench,
    )


def check_memory(options: argparse.Namespace) -> Part:
    """The benchmark of a step's peak memory, in float32; it compares values before it measures."""
    return run_benchmark(
        "bench_memory",
        "bench_memory.py",
        shlex.split(options.memory_arguments),
        "bench_memory_cuda_*",
        options,
        options.timeout_memory,
    )


def run_benchmark(
    name: str,
    script: str,
    arguments: list[str],
    pattern: str,
    options: argparse.Namespace,
    timeout: float,
) -> Part:
    """One benchmark; the results that it writes have names of this pattern."""
    folder = options.out / "bench"
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--device", "cuda"]
    command += ["--out", str(folder), *arguments]
    for old in folder.glob(pattern):
        old.unlink()
    outcome = run_command(command, options.out / f"{name}.log", timeout)
    results = sorted(map(str, folder.glob(pattern)))
    problem = "" if results else "no results were written"
    return judge(name, outcome, problem, {"command": command, "results": results})


# --- the whole ---


def runners() -> dict[str, Callable[[argparse.Namespace], Part]]:
    """How each part is run, in order."""
    found: dict[str, Callable[[argparse.Namespace], Part]] = {
        "environment": check_environment,
        "tests": check_tests,
    }
    for tool in TOOLS:
        found[tool] = lambda options, tool=tool: check_sanitizer(tool, options)
    for mode, dtype in BENCHES:
        found[f"bench_{mode}_{dtype}"] = lambda options, mode=mode, dtype=dtype: check_bench(
            mode, dtype, options
        )
    found["bench_memory"] = check_memory
    return found


def run_part(
    name: str, runner: Callable[[argparse.Namespace], Part], options: argparse.Namespace
) -> Part:
    """Run a part; what it raises becomes its failure, so that the others still run."""
    start = time.perf_counter()
    try:
        part = runner(options)
    except Exception as error:
        part = Part(name, "failed", message=f"{type(error).__name__}: {error}")
    part.seconds = part.seconds or round(time.perf_counter() - start, 2)
    return part


def assemble(parts: list[Part], options: argparse.Namespace) -> dict[str, Any]:
    """The report: passed only if every part that was asked for has run and passed."""
    fine = ("passed", "not found") if options.allow_missing else ("passed",)
    names = [part.name for part in parts]
    details = next((part.details for part in parts if part.name == "environment"), {})
    return {
        "report": "gpu_check",
        **{key: details.get(key) for key in ("gpu", "torch", "cuda", "date")},
        "passed": names == options.only and all(part.status in fine for part in parts),
        "left_out": [name for name in PARTS if name not in options.only],
        "not_run_yet": [name for name in options.only if name not in names],
        "allow_missing": options.allow_missing,
        "seconds": round(sum(part.seconds for part in parts), 2),
        "parts": [asdict(part) for part in parts],
    }


def side_by_side(names: list[str]) -> Iterator[list[str]]:
    """The parts in order, the sanitizer's tools in one group: each keeps one core busy."""
    tools = [name for name in names if name in TOOLS]
    for name in names:
        if name not in TOOLS:
            yield [name]
        elif name == tools[0]:
            yield tools


def table(report: dict[str, Any]) -> str:
    """The report for the eye: the machine, and a line for each part."""
    lines = [f"{report['gpu']}, torch {report['torch']}, CUDA {report['cuda']}, {report['date']}"]
    for part in report["parts"]:
        details = part["details"]
        counts = [f"{details[key]} {key}" for key in ("passed", "failed", "skipped", "findings")
                  if details.get(key) is not None]  # fmt: skip
        note = part["message"] or ", ".join(counts)
        line = f"{part['name']:<20}  {part['status']:<9}  {part['seconds']:>5.0f} s  {note}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def count_gpus() -> int:
    """How many GPUs the driver has; without torch, so that nothing need be installed to ask."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def why_no_gpu(*, ask_torch: bool) -> str:
    """One line on why nothing can be checked here, empty where it can."""
    if count_gpus() == 0:
        return "gpu-check: no GPU here, nothing was checked"
    if not ask_torch:
        return ""
    try:
        import torch
    except ImportError as error:
        return f"gpu-check: torch cannot be imported, nothing was checked: {error}"
    if torch.cuda.is_available():
        return ""
    return f"gpu-check: torch {torch.__version__} does not see the GPU, nothing was checked"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and write the report; returns the exit code."""
    options = parse(arguments)
    reason = why_no_gpu(ask_torch=not options.look)
    if reason:
        print(reason, file=sys.stderr)
        return 2
    if options.look:
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    report = assemble(parts, options)
    available = runners()
    for group in side_by_side(options.only):
        print(f"gpu-check: {', '.join(group)} ...", flush=True)
        with ThreadPoolExecutor() as pool:
            parts += pool.map(lambda name: run_part(name, available[name], options), group)
        report = assemble(parts, options)
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    print(f"gpu-check: {'passed' if report['passed'] else 'FAILED'}, wrote {options.report}")
    print(table(report))
    return 0 if report["passed"] else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder of logs and results")
    add("--report", type=Path, help="the JSON report, default gpu_check.json in that folder")
    add("--only", type=some_parts, default=list(PARTS), help="parts of the list above, by commas")
    add("--allow-missing", action="store_true", help="pass where compute-sanitizer is not found")
    add("--timeout-tests", type=seconds, default=200.0, help="seconds, default 200")
    add("--timeout-sanitizer", type=seconds, default=75.0, help="seconds per tool, default 75")
    add("--timeout-bench", type=seconds, default=45.0, help="seconds each, default 45")
    add("--timeout-memory", type=seconds, default=65.0, help="seconds, default 65")
    add("--bench-arguments", default=BENCH_ARGUMENTS, help=f"default {BENCH_ARGUMENTS!r}")
    add("--memory-arguments", default=MEMORY_ARGUMENTS, help=f"default {MEMORY_ARGUMENTS!r}")
    add("--look", action="store_true", help="only look for a GPU: exit code 0 with one, 2 without")
    options = parser.parse_args(arguments)
    # Parts run in another folder.
    options.out = options.out.resolve()
    options.report = (options.report or options.out / "gpu_check.json").resolve()
    return options


def some_parts(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in PARTS:
            expected = ", ".join(PARTS)
            raise argparse.ArgumentTypeError(f"expected some of {expected}; got {name!r}")
    return [name for name in PARTS if name in ("environment", *chosen)]


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0; got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
