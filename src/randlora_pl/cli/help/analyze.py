"""Help page of ``analyze``."""

PAGE = """\
What adapters do, beyond their accuracy: tables, CSV and pictures in a new folder. RUN is a run folder or an adapter.

  randlora-pl analyze spectrum RUN RUN ...            rank and singular values of each layer's update (Table 2)
  randlora-pl analyze represent FULL                  how well LoRA and RandLoRA can express an update (equations 7, 8)
  randlora-pl analyze cka FULL OTHER ...              likeness of activations to full fine-tuning's (Figure 4a)
  randlora-pl analyze landscape RUN RUN RUN           the loss on the plane through three models (Figures 4b and 5)
  randlora-pl analyze forgetting RUN ... --datasets NAME ...    zero-shot accuracy elsewhere, before and after tuning

Each explained: randlora-pl analyze VERB --help
"""
