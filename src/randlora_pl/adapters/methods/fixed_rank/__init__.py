"""Updates of a chosen rank: LoRA, DoRA, VeRA, NoLA."""
