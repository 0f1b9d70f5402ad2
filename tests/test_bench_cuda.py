"""What the fusion benchmark does on CUDA only, with the device's side of it faked."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import sys
import types
from pathlib import Path

import pytest
import test_bench_fusion as plain  # puts benchmarks/ on the path
import torch
import torch.nn.functional as F
from rich.console import Console

import dgl_ext

import bench_fusion  # isort: skip
import cuda_steps  # isort: skip
import fusion_cells  # isort: skip
import fusion_report  # isort: skip
import harness  # isort: skip
import providers  # isort: skip

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CUDA = torch.device("cuda", 0)
BOTH = ("eager", "graph")


class FakeCuda:
    """`torch.cuda` as far as it is used, writing down what is called on which stream."""

    def __init__(self, end_error=None):
        self.log, self.streams, self.end_error = [], ["main"], end_error

    def note(self, text):
        self.log.append(f"{text} on {self.streams[-1]}")

    def Stream(self, device):
        assert device == CUDA
        return types.SimpleNamespace(name="side", wait_stream=lambda other: self.note("side waits"))

    def current_stream(self, device):
        return types.SimpleNamespace(wait_stream=lambda other: self.note("main waits"))

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=lambda: self.note("replay"))

    def synchronize(self):
        self.note("synchronize")

    @contextlib.contextmanager
    def device(self, device):
        assert device == CUDA
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before = list(self.streams)
        self.streams.append(stream.name)
        try:
            yield
        finally:
            self.streams[:] = before

    @contextlib.contextmanager
    def graph(self, graph, stream):
        # Like torch's: a capture that fails at its end leaves the stream set.
        self.streams.append(stream.name)
        self.note("begin")
        try:
            yield
        finally:
            self.note("end")
            if self.end_error:
                raise self.end_error
            self.streams.pop()


def test_a_whole_step_is_captured_after_a_warm_up_on_a_side_stream():
    cuda = FakeCuda()
    leaf = torch.randn(3, requires_grad=True)

    def step():
        cuda.note("step" if leaf.grad is None else "step with gradients")
        logits = leaf * 2
        logits.square().mean().backward()  # adds to the gradients that are there
        return (logits,)

    step()
    cuda.log.clear()
    captured = cuda_steps.Gpu(CUDA, cuda).capture(step, {"leaf": leaf})
    steps = ["step with gradients on side"] * cuda_steps.WARM_UPS
    body = ["begin on side", "step on side", "end on side"]
    assert cuda.log == ["side waits on main", *steps, *body, "main waits on main"]
    # Nothing keeps the autograd graph of the captured step, whose nodes are bound to its stream.
    assert captured.outputs[0].grad_fn is None
    torch.testing.assert_close(captured.outputs[0], leaf.detach() * 2)
    assert captured.gradients["leaf"] is leaf.grad
    captured()
    assert cuda.log[-1] == "replay on main"


def test_a_capture_that_fails_at_its_end_only_says_why():
    cuda = FakeCuda(RuntimeError("capture was invalidated"))
    with pytest.raises(providers.Unavailable, match="RuntimeError: capture was invalidated"):
        cuda_steps.Gpu(CUDA, cuda).capture(lambda: (torch.randn(2),), {})
    assert cuda.streams == ["main"]


def profiler_of(cuda, categories):
    """A torch.profiler.profile whose trace has events of these categories."""

    @contextlib.contextmanager
    def profile(activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        events = [{"name": "process_name"}, *({"cat": category} for category in categories)]
        trace = json.dumps({"traceEvents": events})
        cuda.note("profile")
        yield types.SimpleNamespace(export_chrome_trace=lambda path: Path(path).write_text(trace))
        cuda.note("done")

    return profile


def test_launches_are_the_kernels_of_one_warm_step():
    cuda = FakeCuda()
    profile = profiler_of(cuda, ["kernel", "gpu_memcpy", "kernel", "cuda_runtime", "gpu_memset"])
    assert cuda_steps.Gpu(CUDA, cuda, profile).launches(lambda: cuda.note("step")) == 2
    names = ["step", "synchronize", "profile", "step", "synchronize", "done"]
    assert cuda.log == [f"{name} on main" for name in names]


def test_the_real_profiler_writes_such_a_trace(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.randn(3).exp()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"aten::exp"} <= {event["name"] for event in events if event.get("cat") == "cpu_op"}


def test_a_cuda_block_flushes_before_each_step_and_times_between_events(monkeypatch):
    log, clock = [], iter([1.0, 4.0, 10.0, 12.0, 20.0, 27.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = next(clock)

        def elapsed_time(self, end):
            return end.at - self.at

    class Flush:
        def fill_(self, value):
            log.append("flush")

    sizes = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(size) or Flush())
    block = harness._CudaBlock(CUDA)
    assert sizes == [200 << 20]
    assert block(lambda: log.append("step"), 3) == pytest.approx(3e-3)  # of 3, 2 and 7 ms
    assert log == ["synchronize", *["flush", "event", "step", "event"] * 3, "synchronize"]


class FakeGpu:
    """Captures by keeping the memory of one run; a replay runs again and copies into it."""

    def __init__(self, spoil=None, launches=7):
        self.spoil, self.count, self.captures = spoil, launches, 0

    def capture(self, step, leaves):
        self.captures += 1
        outputs = tuple(output.detach() for output in step())
        gradients = {name: leaf.grad for name, leaf in leaves.items()}

        def replay():
            fresh = step()
            for old, new in zip(outputs, fresh, strict=True):
                old.copy_(new.detach())
            for name, leaf in leaves.items():
                if name != self.spoil:
                    gradients[name].copy_(leaf.grad)

        return cuda_steps.Captured(replay, outputs, gradients)

    def launches(self, step):
        step()
        if isinstance(self.count, Exception):
            raise self.count
        return self.count


def measured(names, gpu, executions=BOTH, passes=1):
    timing = fusion_cells.Timing(names, executions)
    for _ in range(passes):
        fusion_cells.measure(plain.cell(), timing, 1e-9, min_rounds=2, gpu=gpu)
    fusion_cells.count_launches(plain.cell(), timing, gpu)
    return fusion_cells.rows(plain.cell(), timing, plain.CEILING)


def test_eager_and_graphs_take_turns_and_ratios_stay_within_each(monkeypatch):
    calls = []
    microseconds = {
        ("joint", "eager"): [10.0],
        ("reference", "eager"): [30.0],
        ("joint", "graph"): [2.0],
        ("reference", "graph"): [5.0],
    }

    def time_all(steps, *_, **__):
        calls.append(list(steps))
        return {candidate: microseconds[candidate] for candidate in steps}

    monkeypatch.setattr(harness, "time_alternating", time_all)
    rows = measured(["joint", "reference"], FakeGpu())
    assert len(calls) == 1
    assert sorted(calls[0]) == sorted(microseconds)
    assert [(row["execution"], row["provider"]) for row in rows] == [
        *(("eager", "joint"), ("eager", "reference")),
        *(("graph", "joint"), ("graph", "reference")),
    ]
    assert [row["ratio_to_joint"] for row in rows] == [1, 3, 1, 2.5]
    assert [row["median_us"] for row in rows] == [10, 30, 2, 5]
    assert [row["launches"] for row in rows] == [7] * 4
    assert set(rows[3]) <= set(fusion_cells.columns("logits"))


@pytest.mark.parametrize("spoiled", ["features[1]", "bias[0]"])
def test_a_replay_that_misses_a_gradient_is_wrong_and_eager_is_not(spoiled):
    rows = measured(["reference"], FakeGpu(spoil=spoiled))
    assert [row["status"] for row in rows] == ["ok", "wrong"]
    assert f"{spoiled}.grad differs from the reference by nan" in rows[1]["note"]
    assert "median_us" not in rows[1]
    assert rows[1]["launches"] is None


@pytest.mark.parametrize("spoiled", [None, "features[0]"])
def test_every_way_to_a_step_s_losses_can_be_a_graph(spoiled):
    names = [
        name
        for name in providers.PROVIDERS["step"]
        if name not in ("joint", "compiled", *plain.ON_CUDA)
    ]
    here, timing = plain.cell(mode="step"), fusion_cells.Timing(names, BOTH)
    fusion_cells.measure(here, timing, 1e-9, min_rounds=2, gpu=FakeGpu(spoil=spoiled))
    wrong = {candidate: status for candidate, (status, _) in timing.excluded.items()}
    assert wrong == ({(name, "graph"): "wrong" for name in names} if spoiled else {})


def test_graphs_need_a_gpu():
    timing = fusion_cells.Timing(["joint"], BOTH)
    with pytest.raises(ValueError, match="gpu: expected one to capture for 'graph' with"):
        fusion_cells.measure(plain.cell(), timing, 1e-9)


def test_defaults_by_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    out = ["--out", str(tmp_path)]
    cpu = bench_fusion._parse(["--device", "cpu", *out])
    assert (cpu.graphs, len(cpu.sizes), cpu.modes) == ("eager", 6, ["step"])
    assert bench_fusion._parse(["--smoke", *out]).modes == ["step", "logits"]
    assert bench_fusion._parse(["--smoke", "--mode", "logits", *out]).modes == ["logits"]
    assert bench_fusion._parse(["--device", "cpu", "--graphs", "eager", *out]).graphs == "eager"
    cuda = bench_fusion._parse(["--device", "cuda", *out])
    assert cuda.graphs == "both"
    assert cuda.sizes == [*cpu.sizes, (4096, 2048, 1000)]
    assert bench_fusion._parse(["--device", "cuda", "--graphs", "graphs", *out]).graphs == "graphs"
    assert bench_fusion._gpu(torch.device("cpu")) is None
    assert isinstance(bench_fusion._gpu(CUDA), cuda_steps.Gpu)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What a run with graphs prints and writes, on a device that is faked."""
    out, text = tmp_path_factory.mktemp("results"), io.StringIO()
    flags = ["--smoke", "--device", "cpu", "--fusion", "concat,film", "--sizes", "5x8x3"]
    flags += ["--mode", "step", "--providers", "joint,two_pass", "--out", str(out)]
    options = bench_fusion._parse(flags)
    options.graphs = "both"
    console = Console(file=text, width=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_fusion, "_parse", lambda arguments: options)
        patch.setattr(bench_fusion, "_gpu", lambda device: FakeGpu(launches=12))
        patch.setattr(bench_fusion.report, "make_console", lambda: console)
        assert bench_fusion.main() == 0
    return text.getvalue(), out


