"""The Triton kernels, interpreted on a CPU, against the specification in fp64."""

import importlib.util
import json
import sys
from itertools import product
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
import torch
import triton

from infini_ds.config.model import KERNEL_RULES
from infini_ds.errors import UserError
from infini_ds.kernels import backend
from infini_ds.kernels.infini_attention import Inputs, infini_attention
from infini_ds.kernels.infini_attention.triton import op, window
from infini_ds.kernels.infini_attention.triton.op import infini_attention_triton
from infini_ds.kernels.infini_attention.triton.tuning import (
    AMPERE,
    BLACKWELL,
    HOPPER,
    RTX_BLACKWELL,
    tiles,
)
from infini_ds.kernels.launch import recording
from infini_ds.memory import RULES, MemoryState
from tests.kernels import test_infini_attention
from tests.kernels.test_infini_attention import LAYOUTS, make_inputs, make_layout
from tests.kernels.triton_cases import (
    CASES,
    LONG_CASES,
    TRIAL_CASES,
    check,
    check_trial,
    compute,
    compute_trial,
    name,
    name_trial,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return interpreted(tmp_path_factory.mktemp("triton"), [*TRIAL_CASES, *CASES])


@pytest.fixture(scope="module")
def long_results(tmp_path_factory) -> list[dict]:
    return interpreted(tmp_path_factory.mktemp("long"), LONG_CASES)


def interpreted(folder: Path, given_cases: list[dict]) -> list[dict]:
    """Computes cases in the interpreter, in two processes."""
    halves = [given_cases[::2], given_cases[1::2]]  # for two cores
    running = []
    for half, cases in enumerate(halves):
        given, taken = folder / f"cases{half}.json", folder / f"results{half}.json"
        given.write_text(json.dumps(cases))
        command = [sys.executable, "-m", "tests.kernels.triton_worker", given, taken]
        running.append(Popen(command, cwd=ROOT, text=True, stdout=PIPE, stderr=STDOUT))
    outputs = [process.communicate(timeout=540)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "".join(outputs)
    results = [{}] * len(given_cases)
    for half in range(2):
        results[half::2] = json.loads((folder / f"results{half}.json").read_text())
    return results


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name(case) for case in CASES])
def test_kernels_match_reference(results, index):
    check(CASES[index], results[len(TRIAL_CASES) + index])


@pytest.mark.long
@pytest.mark.parametrize("index", range(len(LONG_CASES)), ids=[name(case) for case in LONG_CASES])
def test_more_cases_match_reference(long_results, index):
    check(LONG_CASES[index], long_results[index])


@pytest.mark.parametrize(
    "index", range(len(TRIAL_CASES)), ids=[name_trial(case) for case in TRIAL_CASES]
)
def test_kernels_match_reference_in_trials(results, index):
    check_trial(TRIAL_CASES[index], results[index])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [*CASES, *LONG_CASES], ids=name)
