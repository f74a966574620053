"""Evaluation: captions to scores, scores to a page a person reads."""
