"""Methods whose update has a chosen rank: LoRA, DoRA, VeRA, NoLA."""
