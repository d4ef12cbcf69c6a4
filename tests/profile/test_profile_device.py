"""A profile of a model on a GPU that is not there: the path of a real one, from the trace to the sentence."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
from autotune import profile
from autotune.diagnose.costs import PhaseProfile, Profile, ScalePoint
from autotune.diagnose.diagnosis import diagnose
from autotune.diagnose.parts import ATTENTION, CACHE, COMPILED, FFN, HEAD, NORM, OVERHEAD
from autotune.errors import MeasurementError
from autotune.machine import device
from autotune.machine.hardware import Hardware
from autotune.profile.observing import observe
from autotune.profile.operators import device_use, share
from autotune.profile.phases import on_device
from autotune.profile.recording import DeviceEvent, HostCall, read
from autotune.profile.scaling import growth_s
from autotune.profile.spans import Span, Trace, kernel_span, span_of
from autotune.profile.timeline import Timeline, timeline
from autotune.profile.timing import Stopwatch, time_request
from autotune.profile.tracing import trace, watched
from autotune.runtime import narrow
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.workload import PHASES, Workload
from tests import models
from tests.fakes.cuda import FakeCuda
from tests.fakes.nvml import FakeNvml
from tests.profile.crowded import Crowded
from tests.profile.test_timeline import TRACES

GPU = Hardware("cuda", "a GPU", "9.0", 1, 80 * 10**9, 3350e9, {"float32": 60e12, "tf32": 400e12}, None, {})
WORKLOAD = Workload(tuple(map(tuple, models.token_prompts(3, 12))), new_tokens=8)


@pytest.fixture(scope="module")
def measured() -> Profile:
    with pytest.MonkeyPatch.context() as patch, device.stand_in(FakeCuda()):
        patch.setitem(sys.modules, "pynvml", FakeNvml({"nvmlDeviceGetCurrentClocksEventReasons": 0x4}))
        patch.setattr("autotune.profile.observing.OBSERVE_S", 0.0)
        return profile.measure(Variant(models.tiny("llama")), WORKLOAD, GPU, budget_s=1.0, scaling=False)


def test_every_kernel_is_counted_and_attributed(measured: Profile) -> None:
    for phase in PHASES:
        found = measured.phases[phase]
        assert found.device is not None
        assert found.device.launches == found.device.kernel_count > 50
        rows = {row.group: row for row in found.operators}
        assert {ATTENTION, FFN, NORM, HEAD, CACHE, OVERHEAD} <= set(rows)
        assert sum(row.seconds for row in rows.values()) == pytest.approx(found.seconds)
        working = sum(row.seconds for row in rows.values() if row.group != OVERHEAD)
        assert working == pytest.approx(found.device.busy_s)
        assert found.device.kernels
        assert {kernel.group for kernel in found.device.kernels} >= {ATTENTION, FFN, NORM}


def test_time_is_the_devices_or_the_hosts(measured: Profile) -> None:
    for found in measured.phases.values():
        use = found.device
        assert use is not None
        assert found.busy == pytest.approx(use.busy_s / found.seconds)
        assert found.host_s == pytest.approx(found.seconds - use.busy_s)
        assert 0 <= use.host_wait_s <= use.gap_s <= found.seconds
        assert 0 <= use.late <= 1
        assert use.event_s > 0
        assert found.loop_s > 0


def test_the_diagnosis_names_launches_and_idle_time(measured: Profile) -> None:
    for found in measured.phases.values():
        assert found.device is not None
        # The device's time is the fake's and the request's is this machine's: the share of idle time is set instead.
        idle = replace(found, samples_s=(10 * found.device.busy_s,), busy=0.1, sync_s=0)
        diagnosis = diagnose(idle, GPU)
        assert diagnosis.bottleneck == "overhead"
        assert f"launches {found.device.launches} kernels" in diagnosis.evidence
        assert "(GPM counts SMs active 38 %" in diagnosis.evidence


def test_counters_of_each_phase_come_along(measured: Profile) -> None:
    for found in measured.phases.values():
        assert found.device is not None
        assert found.device.counters is not None
        assert found.device.counters.lowered == ("power cap",)


def test_on_a_cpu_nothing_of_this_is_there() -> None:
    found = profile.measure(Variant(models.tiny("llama")), WORKLOAD, GPU, budget_s=0.5, scaling=False)
    assert all(phase.device is None and phase.host_s == 0 and phase.growth_s == 0 for phase in found.phases.values())


def test_a_stopwatch_waits_for_the_device(fake: FakeCuda) -> None:
    model, ids = serving(Variant(models.tiny("llama"))), torch.tensor(models.token_prompts(1, 8))
    waits = fake.waits
    request = time_request(model, ids, 3)
    assert fake.waits >= waits + 2, "what was queued before, or what is left over, is not waited for"
    assert len(request.tokens_s) == 3
    assert request.start_s < request.tokens_s[0] < request.tokens_s[1] < request.tokens_s[2]


def test_time_that_passes_while_waiting_belongs_to_the_request(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Slow(FakeCuda):
        def synchronize(self) -> None:
            now[0] += 10.0  # what is queued takes so long

    monkeypatch.setattr("autotune.profile.timing.time.perf_counter", lambda: now[0])
    model, ids = serving(Variant(models.tiny("llama"))), torch.tensor(models.token_prompts(1, 8))
    with device.stand_in(Slow()):
        request = time_request(model, ids, 3)
    assert request.start_s == 10.0, "the work of others was counted"
    assert request.tokens_s[-1] == 20.0, "the device still worked when the last token was counted"


def test_the_wait_for_live_requests_is_no_part_of_the_devices_time(fake: FakeCuda) -> None:
    model, ids, traffic = models.tiny("llama"), torch.tensor(models.token_prompts(1, 8)), Crowded(0.0, 0.0)
    alone, beside = Variant(model), Variant(model, traffic)
    time_request(serving(alone), ids, 3)  # allocates what stays
    expected, found = (
        observe(fake, lambda tokens, each=each: time_request(serving(each), ids, tokens), 3, each.turn)
        for each in (alone, beside)
    )
    assert not traffic.waits_s, "it did not wait"
    assert {phase: seen.event_s for phase, seen in found.items()} == {p: seen.event_s for p, seen in expected.items()}


def test_a_token_that_is_still_computed_is_waited_for() -> None:
    fetched = list[str]()

    class Queued(torch.Tensor):
        device = torch.device("cuda")

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            fetched.append("waited")
            return torch.ones(1)

    watch = Stopwatch()
    watch.put(torch.ones(1).as_subclass(Queued))
    watch.put(torch.ones(1))
    assert fetched == ["waited"]
    assert len(watch.ticks) == 2


def test_a_graph_is_one_launch_of_many_kernels(fake: FakeCuda) -> None:
    x, total = torch.ones(8, 8), torch.zeros(8, 8)
    graph, _ = fake.owner.run(lambda: fake.capture(lambda: total.copy_(x @ x).mul(2)))

    def request() -> None:
        with torch.profiler.record_function("autotune.request"):
            pass
        for _ in range(4):
            with torch.profiler.record_function("autotune.token"):
                pass
            fake.owner.run(graph.replay)

    found = on_device(read(fake.trace(request)), {})["decode"]
    assert found.timeline is not None
    assert (found.timeline.launches, found.timeline.graph_launches) == (1, 1)
    assert found.timeline.kernel_count >= 3  # the fake copies results into the graph's buffers besides
    assert {span.group for span in found.spans if span.works} == {COMPILED}
    assert [span.name for span in found.spans if span.works and span.role == "linear"] == ["mm_kernel"]


def test_another_profiler_is_not_disturbed(fake: FakeCuda) -> None:
    subject = watched(Variant(models.tiny("llama")))
    with torch.autograd.profiler.profile(use_kineto=False), pytest.raises(MeasurementError, match="profiler"):
        trace(subject, torch.tensor(models.token_prompts(1, 4)), 2)


def test_a_profiler_that_sees_no_gpu_is_an_error_and_no_verdict() -> None:
    with pytest.raises(MeasurementError, match="nothing of the GPU"):
        on_device(read((TRACES / "empty.json").read_bytes()), {})


def ahead(step: int) -> list[dict[str, Any]]:
    """A token's events of a loop that launches step n + 1 before it looks at token n: 100 us apart, in a graph."""
    at, stamps = 100 * step, {"ph": "X", "pid": 1, "tid": 1}
    host = {**stamps, "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": at - 60, "dur": 5}
    works = {"ph": "X", "pid": 0, "tid": 7, "cat": "kernel", "args": {"correlation": 50 + step}}
    return [
        host | {"args": {"correlation": 50 + step}},
        works | {"name": "void gemm<half>(x)", "ts": at + 1, "dur": 80},
        works | {"name": "flash_fwd_kernel", "ts": at + 82, "dur": 18},
        {**stamps, "cat": "user_annotation", "name": "autotune.token", "ts": at + 104, "dur": 1},
    ]


