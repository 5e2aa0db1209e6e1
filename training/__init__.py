"""Alignment fine-tuning built on otkern: data, pretraining, tuning and evaluation of multilingual encoders."""
