"""Training: data, recipe, loop, checkpoints, reports. ``loop.train(config)`` runs it all."""
