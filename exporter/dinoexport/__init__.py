"""Exporter: a checkpoint in, verified artifacts for phones out (ONNX, Core ML, TFLite)."""

__version__ = "0.1.0"
