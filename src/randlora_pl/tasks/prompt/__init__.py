"""The task of learned prompts, its second head, and its regulation by the pretrained model."""
