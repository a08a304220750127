"""SHOWS. Plans, observed states and outcomes as text, JSON and JSON lines. Pure: it asks nobody and prints nothing."""
