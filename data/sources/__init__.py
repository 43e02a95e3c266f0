"""Where documents come from: one file a source, with a class derived from `Source`, and a YAML in configs/data."""