def test_kernels_match_reference_on_a_gpu(case, monkeypatch):
    for module, attribute in ((test_infini_attention, "DIM"), (window, "tiles")):
        monkeypatch.setattr(module, attribute, getattr(module, attribute))  # a case changes them
    check(case, compute(case, "cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", TRIAL_CASES, ids=name_trial)
def test_kernels_match_reference_in_trials_on_a_gpu(case, monkeypatch):
    monkeypatch.setattr(window, "tiles", window.tiles)  # a case changes it
    check_trial(case, compute_trial(case, "cuda"))


def record(
    rule, group, gated, generation=HOPPER, d=64, layout_name="mid-window starts", sliding=False
):
    """Starts no kernel: the tensors of a call, its output, and what it keeps."""
    n = 40
    layout = make_layout(layout_name, n)
    batch, segments = layout.starts.shape
    qkv = torch.randn(batch, segments, n, 2 * group + 4, d, dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in qkv.split((2 * group, 2, 2), dim=3))
    w = torch.rand(batch, segments, n, 2).requires_grad_() if gated else None
    memory = RULES[rule].empty(batch, 2, d)
    beta = torch.zeros(2 * group, requires_grad=True)
    positions = n + 48 if sliding else n
    rotary = torch.ones(positions, d // 2), torch.zeros(positions, d // 2)
    previous = torch.randn(batch, segments, 48, 4, d, dtype=q.dtype, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with recording(generation) as calls, hooks:
        inputs = Inputs(q, k, v, w, memory, layout, beta, rule, rotary)
        if sliding:
            inputs = inputs._replace(previous=previous)
        out, final = infini_attention_triton(inputs)
        forward = len(calls)
        (out.float().sum() + final.kv.sum() + final.norm.sum()).backward()
    assert (previous.grad is None) != sliding
    return (q, k, v, out, previous), kept, calls[:forward], calls[forward:]


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_operation_keeps_inputs_output_row_sums_and_memories_alone(rule, sliding):
    (q, k, v, *others), kept, forward, _ = record(rule, group=2, gated=True, sliding=sliding)
    known = {x.data_ptr() for x in (q, k, v, *others)}
    others = [x for x in kept if x.data_ptr() not in known and x.dtype != torch.bool]
    rows = q.shape[0] * q.shape[1]
    padded_n = 128
    states = rows * 2 * 64 * (64 + 1)
    row_sums = rows * 4 * padded_n
    n = q.shape[2]
    weights = 3 * rows * 2 * n  # w, its product with the valid tokens, and those
    small = 2 * (n + 48 * sliding) * 32 + 4 + rows * 2  # rotary tables, beta, damping
    assert sum(x.numel() for x in others) <= states + row_sums + weights + small
    writes = "sums_kernel" if RULES[rule].divides else "chunks_kernel"
    assert {call.kernel.__name__ for call in forward} >= {writes, "attend_kernel"}


def test_queries_keys_and_values_are_read_in_place():
    (q, k, v, *_), _, forward, _ = record("linear", group=1, gated=False)
    attend = next(call for call in forward if call.kernel.__name__ == "attend_kernel")
    assert attend.arguments["q"].data_ptr() == q.data_ptr()
    assert attend.arguments["v"].data_ptr() == v.data_ptr()
    sums = next(call for call in forward if call.kernel.__name__ == "sums_kernel")
    assert sums.arguments["x"].data_ptr() == k.data_ptr()


def test_the_gated_delta_rule_reads_keys_and_values_in_place():
    (q, k, v, *_), _, forward, backward = record("gated_delta", group=2, gated=False)
    for kernel, argument, wanted in (
        ("keys_kernel", "k", k), ("chunks_kernel", "values", v), ("tokens_gradient_kernel", "v", v),
        ("read_sums_kernel", "q", q),
    ):  # fmt: skip
        calls = [call for call in (*forward, *backward) if call.kernel.__name__ == kernel]
        read = {call.arguments[argument].data_ptr() for call in calls}
        assert wanted.data_ptr() in read, kernel


def test_the_gated_delta_rule_damps_nothing():
    _, _, forward, backward = record("gated_delta", group=1, gated=True)
    walks = [call for call in (*forward, *backward) if "damping" in call.arguments]
    assert [call.kernel.__name__ for call in walks] == ["delta_kernel", "delta_gradient_kernel"]
    assert {call.arguments["damping"] for call in walks} == {None}
    assert walks[1].arguments["TRANSPOSED"]


def test_a_chunk_is_the_same_in_all_kernels():
    """The inverse of a chunk is of as many tokens as the kernels that use it take at a time."""
    for d, generation in product(backend.TRITON_HEAD_DIMS, (AMPERE, HOPPER, BLACKWELL)):
        _, _, forward, backward = record("gated_delta", 1, True, generation, d)
        calls = [call for call in (*forward, *backward) if "CHUNK" in call.arguments]
        assert {call.kernel.__name__ for call in calls} == {
            "keys_kernel", "chunks_kernel", "chunks_gradient_kernel", "tokens_gradient_kernel"
        }  # fmt: skip
        assert len({call.arguments["CHUNK"] for call in calls}) == 1


@pytest.mark.parametrize("generation", [AMPERE, HOPPER, BLACKWELL, RTX_BLACKWELL])
@pytest.mark.parametrize("d", backend.TRITON_HEAD_DIMS)
@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_every_kernel_has_tiles_on_every_generation(rule, d, generation):
    _, _, forward, backward = record(rule, 2, True, generation, d, sliding=True)
    assert all(call.options.get("num_warps", 4) in (4, 8) for call in (*forward, *backward))


def test_segments_that_are_not_packed_take_the_kernels_for_them():
    _, _, forward, backward = record("delta", 2, True)
    assert any("PACKED" in call.arguments for call in forward)
    for call in (*forward, *backward):
        assert not call.arguments.get("PACKED", False)
        assert {call.arguments.get(name) for name in ("begins", "ends")} == {None}


def test_segments_without_a_sliding_window_take_the_kernels_for_them():
    for sliding in (False, True):
        _, _, forward, backward = record("gated_delta", 2, True, sliding=sliding)
        calls = [call for call in (*forward, *backward) if "SLIDING" in call.arguments]
        assert [call.kernel.__name__ for call in calls] == [
            "attend_kernel",
            "query_gradient_kernel",
        ]
        assert {call.arguments["SLIDING"] for call in calls} == {sliding}
        assert {call.arguments["earlier_k"] is None for call in calls} == {not sliding}
        earlier = [call for call in backward if call.kernel.__name__ == "earlier_gradient_kernel"]
        assert len(earlier) == sliding


def test_rows_are_padded_to_a_multiple_of_every_tile():
    kernels = (
        "attend", "read_gradient", "normalized_read_gradient", "query_gradient", "key_gradient"
    )  # fmt: skip
    generations = (AMPERE, HOPPER, BLACKWELL, RTX_BLACKWELL)
    kinds = ((False, True), (False, True))
    for case in product(kernels, backend.TRITON_HEAD_DIMS, (2,), generations, *kinds):
        assert window.ROW_PADDING % tiles(*case).rows == 0


@pytest.fixture
def _auto():
    yield
    backend.use_backend("auto")


@pytest.mark.usefixtures("_auto")
def test_triton_asked_for_on_a_cpu_is_refused():
    backend.use_backend("triton")
    layout = make_layout("one segment", 7)
    q, k, v, kv, norm, beta = make_inputs(layout, 7, 1, False)
    rotary = torch.ones(7, 8), torch.zeros(7, 8)
    inputs = Inputs(q, k, v, None, MemoryState(kv, norm), layout, beta, "linear", rotary)
    with pytest.raises(UserError, match=r"kernels\.backend: triton needs a CUDA device, not cpu"):
        infini_attention(inputs)


@pytest.mark.parametrize(
    ("device", "head_dim", "installed", "says"),
    [
        ("cpu", 64, True, "needs a CUDA device, not cpu"),
        ("cuda", 96, True, "has kernels for model.head_dim 64 and 128, not 96"),
        ("cuda", 64, False, "is not installed"),
    ],
)
def test_check_backend_refuses_only_triton_where_it_cannot_run(
    monkeypatch, device, head_dim, installed, says
):
    backend.check_backend("triton", "cuda", 64)
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        forget()
    backend.check_backend("auto", device, head_dim)
    backend.check_backend("torch", device, head_dim)
    with pytest.raises(UserError, match=rf"^kernels\.backend: triton {says}"):
        backend.check_backend("triton", device, head_dim)


def forget():
    """What is known of this machine."""
    backend.why_missing.cache_clear()
    backend._cannot_run.cache_clear()
    backend._warn.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_known():
    yield
    forget()


class OnGpu:
    """Queries as they would be on a GPU."""

    is_cuda = True
    dtype = torch.bfloat16
    device = torch.device("cuda")

    def __init__(self, head_dim):
        self.shape = (1, head_dim)


@pytest.mark.parametrize(("head_dim", "triton"), [(64, True), (128, True), (96, False)])
def test_auto_takes_triton_where_its_kernels_fit(head_dim, triton, recwarn):
    backend._warn.cache_clear()
    assert backend.uses_triton(OnGpu(head_dim)) == triton
    assert backend.uses_triton(OnGpu(head_dim)) == triton
    said = [str(warning.message) for warning in recwarn]
    assert said == ([] if triton else [
        "kernels.backend: triton has kernels for model.head_dim 64 and 128, not 96; "
        "PyTorch's operators compute instead"
    ])  # fmt: skip


def test_auto_leaves_older_gpus_to_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    forget()
    backend._warn.cache_clear()
    with pytest.warns(UserWarning, match="needs a GPU of compute capability 8.0 or newer"):
        assert not backend.uses_triton(OnGpu(64))


@pytest.mark.parametrize("version", ["2.1.0", "3.2.0", "3.5.1", "3.6.0", "3.7.1+git1", "3.10.0"])
def test_triton_before_what_is_tested_is_refused(monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    forget()
    old = version in ("2.1.0", "3.2.0", "3.5.1")
    told = f"needs version 3.6 or newer, not {version}" if old else ""
    assert backend._cannot_run() == told


@pytest.mark.parametrize("named", ["12.8.93", "13.5.37"])
def test_wrong_assembler_of_hopper_is_said_once(monkeypatch, tmp_path, recwarn, named):
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(f"#!/bin/sh\necho 'release {named[:4]}, V{named}'\n")
    ptxas.chmod(0o755)
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(variable, str(ptxas))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    forget()
    assert backend.uses_triton(OnGpu(64))
    assert backend.uses_triton(OnGpu(64))
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (named == "12.8.93")
    for line in said:
        assert line.startswith(f"kernels.backend: ptxas {named} (TRITON_PTXAS_")
        assert line.endswith("; pip install 'nvidia-cuda-nvcc>=13.3'")


def test_layouts_are_all_covered():
    for rule in KERNEL_RULES:
        covered = {case["layout"] for case in [*CASES, *LONG_CASES] if case["rule"] == rule}
        assert covered == set(LAYOUTS)


@pytest.mark.parametrize(
    ("segments", "n", "message"),
    [
        (65536, 1, "triton reads at most 65,535 segments at once, not 65,536; raise train.chunks"),
        (1, 2**24, "triton cannot read segments as long as 16,777,216 tokens; lower model.segment"),
    ],
)
def test_what_the_kernels_cannot_count_is_refused(segments, n, message):
    q, k, v = (torch.empty(1, segments, n, 2, 64, device="meta") for _ in range(3))
    nothing = torch.empty(0, device="meta")
    starts = torch.empty(1, segments, dtype=torch.bool, device="meta")
    with pytest.raises(UserError, match=message):
        op.WINDOWS["linear"](q, k, v, nothing, nothing, starts, "linear", nothing, nothing)
