"""Peak speed of known devices, for model FLOPs utilisation."""

import torch

PEAK_BF16_FLOPS = {
    "B200": 2250e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
    "A100": 312e12, "L40S": 362e12,
}  # fmt: skip
"""Dense bf16 FLOP/s by a part of the device's name, the first that fits, from the vendor's data
sheets."""


def device_peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak of dense matrix products, FLOP/s; None where it is not known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)
