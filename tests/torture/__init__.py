"""What nobody should be able to break."""
