"""Methods that train a model's own weights with an optimizer of their own: GaLore and Fira."""
