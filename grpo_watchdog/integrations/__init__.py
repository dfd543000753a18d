"""Where trainers are known: one file a trainer. `attach` picks the one that fits."""
