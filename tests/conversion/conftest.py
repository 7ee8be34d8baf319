"""Tiny plain models as Hugging Face writes them, and checkpoints of tiny runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.evaluation.conftest import saved  # noqa: F401, a fixture

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 5, "eos_token_id": 7,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 5e5,
}  # fmt: skip
# Each with what the others lack.
MODELS = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5, "head_dim": 16}),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "mistral": ("Mistral", {"sliding_window": 64, "head_dim": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3_tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.fixture
def make_plain(tmp_path) -> Callable[..., Path]:
    """Saves a plain model with random weights, in shards of about 20 kB."""

    def make(name: str, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
        import transformers

        family, settings = MODELS[name]
        config = getattr(transformers, f"{family}Config")(**SIZES, **settings)
        torch.manual_seed(3)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        directory = tmp_path / f"plain_{name}"
        model.to(dtype).save_pretrained(directory, max_shard_size=shard)
        (directory / "tokenizer.json").write_text('{"of": "the model"}')
        return directory

    return make


@pytest.fixture(scope="session")
def hf_modules(tmp_path_factory) -> Iterator[None]:
    """Lets transformers keep the code of exports in one folder, since a process imports it once."""
    import transformers
    from transformers import dynamic_module_utils

    folder = str(tmp_path_factory.mktemp("modules"))  # transformers puts it in sys.path as it is
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield
