"""Exchange of adapters with PEFT."""
