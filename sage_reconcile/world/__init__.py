"""TOUCHES. One file, one outside thing: facts out, no judgement."""