def test_files_hold_eager_and_graphs(written):
    stem = written[1] / "bench_fusion_step_cpu_float32_smoke"
    with stem.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (fusion, way, name)
        for fusion in ("concat", "film")
        for way in BOTH
        for name in ("joint", "two_pass")
    ]
    assert [(row["fusion"], row["execution"], row["provider"]) for row in rows] == expected
    for row in rows:
        assert row["status"] == "ok"
        assert row["launches"] == "12"
        assert 0 < float(row["ratio_to_joint"]) < math.inf
    document = json.loads(stem.with_suffix(".json").read_text())
    assert document["executions"] == ["eager", "graph"]
    assert [row["execution"] for row in document["rows"]] == [way for _, way, _ in expected]
    assert document["rows"][0]["launches"] == 12
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_tables_of_eager_and_graphs(written):
    lines = written[0].splitlines()
    assert "counting kernels ..." in lines
    titles = [line.strip() for line in lines if line.startswith(("concat", "film"))]
    assert titles == ["concat, eager", "concat, CUDA graph", "film, eager", "film, CUDA graph"]
    assert sum(line.split()[-1:] == ["kernels"] for line in lines) == 4
    assert sum(line.split()[:1] == ["two_pass"] and line.split()[-1] == "12" for line in lines) == 4
    assert "* Kernels a step: joint 12, two_pass 12." in lines


