"""Export to ONNX and to PyTorch programs."""
