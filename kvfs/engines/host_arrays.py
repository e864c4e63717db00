"""torch tensors as the store takes them: without a copy where the memory is the host's."""

import torch

_NUMPY_DTYPES = {torch.float16, torch.float32}


def host_array(tensor):
    """NumPy view of a float tensor; bfloat16, which NumPy lacks, stays torch (the store takes both)."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if tensor.dtype in _NUMPY_DTYPES:
        return tensor.numpy()
    return tensor if tensor.dtype == torch.bfloat16 else tensor.float().numpy()
