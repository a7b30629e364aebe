"""The embedded dataset: a sample of Fashion-MNIST, its licence, and the command that drew it."""
