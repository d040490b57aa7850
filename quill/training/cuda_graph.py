"""Work on a GPU recorded as a CUDA graph: one launch instead of hundreds."""

from collections.abc import Callable

import torch


class Recorded:
    """Calls `work`; on a CUDA device its kernels are recorded in the first call, then replayed.

    work takes and returns tensors. Its shapes and the Python numbers in it stay those of the first
    call; what changes from call to call it has to read from tensors. Random numbers follow the seed
    that is set before a call. What it returns is overwritten by the next call.
    """

    def __init__(self, work: Callable, device: torch.device | None):
        """device: whose kernels to record; None to call `work` each time."""
        self.work, self.device = work, device
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor):
        if self.device is None:
            return self.work(*inputs)
        if self.graph is None:
            with torch.cuda.device(self.device):
                return self._record(inputs)
        if inputs:
            torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.outputs

    def _record(self, inputs: tuple):
        """Do the work once, which compiles and allocates what it needs, and then record it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.work(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.inputs = [tensor.clone() for tensor in inputs]
        graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # other threads may use the GPU
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
            self.outputs = self.work(*self.inputs)  # launches nothing
        self.graph = graph
        return outputs
