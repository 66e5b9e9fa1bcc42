"""The language experiments: text data, prompts, answers and scores, behind the extra ``language``."""
