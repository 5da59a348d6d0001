"""Convolutional backbones: SE-ResNet-50 and EfficientNet-B0 to B7, with taps at strides 4 to 32."""
