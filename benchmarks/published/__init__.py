"""The training runs whose results stand in README, beside the published figures."""
