"""Markers tell what a test needs. Most come from its folder or its file, by the table here."""

import pytest

NEEDS = {
    "tests/cluster/": ("hosts",),
    "tests/cluster/test_links.py": ("slow",),
    "tests/cluster_commands/test_status.py::test_real_run": ("ranks",),
    "tests/benchmarks/test_context.py::test_ranks_are": ("ranks",),
    "tests/benchmarks/test_save.py::test_command_measures": ("ranks",),
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
    # They compile or interpret kernels, or compare many of their cases, for many seconds.
    "tests/benchmarks/test_kernels_compile.py::test_kernels": ("kernels",),
    "tests/benchmarks/test_unfinished_products.py::test_sums_of_grouped": ("kernels",),
    "tests/kernels/test_fused.py::test_cross_entropy_is_the_same": ("kernels",),
    "tests/kernels/test_fused.py::test_compiled_loss_is_computed_again": ("kernels",),
    "tests/kernels/test_fused.py::test_gated_and_its_gradient_are_the_same_compiled": ("kernels",),
    "tests/kernels/test_context.py": ("kernels",),
    "tests/kernels/test_infini_attention.py": ("kernels",),
    "tests/kernels/test_self_check.py": ("kernels",),
    "tests/kernels/test_triton.py::test_kernels_match_reference": ("kernels",),
    # Long, though in one process: they import DeepSpeed in processes of their own, or train.
    "tests/benchmarks/test_context.py::test_window_keeps": ("long",),
    "tests/benchmarks/test_gpu_check.py": ("long",),
    "tests/benchmarks/test_packing.py::test_command_writes": ("long",),
    "tests/benchmarks/test_peer.py::test_small_comparison": ("long",),
    "tests/benchmarks/test_quality.py": ("long",),
    "tests/benchmarks/test_recall.py::test_command_trains": ("long",),
    "tests/benchmarks/test_recall.py::test_mistakes_are_told_before_torch": ("long",),
    "tests/cluster_commands/test_batch_job.py": ("long",),
    "tests/cluster_commands/test_preflight.py": ("long",),
    "tests/commands/test_cli.py::test_launchers_variable": ("long",),
    "tests/commands/test_cli.py::test_mistake_that_only_the_start_can_tell": ("long",),
    "tests/commands/test_cli.py::test_mistakes_are_told_quickly": ("long",),
    "tests/commands/test_cli.py::test_output_that_nobody_reads": ("long",),
    "tests/conversion/test_export.py::test_mixed_dtypes_are_aligned": ("long",),
    "tests/conversion/test_hf_contract.py": ("long",),
    "tests/conversion/test_hf_padding.py": ("long",),
    "tests/conversion/test_hf_rules.py": ("long",),
    "tests/conversion/test_hf_training.py": ("extras",),
    "tests/conversion/test_llama.py::test_first_segment_of": ("long",),
    "tests/conversion/test_llama.py::test_imported_model_has_the_logits": ("long",),
    "tests/conversion/test_llama.py::test_round_trip": ("long",),
    "tests/conversion/test_load_model.py": ("long",),
    "tests/conversion/test_ranges.py": ("long",),
    "tests/conversion/test_seed.py::test_greedy_text": ("long",),
    "tests/conversion/test_whole_run.py": ("long",),
    "tests/data/test_packed_lanes.py::test_seek_equals_stepping": ("long",),
    "tests/data/test_packed_lanes.py::test_every_token": ("long",),
    "tests/data/test_prepare.py::test_prepare_killed": ("long",),
    "tests/data/test_prepare.py::test_prepare_says_when": ("long",),
    "tests/data/test_prepare.py::test_prepare_several": ("long",),
    "tests/distributed/test_compiled_runs.py": ("long",),
    "tests/evaluation/test_documents.py": ("long",),
    "tests/evaluation/test_harness.py": ("extras",),
    "tests/generation/test_commands.py::test_memory_of_a_bf16": ("long",),
    "tests/generation/test_commands.py::test_memory_by_a_rule": ("long",),
    "tests/generation/test_commands.py::test_reading_in_pieces": ("long",),
    "tests/generation/test_commands.py::test_ten_times_the_text": ("long",),
    "tests/model/test_absent_device.py": ("long",),
    "tests/model/test_compiled.py::test_loss": ("long",),
    "tests/model/test_compiled.py::test_compiled_blocks": ("long",),
    "tests/model/test_compiled.py::test_number": ("long",),
    "tests/model/test_generate.py::test_greedy_equals_argmax": ("long",),
    "tests/model/test_imports.py::test_model_never_imports": ("long",),
    "tests/model/test_packing.py": ("long",),
    "tests/model/test_torch_features.py::test_compiled": ("long",),
    "tests/planning/test_activations.py::test_kept_is": ("long",),
    "tests/planning/test_plan.py::test_type_that_is_open": ("long",),
    "tests/planning/test_plan.py::test_shipped_configs": ("long",),
    "tests/planning/test_sharing.py": ("long",),
    "tests/system/test_paths.py::test_run_may": ("long",),
    "tests/system/test_wheel.py::test_a_shipped": ("long",),
    "tests/system/test_wheel.py::test_configs_and": ("long",),
    "tests/system/test_printing.py::test_commands_print": ("long",),
    "tests/test_launch_scripts.py::test_job_finds": ("long",),
    "tests/test_readme.py::test_python_example": ("long",),
    "tests/test_tree.py::test_the_library_is_light": ("long",),
    "tests/training/test_checkpoint.py::test_the_other_ranks": ("long",),
    "tests/training/test_compiled.py::test_steps": ("long",),
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


DEAR = {"hosts", "ranks", "kernels", "long"}
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
