"""Value tables in training: row-wise optimizers, and rows in host memory."""
