"""SEQUENCES. The order of things, over Protocols stated where they are used; knows nothing of how they are done."""
