"""Filao's figures: measured side by side with its peers, in one run on one machine. `python -m bench` runs it all."""
