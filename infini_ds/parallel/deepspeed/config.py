"""Translates our typed config into the dict that DeepSpeed reads; nothing else writes that dict.

DeepSpeed ignores keys it does not know, so they are spelled here and nowhere else.
"""

from infini_ds.config import RunConfig
from infini_ds.parallel.weights_on_disk import buffers, folder_of


def deepspeed_config(config: RunConfig, data_parallel_size: int, universal: bool) -> dict:
    """Returns the DeepSpeed dict of a run.

    Args:
        data_parallel_size: number of data-parallel ranks.
        universal: whether a checkpoint in DeepSpeed's universal form will be loaded.
    """
    train, parallel = config.train, config.parallel
    # DeepSpeed takes each data-parallel rank's lanes for its own, and so counts those that ranks
    # share as often as there are such ranks.
    lanes = config.lanes_of_a_rank(data_parallel_size)
    tree: dict = {
        "train_batch_size": lanes * data_parallel_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": lanes // train.micro_batch_size,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": None,
        # Asking for fp32 sums of bf16 gradients makes DeepSpeed choose its BF16_Optimizer.
        "data_types": {"grad_accum_dtype": "fp32"},
        # Otherwise DeepSpeed rounds the sums to bf16 to reduce them, even on one rank.
        "communication_data_type": "fp32",
        "bf16": {"enabled": train.dtype == "bf16"},
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "contiguous_gradients": parallel.shards_gradients,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "checkpoint": {"load_universal": universal},
        # We checkpoint activations inside a block, so DeepSpeed does not.
        "pipeline": {"use_reentrant": False, "activation_checkpoint_interval": 0},
        # Our optimizer is a torch one unless it is offloaded; DeepSpeed has tested neither with
        # ZeRO.
        "zero_allow_untested_optimizer": True,
    }
    if parallel.zero_stage == 3:
        # A layer's small weights are fetched with its large ones.
        tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        # Otherwise DeepSpeed replaces torch.nn.functional.linear for the whole process.
        tree["zero_optimization"]["memory_efficient_linear"] = False
    offloaded = {"optimizer": parallel.offload_optimizer, "param": parallel.offload_weights}
    for what in (name for name, chosen in offloaded.items() if chosen):
        tree["zero_optimization"][f"offload_{what}"] = {"device": "cpu", "pin_memory": True}
    if parallel.nvme_path:
        tree["zero_optimization"] |= _on_disk(config, data_parallel_size)
    return tree


def _on_disk(config: RunConfig, ranks: int) -> dict:
    """Returns the settings of ZeRO-3 that keep weights on a disk.

    A weight that is whole keeps a buffer, and weights that are fetched ahead take some. So a layer
    is fetched when it is computed, and forgotten then. A group has at most the numbers of the
    largest tensor, because DeepSpeed keeps room for a group's new weights in host memory.
    """
    room = buffers(config.model, ranks)
    return {
        "offload_param": {
            "device": "nvme", "nvme_path": str(folder_of(config)), "pin_memory": True,
            "buffer_count": room.count, "buffer_size": room.numel, "max_in_cpu": 0,
        },
        "sub_group_size": room.numel,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }  # fmt: skip
