"""DeltaVLM (arXiv 2507.22346): a Q-Former reads the question, looks at both dates, and tells a language model."""