def both_ways(provider, ratios, **more):
    """A row per execution, with its ratio to joint."""
    return [
        plain.summary_row("sum", provider, ratio, ratio - 0.02, ratio + 0.02)
        | {"execution": way, **more}
        for way, ratio in zip(BOTH, ratios, strict=True)
    ]


def test_summary_of_eager_and_graphs():
    rows = both_ways("joint", (1, 1), launches=9)
    rows += both_ways("dgl_ext", (0.8, 1.1), launches=13)
    rows[3]["launches"] = 11
    eager, graph, kernels = fusion_report.describe(rows)
    assert eager.startswith("Against joint (eager), dgl_ext takes 0.80 (sum 64x512x6) to 0.80")
    assert "faster in 1 of 1 cells" in eager
    assert graph.startswith("Against joint (CUDA graph), dgl_ext takes 1.10")
    assert "dgl_ext is slower than joint (CUDA graph) at sum 64x512x6 by 10%." in graph
    assert kernels == "Kernels a step: joint 9, dgl_ext 11 to 13."


def test_one_reason_for_eager_and_graphs_is_one_sentence():
    rows = both_ways("joint", (1, 1))
    rows += both_ways("dgl_ext", (1, 1), status="left out", note="no nvcc")
    assert fusion_report.describe(rows) == [
        "dgl_ext was not timed (eager).",
        "dgl_ext was not timed (CUDA graph).",
        "dgl_ext was left out at every cell: no nvcc",
    ]


