"""Oracles, inputs and tolerances that several tests share."""
