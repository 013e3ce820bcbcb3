"""Task definitions: YAML for lm-eval, and the scorers they name."""
