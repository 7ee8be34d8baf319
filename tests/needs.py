"""Markers tell what a test needs. Most come from its folder or its file, by the table here."""

import pytest

NEEDS = {
    "tests/cluster/": ("hosts",),
    "tests/cluster/test_links.py": ("slow",),
    "tests/cluster_commands/test_status.py::test_real_run": ("ranks",),
    "tests/conversion/test_start.py": ("ranks",),
    "tests/conversion/test_walk.py": ("ranks",),
    "tests/distributed/": ("ranks",),
    "tests/distributed/test_gpus.py": ("gpu",),
    "tests/faults/": ("ranks",),
    "tests/faults/test_bad_steps.py": ("slow",),
    "tests/faults/test_disks.py": ("slow",),
    "tests/faults/test_kills.py": ("slow",),
    "tests/faults/test_supervised_run.py": ("slow",),
    "tests/kernels/test_triton.py::test_kernels_match_reference_on_a_gpu": ("gpu",),
    "tests/parallel/test_channel.py": ("ranks",),
    "tests/parallel/test_context.py": ("ranks",),
    "tests/parallel/test_deepspeed_traps.py": ("ranks",),
    "tests/planning/test_real_memory.py": ("ranks",),
    # Long, though in one process: they compile, interpret kernels, import DeepSpeed or train.
    "tests/benchmarks/test_gpu_check.py::test_each_part_runs_tiny": ("long",),
    "tests/benchmarks/test_kernels_compile.py::test_kernels": ("long",),
    "tests/benchmarks/test_peer.py::test_small_comparison": ("long",),
    "tests/benchmarks/test_quality.py": ("long",),
    "tests/benchmarks/test_unfinished_products.py::test_sums_of_grouped": ("long",),
    "tests/commands/test_cli.py::test_mistake_that_only_the_start_can_tell": ("long",),
    "tests/commands/test_cli.py::test_output_that_nobody_reads": ("long",),
    "tests/conversion/test_hf_contract.py::test_generate_writes_the_same_by": ("long",),
    "tests/conversion/test_llama.py::test_round_trip": ("long",),
    "tests/conversion/test_load_model.py": ("long",),
    "tests/conversion/test_seed.py::test_greedy_text": ("long",),
    "tests/conversion/test_whole_run.py": ("long",),
    "tests/evaluation/test_documents.py": ("long",),
    "tests/generation/test_commands.py::test_ten_times_the_text": ("long",),
    "tests/kernels/test_fused.py::test_gated_and_its_gradient_are_the_same_compiled": ("long",),
    "tests/kernels/test_self_check.py": ("long",),
    "tests/kernels/test_triton.py::test_kernels_match_reference": ("long",),
    "tests/model/test_absent_device.py": ("long",),
    "tests/model/test_torch_features.py::test_compiled": ("long",),
    "tests/planning/test_plan.py::test_shipped_configs": ("long",),
    "tests/test_readme.py::test_python_example": ("long",),
    "tests/training/test_monitor.py::test_a_run_goes_on_where_nothing_can_be_shown": ("long",),
}
"""What the tests need whose identifiers begin like this, besides what they name themselves."""

FIXTURES = {"saved": ("long",)}
"""What tests that use a fixture need: `saved` trains in a process of its own."""


def needs_of(nodeid: str, fixtures: list[str]) -> set[str]:
    """The markers of a test by the tables above."""
    found = [markers for prefix, markers in NEEDS.items() if nodeid.startswith(prefix)]
    found += [markers for name, markers in FIXTURES.items() if name in fixtures]
    return {marker for markers in found for marker in markers}


DEAR = {"hosts", "ranks", "long"}
"""Markers of tests that take long; their files come first, so that workers end together."""


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by them
def pytest_collection_modifyitems(items):
    dear = set()
    for item in items:
        needs = needs_of(item.nodeid, item.fixturenames)
        for marker in needs:
            item.add_marker(marker)
        if needs & DEAR:
            dear.add(item.path)
    items.sort(key=lambda item: item.path not in dear)
