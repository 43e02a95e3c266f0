"""Where documents come from: one file a source, with one class derived from `data.sources.base.Source`.

A file here and a YAML in configs/data that names it (`source: <file name>`) make a new source.
"""
