"""LayerNorms that are written out: over channels that are not the last axis, or safe in half
precision. Both are LayerNorms to whoever looks for their epsilon.
"""

from torch import Tensor, nn

HALF_LIMIT = 65504.0
"""The largest finite number in half precision: a bound of infinity is none in every format."""


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over one axis of a tensor.

    Args:
        norm: gives width and epsilon, and its weights if it has any and the axis is the last.
        axis: that is normalised.
    """

    def __init__(self, norm: nn.LayerNorm, axis: int) -> None:
        super().__init__(list(norm.normalized_shape), eps=norm.eps, elementwise_affine=False)
        self.axis = axis
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: Tensor) -> Tensor:
        """Any shape → the same."""
        centred = input - input.mean(dim=self.axis, keepdim=True)
        variance = centred.square().mean(dim=self.axis, keepdim=True)
        return self.scale(centred * (variance + self.eps).rsqrt())

    def scale(self, x: Tensor) -> Tensor:
        """Apply the weights, where there are any."""
        return x if self.weight is None else x * self.weight + self.bias


class SafeNorm(ChannelNorm):
    """The same function, without a square above 1.

    With c = x − mean and m = max(1, max|c|), z = c/m has squares of 0..1, and

        c / √(mean(c²) + ε)  =  z / √(mean(z²) + ε/m²),

    exactly, whatever m > 0 is. The lower end of 1 keeps ε/m² at ε or below, so that nothing is
    divided by zero and nothing overflows where all of c is 0 or small. ε/m² may vanish in half
    precision (for ε = 1e-6 from m = 4 on); then max|z| is 1 and mean(z²) at least 1/D, so what is
    lost is under ε·D/16 of the sum: 1e-4 at D = 1536, a fifth of what half precision rounds.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape → the same."""
        centred = input - input.mean(dim=self.axis, keepdim=True)
        most = centred.abs().amax(dim=self.axis, keepdim=True).clamp(1.0, HALF_LIMIT)
        inverse = most.reciprocal()
        scaled = centred * inverse
        variance = scaled.square().mean(dim=self.axis, keepdim=True)
        return self.scale(scaled * (variance + inverse.square() * self.eps).rsqrt())
