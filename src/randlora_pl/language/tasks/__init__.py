"""LightningModules for decoders and encoders."""