def test_a_loop_that_runs_ahead_is_measured_by_where_work_runs() -> None:
    marks = [
        {"ph": "X", "pid": 1, "tid": 1, "cat": "user_annotation", "name": name, "ts": at, "dur": 1}
        for name, at in (("autotune.request", -300), ("autotune.token", -290), ("autotune.token", 4))
    ]
    events = marks + [event for step in range(6) for event in ahead(step)]
    found = on_device(read(json.dumps({"traceEvents": events})), {})["decode"]
    assert found.timeline is not None
    assert found.seconds == pytest.approx(100e-6)
    assert found.timeline.busy_s == pytest.approx(98e-6)
    assert (found.timeline.launches, found.timeline.kernel_count, found.timeline.host_waits) == (1, 2, 0)
    spent = {span.role: span.seconds for span in found.spans}
    groups = {span.group for span in found.spans}
    assert sum(span.seconds for span in found.spans) == pytest.approx(98e-6)
    assert set(spent) == {"linear", "attention"}
    assert groups == {COMPILED, ATTENTION}


@pytest.mark.parametrize(
    ("kernel", "role"),
    [  # names as an H100, an A100 and inductor report them
        ("nvjet_sm90_tst_64x8_64x16_2x1_v_bz_splitK_TNT", "linear"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_tn_align1>(cutlass_80_simt_sgemm::Params)", "linear"),
        (
            "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int> > >(Params)",
            "linear",
        ),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(int)", "linear"),
        ("void at::native::(anonymous namespace)::tinygemm_m16n8k16_chunk_kernel<ALayout_RM<>, 8>(void*)", "linear"),
        ("triton_red_fused_mul_sum_unsqueeze_3", "linear"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, float*, int)", "linear"),
        ("void gemm_4bit_simt<__nv_bfloat16, 1>(__nv_bfloat16 const*, unsigned char const*, float const*)", "linear"),
        ("void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>(int, int, int, __nv_bfloat16*)", "linear"),
        ("kdequant_mm_int32_fp16<4, 512>(int*, float*, float*, __half*, __half*, int, int, int)", "linear"),
        ("cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_35_16x128x64_kernel0_0", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<pytorch_flash::Flash_fwd_kernel_traits<128> >(P)", "attention"),
        (
            "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<"
            "flash::CollectiveMainloopFwdSm90<2, cute::tuple<cute::C<1> >, 128, cutlass::bfloat16_t> > > >(Params)",
            "attention",
        ),
        (
            "void cutlass::device_kernel<flash::enable_sm80_or_later<flash::FlashAttnFwdCombine<float> > >(Params)",
            "attention",
        ),
        (
            "void at::native::index_elementwise_kernel<128, 4, at::native::index_copy_kernel_impl<Op> >(int)",
            "cache",
        ),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16> >(int)", None),
        ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_0", None),
        ("Memcpy DtoD (Device -> Device)", None),
    ],
)
def test_what_a_kernel_does_is_in_its_name(kernel: str, role: str | None) -> None:
    work = DeviceEvent(kernel, "kernel", 0.0, 1e-5)
    assert kernel_span(work, 1e-5).role == role


def test_every_kernel_of_autotune_s_own_has_a_role() -> None:
    pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
    from triton.runtime import JITFunction

    found, folder = set[str](), Path(narrow.__file__).parent
    for path in folder.glob("*.py"):
        module = importlib.import_module(f"{narrow.__name__}.{path.stem}".removesuffix(".__init__"))
        found |= {kernel.fn.__name__ for kernel in vars(module).values() if isinstance(kernel, JITFunction)}
    elsewhere = [p for p in Path(autotune.__file__).parent.rglob("*.py") if "triton.jit" in p.read_text()]
    assert {path.parent for path in elsewhere} == {folder}
    assert {name: kernel_span(DeviceEvent(name, "kernel", 0.0, 1e-5), 1e-5).role for name in found} == dict.fromkeys(
        found, "linear"
    )
    assert found


@pytest.mark.parametrize(
    ("operator", "role"),
    [
        ("aten::mm", "linear"),
        ("bitsandbytes::gemm_4bit", "linear"),
        ("bitsandbytes::dequantize_4bit", "linear"),
        ("aten::_flash_attention_forward", "attention"),
        ("flash_attn_3::fwd", "attention"),
        ("aten::add", None),
    ],
)
def test_what_an_operator_does_is_in_its_name(operator: str, role: str | None) -> None:
    assert span_of(HostCall(operator, "cpu_op", 0.0, 1e-5), {}, 1e-5).role == role


def test_kernels_of_generated_code_are_known_by_their_own_names() -> None:
    def event(category: str, name: str, at: float, length: float, **more: Any) -> dict[str, Any]:
        return {"ph": "X", "pid": 1, "tid": 1, "cat": category, "name": name, "ts": at, "dur": length, "args": more}

    names = ["triton_red_fused_mean_mul_0", "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "flash_fwd_splitkv_kernel"]
    marks = [("autotune.request", 0), ("autotune.token", 1), ("autotune.token", 2), ("autotune.token", 90)]
    events = [event("user_annotation", name, at, 0.1) for name, at in marks]
    events.append(event("cpu_op", "## Call CompiledFxGraph fabc ##", 3, 60))
    for i, name in enumerate(names):
        events.append(event("cuda_driver", "cuLaunchKernelEx", 5 + 10 * i, 2, correlation=i + 1))
        events.append(event("kernel", name, 10 + 20 * i, 20, correlation=i + 1))
    spans = on_device(read(json.dumps(events)), {})["decode"].spans
    found = [(span.name, span.group, span.role) for span in spans if span.works]
    assert found == [
        (names[0], COMPILED, None),
        (names[1], COMPILED, "linear"),
        (names[2], ATTENTION, "attention"),
    ]
    assert sum(span.outermost for span in spans) == 1


def test_a_trace_without_a_request_is_refused() -> None:
    with pytest.raises(MeasurementError, match="no whole request"):
        on_device(read((TRACES / "eager.json").read_bytes()), {})


def test_a_disk_that_is_full_is_an_error_that_says_so(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    with pytest.raises(MeasurementError, match=r"No space left on device.*TMPDIR"):
        fake.trace(lambda: None)


def span(seconds: float, group: str = FFN) -> Span:
    return Span("mm", seconds, group, "linear", works=True, outermost=True)


def test_a_device_works_as_long_however_slow_the_profiled_host_is() -> None:
    lane = Timeline(seconds=0.020, busy_s=0.004, gap_s=0.015, gaps=10, host_wait_s=0.012, host_waits=8, launches=9)
    traced = Trace((span(0.004),), 0.020, timeline=lane)
    found, use = share(traced, 0.010), device_use(traced, 0.010, 0.009, None)
    assert found.linear_s == pytest.approx(0.004)  # not halved with the step
    assert found.groups[OVERHEAD] == pytest.approx(0.006)
    assert use is not None
    # 6 ms of 10 are idle where 16 of 20 were traced
    assert (use.gap_s, use.host_wait_s) == pytest.approx((0.015 * 6 / 16, 0.012 * 6 / 16))
    assert (use.late, use.launches, use.event_s) == (0.8, 9, 0.009)


def test_streams_that_overlap_take_their_time_once() -> None:
    lane = Timeline(seconds=0.010, busy_s=0.006)
    found = share(Trace((span(0.004), span(0.004, ATTENTION)), 0.010, timeline=lane), 0.010)
    assert found.busy_s == pytest.approx(0.006)
    assert found.groups[FFN] == found.groups[ATTENTION] == pytest.approx(0.003)


def test_a_device_cannot_work_longer_than_the_step_takes() -> None:
    traced = Trace((span(0.012),), 0.014, timeline=Timeline(seconds=0.014, busy_s=0.012))
    use = device_use(traced, 0.010, 0.010, None)
    assert share(traced, 0.010).busy_s == pytest.approx(0.010)
    assert use is not None
    assert (use.busy_s, use.gap_s) == (0.010, 0.0)


@pytest.mark.parametrize(
    ("points", "context", "seconds"),
    [
        ([(64, 0.010), (1064, 0.020)], 500, 0.005),
        ([(64, 0.010), (256, 0.030), (1064, 0.020)], 500, 0.005),  # first and last
        ([(64, 0.010), (1064, 0.009)], 500, 0.0),
        ([(64, 0.010)], 500, 0.0),
        ([], 500, 0.0),
    ],
)
def test_what_grows_with_the_context(points: list[tuple[int, float]], context: int, seconds: float) -> None:
    assert growth_s([ScalePoint(1, c, s) for c, s in points], context) == pytest.approx(seconds)


@pytest.mark.gpu
def test_a_real_gpu_is_profiled() -> None:
    model = models.tiny("llama").to("cuda")
    found = profile.measure(Variant(model), WORKLOAD, GPU, budget_s=5.0, scaling=False)
    for phase in PHASES:
        one: PhaseProfile = found.phases[phase]
        assert one.device is not None
        assert one.device.launches > 20
        assert 0 < one.busy < 1
        assert one.device.late > 0.5, "a tiny model's kernels end before the next is launched"
        assert {ATTENTION, FFN, NORM, HEAD} <= {row.group for row in one.operators if row.seconds}
        assert diagnose(one, GPU).bottleneck in ("overhead", "sync")


@pytest.mark.gpu
def test_a_real_graph_is_one_launch() -> None:
    gpu, x = device.of("cuda"), torch.ones(1024, device="cuda")
    graph, _ = gpu.owner.run(lambda: gpu.capture(lambda: x.mul(2).add(1)))
    with gpu.range("autotune.decode"):
        found = timeline(read(gpu.trace(lambda: gpu.owner.run(graph.replay))))
    assert (found.graph_launches, found.launches, found.kernel_count) == (1, 1, 2)
    assert found.sync_s > 0
