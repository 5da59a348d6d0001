"""Core ML: lowering, compression, and evaluation of a saved package without a Mac."""
