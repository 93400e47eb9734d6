"""Training of one level: trainer, extensions, optimizers, learning-rate schedules, precision, averaging."""
