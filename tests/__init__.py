"""The tests of sage. Fakes and builders live here; real processes only where docs/style.md allows them."""
