"""The check of the kernels before they are used: every fault is found, and what follows from it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from infini_ds.errors import RunError, UserError
from infini_ds.kernels import backend, self_check
from infini_ds.kernels.infini_attention.parallel import infini_attention_parallel
from infini_ds.kernels.infini_attention.triton import op
from infini_ds.kernels.launch import HOPPER, recording
from infini_ds.kernels.trial import Trial
from infini_ds.memory import RULES
from infini_ds.training import kernel_check
from tests import tiny
from tests.kernels.test_triton import OnGpu

ROOT = Path(__file__).parents[2]
OF_PLANTS = {
    "nothing, linear": "",
    "nothing, delta": "",
    "one number of the output": "computes the output wrongly on this device, by 2.",
    "nan in the output": "computes the output wrongly on this device, by inf",
    "rows that are not written": "computes the output wrongly on this device, by inf",
    "keys not rotated": "computes the output wrongly",
    "a row of a memory": "computes the memory wrongly",
    "a norm": "computes the norm of the memory wrongly",
    "documents not told apart": "computes the output wrongly",
    "overlap not taken away": "computes the output wrongly",
    "guard left out": "computes the output wrongly",
    "a row of a gradient": "computes the gradient of k wrongly",
    "a gradient a tenth too large": "computes the gradient of the write weights wrongly",
    "gradient through another document": "computes the gradient of k wrongly",
    "nothing, gated delta": "",
    "tokens of a chunk on their own": "computes the output wrongly",
    "overlap by the wrong side": "computes the gradient of k wrongly",
    "a row of a chunk's gradient": "computes the gradient of k wrongly",
    "nothing, packed": "",
    "neighbours seen": "computes the output wrongly in packed segments on this device, by ",
    "memory read by all": "computes the output wrongly in packed segments",
    "gradient from neighbours": "computes the gradient of k wrongly in packed segments",
    "an output that moves": "does not compute the same output twice on this device",
    "illegal access": "fails on this device (RuntimeError: CUDA error: an illegal memory access",
    "compiler gives up": "fails on this device (ValueError: PassManager::run failed)",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("self_check") / "found.json"
    command = [sys.executable, "-m", "tests.kernels.self_check_worker", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("plant", OF_PLANTS)
def test_a_planted_fault_is_found(found, plant):
    assert found.keys() == OF_PLANTS.keys()
    assert found[plant].startswith(OF_PLANTS[plant])
    assert bool(found[plant]) == bool(OF_PLANTS[plant])


@pytest.mark.parametrize(
    ("plant", "limit", "fault"),
    [
        ("wrong", 120, r"computes the output wrongly on this device, by 2\..*"),
        ("abort", 120, r"ends its process on this device \(SIGABRT.*\)"),
        ("hang", 2, "does not end a check on this device within half of train.timeout, 2 s"),
    ],
)
def test_a_process_of_its_own_tells_how_it_ended(monkeypatch, plant, limit, fault):
    monkeypatch.setattr(self_check, "PROGRAM", "tests.kernels.self_check_worker")
    monkeypatch.setenv("PLANT", plant)
    trial = Trial("linear", 2, 1, 64, 12)
    said = self_check.find_fault_apart(trial, "cpu", limit)
    assert "\n" not in said
    assert re.fullmatch(fault, said), said


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wrong", [None, False, True])
def test_a_run_that_packs_also_computes_without(monkeypatch, capsys, packed, wrong, sliding):
    """Held-out documents are evaluated one a segment."""
    monkeypatch.setattr(self_check.signal, "alarm", lambda _: None)
    monkeypatch.setattr(self_check, "_choose_assembler", lambda _: None)
    monkeypatch.setattr(backend, "why_missing", lambda *_: "")
    checked = []

    def find_fault(trial, device):
        assert trial.sliding == sliding
        checked.append(trial.packed)
        return "computes it wrongly" if trial.packed is wrong else ""

    monkeypatch.setattr(self_check, "find_fault", find_fault)
    trial = Trial("linear", 2, 1, 64, 12, packed=packed, sliding=sliding)
    self_check.main(["cpu", *map(str, trial), "5"])
    found = wrong is not None and (packed or not wrong)
    assert json.loads(capsys.readouterr().out) == ("computes it wrongly" if found else "")
    assert checked == ([False, True] if packed and wrong is not False else [False])


@pytest.mark.parametrize("rule", RULES)
def test_bf16_of_pytorch_is_no_fault(monkeypatch, rule):
    """What it may be off by rounding, with grouped heads and as many tokens as on a GPU."""
    monkeypatch.setattr(op, "infini_attention_triton", infini_attention_parallel)
    for sliding in (False, True):
        assert self_check.find_fault(Trial(rule, 8, 2, 64, 273, sliding=sliding), "cpu") == ""


@pytest.mark.parametrize(
    ("n", "trial"), [(2048, 272), (16, 272), (500, 273), (7, 273), (1, 273)], ids=str
)
def test_the_window_is_compiled_like_the_models(n, trial):
    """Triton makes other code for multiples of 16."""
    trials = [self_check.trial_of("delta", 32, 8, 128, n, dtype) for dtype in ("bf16", "fp32")]
    assert trials == [Trial("delta", 32, 8, 128, trial), Trial("delta", 32, 8, 128, trial, "fp32")]


@pytest.fixture
def _restored(monkeypatch):
    monkeypatch.setattr(self_check, "_settled", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(self_check, "_choose_assembler", lambda _: None)
    backend._warn.cache_clear()
    yield
    backend.use_backend("auto")
    backend.distrust("")
    self_check._fault_here.cache_clear()


class Queries(OnGpu):
    def __init__(self, n=512):
        self.shape = (1, 1, n, 4, 64)


ARGUMENTS = (Queries(), 2, "delta")


@pytest.mark.usefixtures("_restored")
def test_wrong_kernels_are_left_alone_from_then_on(monkeypatch):
    monkeypatch.setattr(self_check, "find_fault", lambda *_: "computes the output wrongly")
    assert backend.uses_triton(OnGpu(64))
    assert backend.compiles(OnGpu(64))
    self_check.check(*ARGUMENTS)
    says = "^kernels.backend: triton computes the output wrongly; PyTorch's operators compute"
    with pytest.warns(UserWarning, match=says):
        assert not backend.uses_triton(OnGpu(64))
    assert not backend.compiles(OnGpu(64))
    backend.check_backend("auto", "cuda", 64)
    backend.use_backend("triton")
    refused = "^kernels.backend: triton computes the output wrongly; auto or torch computes it$"
    with pytest.raises(UserError, match=refused):
        backend.uses_triton(OnGpu(64))
    with pytest.raises(UserError, match=refused):
        backend.check_backend("triton", "cuda", 64)


@pytest.mark.usefixtures("_restored")
def test_each_kind_of_call_is_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(self_check, "find_fault", lambda *each: checked.append(each) or "")
    with recording(HOPPER):
        self_check.check(*ARGUMENTS)
    assert checked == []
    for _ in range(2):
        self_check.check(*ARGUMENTS)
        self_check.check(Queries(1024), 2, "delta")
        with torch.no_grad():
            self_check.check(*ARGUMENTS)
        self_check.check(Queries(500), 2, "delta")
        self_check.check(Queries(500), 2, "delta", packed=True)
        self_check.check(Queries(500), 2, "delta", sliding=True)
    told = [
        (each.segment_length, gradients, each.packed, each.sliding)
        for each, _, gradients in checked
    ]  # fmt: skip
    assert told == [
        (272, True, False, False), (272, False, False, False), (273, True, False, False),
        (273, True, True, False), (273, True, False, True),
    ]  # fmt: skip
    self_check.settle()
    self_check.check(Queries(), 2, "linear")
    assert len(checked) == 5


@pytest.mark.usefixtures("_restored")
def test_what_a_model_does_around_the_first_use_is_no_part_of_it(monkeypatch):
    """Hooks of activation checkpointing, for one, and inference mode."""
    monkeypatch.setattr(op, "infini_attention_triton", infini_attention_parallel)
    trial = Trial("delta", 2, 1, 64, 20)

    def never(_):
        pytest.fail("saw a tensor of the check")

    hooks = torch.autograd.graph.saved_tensors_hooks(never, never)
    with hooks, torch.autocast("cpu"), torch.inference_mode():
        assert self_check._fault_here(trial, torch.device("cpu"), True) == ""


@pytest.mark.usefixtures("_restored")
def test_a_device_that_is_lost_ends_the_command(monkeypatch):
    def lost(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(self_check, "find_fault", lambda *_: "fails on this device (CUDA error)")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RunError, match=r"^kernels.backend: triton fails on this device \(CUDA"):
        self_check.check(*ARGUMENTS)


def _config(backend="auto", dtype="auto", head_dim=64, packing=True, sliding=False):
    return tiny.run_config(
        model={
            "num_heads": 4, "num_kv_heads": 2, "head_dim": head_dim, "segment_length": 40,
            "memory_rule": "delta", "use_sliding_window": sliding,
        },
        data={"packing": packing},
        train={"dtype": dtype, "timeout": 80.0},
        kernels={"backend": backend},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "settings", "checks"),
    [
        ("cuda", {}, True),
        ("cuda", {"backend": "triton"}, True),
        ("cuda", {"dtype": "bf16"}, True),
        ("cuda", {"packing": False}, True),
        ("cuda", {"sliding": True}, True),
        ("cuda", {"backend": "torch"}, False),
        ("cuda", {"dtype": "fp32"}, False),
        ("cuda", {"dtype": "fp32", "backend": "triton"}, True),
        ("cuda", {"head_dim": 96}, False),
        ("cpu", {}, False),
    ],
)
@pytest.mark.usefixtures("_restored")
def test_a_run_checks_the_kernels_that_it_may_choose(monkeypatch, device, settings, checks):
    called = []
    monkeypatch.setattr(kernel_check, "find_fault_apart", lambda *each: called.append(each) or "")
    monkeypatch.setattr(kernel_check.get_accelerator(), "device_name", lambda: device)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert kernel_check.find_fault(_config(**settings)) == ""
    dtype = "fp32" if settings.get("dtype") == "fp32" else "bf16"
    kinds = settings.get("packing", True), settings.get("sliding", False)
    trial = Trial("delta", 4, 2, 64, 273, dtype, *kinds)
    wanted = [(trial, "cuda:3", 40.0)]
    assert called == (wanted if checks else [])


@pytest.mark.parametrize("wrong", [(), (0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.usefixtures("_restored")
def test_all_ranks_choose_alike(monkeypatch, wrong):
    faults = ["computes it wrongly" if rank in wrong else "" for rank in range(3)]

    def gather(told, mine):
        told[:] = [(fault, f"host{rank}") for rank, fault in enumerate(faults)]

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    chosen = [kernel_check.with_kernels(_config(), fault) for fault in faults]
    assert len({config.kernels.backend for config, _ in chosen}) == 1
    config, lines = chosen[0]
    if not wrong:
        assert (config.kernels.backend, lines) == ("auto", [])
        return
    first = wrong[0]
    assert config.kernels.backend == "torch"
    assert lines == [
        f"kernels.backend: triton computes it wrongly (rank {first} on host{first}; {len(wrong)} "
        "of 3 ranks); PyTorch's operators compute instead, on all"
    ]


@pytest.mark.usefixtures("_restored")
def test_a_run_that_asks_for_triton_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_check, "find_fault_apart", lambda *_: "computes it wrongly")
    monkeypatch.setattr(kernel_check.get_accelerator(), "device_name", lambda: "cuda")
    kernel_check.find_fault(_config(backend="triton"))
    with pytest.raises(UserError, match=r"^kernels\.backend: triton computes it wrongly; auto or"):
        backend.check_backend("triton", "cuda", 64)
