"""PyTorch in, one ExportedProgram out: preprocessing, backbone, head and decoding in one graph."""