def test_committed_results_without_executions_still_read_the_same(tmp_path):
    document = json.loads((RESULTS / "bench_fusion_logits_cpu_float32.json").read_text())
    found = fusion_report.describe(document["rows"], foreign_load=document["foreign_load"])
    assert found == document["summary"]
    text = io.StringIO()
    fusion_report.print_results(Console(file=text, width=80), document)
    assert "kernels" not in text.getvalue()
    assert "graph" not in text.getvalue()
    fusion_report.plot(tmp_path / "plot.png", document)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_table_with_kernels_fits_80_columns():
    figures = {"median_us": 12345.6, "p20_us": 12000.1, "p80_us": 13000.4, "launches": 123}
    figures |= {"gflops_per_s": 812345.6, "share_of_ceiling": 0.987, "bound": "compute"}
    size = {"batch": 4096, "width": 2048, "classes": 1000, "ratio_to_two_pass": 10.04}
    rows = both_ways("reference", (10.04, 10.04), **figures, **size)
    text = io.StringIO()
    Console(file=text, width=80).print(fusion_report._table("film, eager", rows))
    line = next(line for line in text.getvalue().splitlines() if "reference" in line)
    expected = ["reference", "12346", "12000-13000", "10.04", "10.04", "812.3", "TFLOP/s"]
    assert line.split() == [*expected, "98.7%", "123"]


def cuda_problem():
    features = (types.SimpleNamespace(device=CUDA, dtype=torch.float32),) * 2
    return types.SimpleNamespace(features=features, fusion="concat")


@pytest.mark.parametrize("name", ["fused", "library", "dgl_ext", "dgl_ext_logits"])
def test_dgl_ext_is_left_out_on_cuda_without_its_cuda_extension(monkeypatch, name):
    monkeypatch.setitem(dgl_ext._extension._errors, "cuda", ImportError("libcudart is missing"))
    with pytest.raises(providers.Unavailable, match="CUDA extension is not loaded: libcudart is"):
        providers.PROVIDERS["step"][name].build(cuda_problem())


@pytest.mark.parametrize("mode", ["step", "logits"])
@pytest.mark.parametrize(("name", "backend"), [("fused",) * 2, ("library",) * 2, ("dgl_ext", None)])
def test_a_provider_names_its_executor_and_is_left_out_if_none_runs(
    monkeypatch, mode, name, backend
):
    monkeypatch.setitem(dgl_ext._extension._errors, "cuda", None)
    monkeypatch.setattr(providers, "_device_type", lambda problem: "cuda")
    backends = []
    for function in (dgl_ext.fused_decouple, dgl_ext.fused_decouple_cross_entropy):

        def call(*args, function=function, backend=None, **kwargs):
            backends.append(backend)
            return function(*args, backend="reference", **kwargs)

        monkeypatch.setattr(dgl_ext, function.__name__, call)
    with pytest.raises(providers.Unavailable, match=r"takes the reference for cuda torch.float32"):
        providers.PROVIDERS[mode][name].build(plain.cell().problem())
    assert backends == [backend]


# --- Liger ---


def with_liger(monkeypatch, factor=1.0):
    """A stand-in on the CPU that, as Liger 0.8.5, makes no gradient where the rows need none."""

    def loss_of(rows, weight, target, bias=None):
        if not rows.requires_grad:
            weight, bias = weight.detach(), bias.detach()
        return factor * F.cross_entropy(F.linear(rows, weight, bias), target)

    name = "liger_kernel.transformers.functional"
    module = types.SimpleNamespace(liger_fused_linear_cross_entropy=loss_of)
    for parent in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(providers, "_device_type", lambda problem: "cuda")


def liger_row(fusion):
    timing, here = fusion_cells.Timing(["liger", "joint"]), plain.cell(fusion, mode="step")
    fusion_cells.measure(here, timing, 1e-9, min_rounds=1)
    return fusion_cells.rows(here, timing, plain.CEILING)[0]


@pytest.mark.parametrize("fusion", ["concat", "sum", "film"])
def test_three_calls_of_liger_are_the_method_and_a_wrong_one_is_not_timed(monkeypatch, fusion):
    with_liger(monkeypatch)
    assert liger_row(fusion)["status"] == "ok"
    with_liger(monkeypatch, factor=1.001)
    row = liger_row(fusion)
    assert row["status"] == "wrong"
    assert "differs from the reference by 1.0e-03" in row["note"]


def test_liger_is_left_out_in_one_line_where_it_cannot_be_imported(monkeypatch):
    assert (liger_row("concat")["note"]) == "it runs on CUDA only"
    with_liger(monkeypatch)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    row = liger_row("concat")
    assert row["status"] == "left out"
    assert row["note"].startswith("liger-kernel cannot be imported: ModuleNotFoundError")
    assert "\n" not in row["note"]
