"""Tests of world: real files, real processes."""
