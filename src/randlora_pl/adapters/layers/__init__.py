"""Layers with an update: linear, convolution, packed attention, quantized; and access to their weights."""
