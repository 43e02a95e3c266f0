"""What an export adds to the files of model/, so that transformers loads them: no code of ours imports this."""
