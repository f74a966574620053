"""ChangeVLM and its parts, as transformers citizens."""
