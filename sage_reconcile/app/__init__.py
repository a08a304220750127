"""The composition root: the verbs of sage, and the one place that knows everybody."""
