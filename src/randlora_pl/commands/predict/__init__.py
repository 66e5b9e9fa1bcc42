"""`predict`: classes of images or texts, and answers to prompts."""
