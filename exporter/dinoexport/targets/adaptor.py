"""The input adaptor of targets that take uint8 NHWC tensors, before the captured program."""

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram


class NhwcAdaptor(nn.Module):
    """{input: (1, H, W, 3) uint8} → {output: (1,) float32}.

    Args:
        program: a captured program over (1, 3, H, W) float32 of 0..255.
        input_names: in the order of the program.
        output_names: in the order of the program.
    """

    def __init__(
        self, program: ExportedProgram, input_names: tuple[str, ...], output_names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.core = program.module()
        self.input_names = input_names
        self.output_names = output_names

    def forward(self, **images: Tensor) -> dict[str, Tensor]:
        """Cast, transpose, run."""
        pixels = [images[n].to(torch.float32).permute(0, 3, 1, 2) for n in self.input_names]
        return dict(zip(self.output_names, self.core(*pixels), strict=True))
