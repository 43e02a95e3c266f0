"""A run as a Hugging Face folder: `python -m eval.export run=runs/NAME out=DIR`."""
