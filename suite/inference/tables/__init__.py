"""Tables that are smaller than fp32, or elsewhere than in the model's memory (docs/serving-tables.md)."""
