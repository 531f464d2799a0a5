"""The grid: layers x situations, every cell exact or refused by name."""
