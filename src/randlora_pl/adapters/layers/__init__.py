"""Layers with an update: linear, convolution, packed attention, quantized; access to their weights."""
