"""Adapters elsewhere: merged weights, PEFT, the official code, plain LoRA, ONNX, hubs."""
