"""Sweeps: many trainings of networks as one run that is mapped over their hyperparameters."""
