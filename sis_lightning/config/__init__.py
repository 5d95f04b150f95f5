"""Configuration: YAML files composed into one run."""
