"""sage: a declarative reconciler for inference engines. The rooms of the house are told in docs/design.md."""

__version__ = "0.1.0"
