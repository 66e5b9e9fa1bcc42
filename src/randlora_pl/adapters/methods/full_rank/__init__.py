"""Updates of full rank with few trained parameters: RandLoRA."""
