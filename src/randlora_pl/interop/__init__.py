"""Exchange with other programs: merged weights, PEFT, the official code, plain LoRA, ONNX, hubs."""
