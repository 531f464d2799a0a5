"""What the benchmarks share: paired ratios, the gate, records of runs and the tables of them."""
