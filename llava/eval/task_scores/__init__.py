"""Scores of the six change tasks, each by the protocols that published figures follow, named."""
