"""What the training loop uses: the fitted head, evaluation, the size of a micro-batch, the table of epochs."""
