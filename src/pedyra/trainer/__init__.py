"""This is the one room that knows transformers' Trainer: adapt(trainer), fit(trainer), and its checkpoints."""
